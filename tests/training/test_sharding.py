"""The temperatures with a dimension, as FSDP2 needs them, and back."""

import pytest
import torch
from transformers import AutoModel

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import add_lora
from pixclip_hf.training.sharding import scalars_to_vectors, vectors_to_scalars


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_scalars_to_vectors(family, lora, request, tmp_path):
    model, processor = request.getfixturevalue(f"tiny_{family}")
    model.save_pretrained(tmp_path / "base")
    crops = processor.has_crops
    batch = RegionCollator(processor, crops=crops)([make_scene(index, size=32) for index in range(3)])
    if lora:
        model = add_lora(AutoModel.from_pretrained(tmp_path / "base"), r=2).eval()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = model(**batch)
    before.loss.backward()
    names = scalars_to_vectors(model)
    assert names == {name for name in trainable if name.endswith("log_scale")} and len(names) >= 1
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not [name for name, parameter in model.named_parameters() if not parameter.ndim]
    after = model(**batch)
    assert torch.equal(after.loss, before.loss) and after.loss.ndim == 0
    model.zero_grad()
    after.loss.backward()
    assert all(bool(model.get_parameter(name).grad) == trainable[name] for name in names)

    state = vectors_to_scalars(model.state_dict(), names)
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert loaded.logit_scale.log_scale.ndim == 0
    torch.testing.assert_close(loaded(**batch).loss, before.loss)
