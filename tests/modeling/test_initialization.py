"""Weights that a checkpoint lacks start as those of a new model, whatever the memory held."""

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixclip_hf.modeling.modeling_vision import MaskedPatchConv

KINDS = [("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")]
POISON = 1e8


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is asked for without values holds large ones."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(POISON)
            return tensor

        monkeypatch.setattr(torch, name, filled)


@pytest.mark.parametrize("vision, text", KINDS)
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_missing_weights_start_as_in_a_new_model(family, vision, text, tmp_path, poisoned):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    config = builders.build_config(
        family,
        vision_config=builders.vision_config(vision, **sizes),
        text_config=builders.text_config(text, **sizes),
        text_pooling=builders.POOLINGS[text],
    )
    torch.manual_seed(0)
    model = builders.MODELS[family](config)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    new = {name: value.float() for name, value in model.state_dict().items()}
    parts = ("vision_model.", "text_model.", *(f"{name}." for name, _ in model.named_children()))
    for part in dict.fromkeys(parts):
        kept = {name: value + 7 for name, value in state.items() if not name.startswith(part)}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = builders.MODELS[family].from_pretrained(tmp_path).state_dict()
        for name, value in loaded.items():
            expected = new[name]
            if name in kept:
                assert torch.equal(value, kept[name]), name
            elif expected.numel() < 500:
                assert value.abs().max() <= 4 * expected.abs().max() + 1e-6, name
            else:
                torch.testing.assert_close(
                    value.std(), expected.std(), rtol=0.3, atol=1e-6, msg=lambda t, n=name: n + t
                )


def test_a_new_mask_projection_is_zero_in_a_missing_tower(tmp_path, poisoned):
    model = builders.build_model("pixclip")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("vision_model.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    (conv,) = (module for module in loaded.modules() if isinstance(module, MaskedPatchConv))
    assert not conv.mask_weight.any() and 0 < conv.weight.std() < 1
