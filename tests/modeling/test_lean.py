"""Models made of checkpoints: every weight is held once, none is drawn to be overwritten, all buffers are right."""

from pathlib import Path

import builders
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from pixclip_hf.conversion.weights import Move, Plan, fill
from pixclip_hf.modeling import modeling_inherit
from pixclip_hf.modeling.modeling_lean import laid_out, model_of_weights, weights_to_convert
from pixclip_hf.training import llm

KINDS = [("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")]
TOWERS = ("vision_model.", "text_model.")
INHERITED = (*TOWERS, "visual_projection.", "text_projection.", "logit_scale.")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("clip", "bert")`: folder of a PixCLIP with these towers."""
    root = tmp_path_factory.mktemp("saved")

    def folder(vision, text, shard_size="50GB"):
        path = root / f"{vision}-{text}-{shard_size}"
        if not path.exists():
            model = builders.build_model("pixclip", vision, text, text_projection="linear", mask_bias=True)
            model.save_pretrained(path, max_shard_size=shard_size)
        return str(path)

    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Where random numbers were written: address and count of each tensor that was filled with them."""
    places = []
    for name in ("normal_", "uniform_"):
        real = getattr(torch.Tensor, name)

        def fill(tensor, *args, _real=real, **kwargs):
            if tensor.device.type != "meta":
                places.append((tensor.data_ptr(), tensor.numel()))
            return _real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, fill)
    return places


@pytest.fixture
def loaded(monkeypatch):
    """The models whose weights were read, as they were returned."""
    models = []
    real = modeling_inherit.load_weights

    def load(*args):
        models.append(real(*args))
        return models[-1]

    monkeypatch.setattr(modeling_inherit, "load_weights", load)
    return models


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("vision", "text"), KINDS)
def test_every_weight_is_held_once(vision, text, dtype, saved, drawn, loaded):
    """`text_projection` alone starts anew here."""
    vision, text = saved(vision, "clip_text", "20KB"), saved("clip", text)
    drawn.clear()
    model = builders.MODELS["pixclip"].from_vision_text_pretrained(
        vision, text, text_projection="mlp_adapter", mask_bias=True, dtype=dtype
    )
    assert len(loaded) == 2
    for whole, part in zip(loaded, TOWERS, strict=True):
        source = dict(whole.named_parameters())
        parts = {name: value for name, value in model.named_parameters() if name.startswith(part)}
        assert len(parts) >= 20
        for name, value in parts.items():
            assert value.data_ptr() == source[name].data_ptr() and value.requires_grad, name
    assert {value.dtype for value in model.parameters()} == {dtype}
    new = {value.data_ptr(): value.numel() for name, value in model.named_parameters() if name not in source}
    assert drawn and {place for place, _ in drawn} <= new.keys()
    assert all(new[place] == count for place, count in drawn)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize(("vision", "text"), KINDS)
def test_equals_a_model_that_was_initialized_and_overwritten(vision, text, family, dtype, saved, tmp_path):
    folder = saved(vision, text)
    source = AutoModel.from_pretrained(folder, dtype=dtype)
    if family == "cloc":
        # A CLOC has no place for the mask branch.
        folder = tmp_path
        builders.build_model("cloc", vision, text, text_projection="linear").save_pretrained(folder)
        source = AutoModel.from_pretrained(folder, dtype=dtype)
    options = {"text_projection": "linear"} | ({"mask_bias": True} if family == "pixclip" else {})
    model = builders.MODELS[family].from_vision_text_pretrained(folder, folder, dtype=dtype, **options)
    expected = builders.MODELS[family]._from_config(model.config, dtype=dtype)
    with torch.no_grad():
        for name, value in expected.state_dict().items():
            if name.startswith(INHERITED):
                value.copy_(source.state_dict()[name])
    found, expected = tensors(model), tensors(expected)
    assert found.keys() == expected.keys()
    inherited = 0
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        # The rest is drawn anew, or starts from constants.
        if name.startswith(INHERITED) or value.unique().numel() == 1:
            assert torch.equal(found[name], value), name
            inherited += 1
    assert inherited > 50
    assert all(value.isfinite().all() for value in found.values())
    assert (model.name_or_path, model.training) == ("", False)


@pytest.mark.parametrize("text", ("clip_text", "llama"))
def test_a_temperature_and_the_mask_branch_that_no_checkpoint_has(text, saved):
    model = builders.MODELS["pixclip"].from_vision_text_pretrained(
        saved("clip", text), saved("siglip", "bert"), logit_scale_init_value=3.0, mask_bias=True
    )
    assert model.logit_scale.log_scale.item() == 3.0
    again = model_of_weights(type(model), model.config, {}, torch.float32)
    (mask,) = (value for name, value in again.named_parameters() if name.endswith("mask_weight"))
    (bias,) = (value for name, value in again.named_parameters() if name.endswith("mask_bias"))
    assert not mask.any() and not bias.any() and again.logit_scale.log_scale.item() == 3.0


def test_a_model_is_saved_over_its_own_source(tmp_path):
    """Its weights may be mapped from the very file."""
    model = builders.build_model("pixclip", text_projection="linear")
    model.save_pretrained(tmp_path)
    again = type(model).from_vision_text_pretrained(str(tmp_path), str(tmp_path), text_projection="linear")
    again.save_pretrained(tmp_path)
    for name, value in AutoModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("shard_size", ("50GB", "20KB"))
def test_only_what_is_converted_is_copied_out_of_its_files(shard_size, saved):
    folder = saved("clip", "llama", shard_size)
    config = AutoModel.from_pretrained(folder).config
    assert (len(list(Path(folder).glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert weights_to_convert(folder, config, torch.float32, {}) is None
    assert weights_to_convert(folder, config, "auto", {}) is None
    slices = weights_to_convert(folder, config, torch.bfloat16, {})
    expected = AutoModel.from_pretrained(folder).state_dict()
    assert slices.keys() == expected.keys()
    assert all(torch.equal(slices[name][...], value) for name, value in expected.items())
    config.quantization_config = {"quant_method": "any"}
    assert weights_to_convert(folder, config, torch.bfloat16, {}) is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
def test_converted_weights_leave_no_file_mapped(saved):
    def mapped():
        return folder in Path("/proc/self/maps").read_text()

    folder = saved("clip", "llama", "20KB")
    make = builders.MODELS["pixclip"].from_vision_text_pretrained
    model = make(folder, folder, text_projection="linear", dtype=torch.bfloat16, mask_bias=True)
    assert not mapped() and model.dtype == torch.bfloat16
    model = make(folder, folder, text_projection="linear", mask_bias=True)
    assert mapped() and model.dtype == torch.float32


def test_an_attached_text_tower_is_held_once(tmp_path, drawn, monkeypatch):
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(hidden_size=24, vocab_size=60, **sizes)).save_pretrained(tmp_path)
    model = builders.build_model("pixclip", text=None)
    read = []
    real = llm.load_text_model
    monkeypatch.setattr(llm, "load_text_model", lambda *args, **kwargs: read.append(real(*args, **kwargs)) or read[-1])
    drawn.clear()
    model = llm.attach_text_model(model.to(torch.bfloat16), str(tmp_path))
    assert not drawn and model.text_model.dtype == torch.bfloat16
    source = dict(read[0].named_parameters())
    assert all(value.data_ptr() == source[name].data_ptr() for name, value in model.text_model.named_parameters())


def test_converted_checkpoints_give_their_tensors_away():
    config = builders.build_config("pixclip")
    layout = laid_out(builders.MODELS["pixclip"], config)
    assert {value.device.type for value in layout.parameters()} == {"meta"}
    state = layout.state_dict()
    given = {name: torch.randn(value.shape) for name, value in state.items()}
    transposed = "visual_projection.weight"
    given[transposed] = given[transposed].T.contiguous()
    # Two names of one tensor, and a part of a larger one.
    twice = [name for name in given if name.endswith("layer_norm1.weight") and name.startswith("vision")]
    given[twice[0]] = given[twice[1]] = torch.randn(64)[:32]
    before = {name: value.data_ptr() for name, value in given.items()}
    plan = Plan(
        config={},
        tensors={**given, "nowhere": torch.zeros(1)},
        moves=[Move(name, (name,), "transposed" if name == transposed else "as it is") for name in given],
        left_out={"nowhere": "of no use"},
    )
    weights, _ = fill(layout, plan)
    assert not plan.tensors and weights.keys() == state.keys()
    own = {name for name, value in weights.items() if value.data_ptr() != before[name]}
    assert own == {transposed, *twice[:2]}
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in weights.values())
    assert len({value.data_ptr() for value in weights.values()}) == len(weights)
    model = model_of_weights(builders.MODELS["pixclip"], config, weights, torch.float32)
    assert all(value.data_ptr() == weights[name].data_ptr() for name, value in model.named_parameters())
    assert torch.equal(model.visual_projection.weight, given[transposed].T)
