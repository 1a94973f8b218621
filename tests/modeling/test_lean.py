"""Models made of checkpoints: every weight is held once, none is drawn to be overwritten, all buffers are right."""

from functools import partialmethod
from pathlib import Path

import builders
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from pixclip_hf.conversion.weights import Move, Plan, fill
from pixclip_hf.modeling import modeling_inherit, modeling_lean, modeling_stored
from pixclip_hf.modeling.modeling_lean import laid_out, model_of_weights, plain_weights, weights_to_convert
from pixclip_hf.modeling.modeling_stored import read_weights, stored_weights
from pixclip_hf.training import llm

KINDS = [("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")]
LLAMA = {
    "hidden_size": 24,
    "vocab_size": 60,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
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
def test_towers_are_laid_out_twice_and_read_once(dtype, saved, monkeypatch):
    """Once to see what they are, once as parts of the new model; what is not inherited stays unread."""
    vision, text, both = saved("clip", "clip_text", "20KB"), saved("siglip", "llama"), saved("clip", "llama")
    built, read = [], []
    for tower in (CLIPVisionModel, LlamaModel):
        init = tower.__init__
        count = partialmethod(
            lambda self, *args, real, **kw: built.append(type(self)) or real(self, *args, **kw), real=init
        )
        monkeypatch.setattr(tower, "__init__", count)
    real = modeling_inherit.read_weights
    monkeypatch.setattr(
        modeling_inherit, "read_weights", lambda weights, *args: read.append(weights) or real(weights, *args)
    )
    monkeypatch.setattr(modeling_inherit, "load_converted", None)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    make = builders.MODELS["pixclip"].from_vision_text_pretrained
    make(vision, text, dtype=dtype, mask_bias=True)
    assert sorted(built, key=str) == [CLIPVisionModel] * 2 + [LlamaModel] * 2
    parts = {"vision_model", "visual_projection"}, {"text_model", "text_projection"}
    for weights, names in zip(read, parts, strict=True):
        assert {name.split(".")[0] for name in weights} == names | {"logit_scale"}
    # One checkpoint for both.
    built.clear(), read.clear()
    model = make(both, both, text_projection="linear", mask_bias=True, dtype=dtype)
    assert sorted(built, key=str) == [CLIPVisionModel] * 2 + [LlamaModel] * 2
    assert len(read) == 1 and read[0].keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("vision", "text"), KINDS)
def test_equals_what_transformers_loads(vision, text, dtype, saved, monkeypatch):
    """With equal random numbers, to the bit."""
    arguments = (saved(vision, "clip_text", "20KB"), saved("clip", text))
    models = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(modeling_inherit, "plain_weights", lambda *args: None)
            monkeypatch.setattr(modeling_lean, "_is_placed", lambda: True)
        torch.manual_seed(0)
        models.append(builders.MODELS["pixclip"].from_vision_text_pretrained(*arguments, dtype=dtype, mask_bias=True))
    found, expected = map(tensors, models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
        assert found[name].requires_grad == value.requires_grad, name
    assert models[0].config.to_dict() == models[1].config.to_dict()
    assert (models[0].training, models[0].name_or_path, models[0].dtype) == (False, "", dtype)


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
    again = model_of_weights(laid_out(type(model)._from_config, model.config), {})
    (mask,) = (value for name, value in again.named_parameters() if name.endswith("mask_weight"))
    (bias,) = (value for name, value in again.named_parameters() if name.endswith("mask_bias"))
    assert not mask.any() and not bias.any() and again.logit_scale.log_scale.item() == 3.0


def test_tied_weights_are_one_and_not_drawn(drawn):
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    state = LlamaForCausalLM(config).state_dict()
    del state["lm_head.weight"]
    drawn.clear()
    model = model_of_weights(laid_out(LlamaForCausalLM, config), state)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not drawn
    assert model.lm_head.weight.data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_weights_that_a_model_does_not_have_are_refused():
    layout = laid_out(LlamaModel, LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match=r"LlamaModel has no weights .* norm.weight \(3,\), head.weight \(1, 2\)"):
        model_of_weights(layout, {"norm.weight": torch.ones(3), "head.weight": torch.ones(1, 2)})


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


@pytest.fixture
def llama(tmp_path):
    """A saved Llama, and what [`plain_weights`] gives for it after changes of its files."""
    LlamaModel(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)

    def plain(dtype=torch.float32, change=None, **fields):
        weights = load_file(tmp_path / "model.safetensors")
        save_file(weights if change is None else change(weights), tmp_path / "model.safetensors")
        layout = laid_out(LlamaModel, LlamaConfig(**LLAMA, **fields))
        found = plain_weights(layout, str(tmp_path), dtype, {})
        assert found is None or found[0].keys() == layout.state_dict().keys()
        return found

    plain.folder = tmp_path
    return plain


def test_a_head_that_is_left_behind_is_named(tmp_path, saved, caplog):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    make = builders.MODELS["pixclip"].from_vision_text_pretrained
    make(saved("clip", "clip_text", "20KB"), str(tmp_path), mask_bias=True)
    assert f"These weights of {str(tmp_path)!r} are left behind: lm_head.weight." in caplog.messages


def test_plain_checkpoints_have_the_names_of_their_model(llama):
    assert llama()[1] == []
    assert llama(torch.bfloat16)[1] == []
    # As in a language model, with its head.
    head = llama(
        change=lambda weights: {f"model.{k}": v for k, v in weights.items()} | {"lm_head.weight": torch.ones(1)}
    )
    assert head[1] == ["lm_head.weight"]
    # Older versions of transformers stored what is computed.
    stored = {"model.rotary_emb.inv_freq": torch.ones(3), "rotary_emb.inv_freq": torch.ones(3)}
    assert llama(change=lambda weights: weights | stored)[1] == ["lm_head.weight"]


@pytest.mark.parametrize(
    "change",
    (
        lambda weights: weights | {"norm.weight": torch.ones(3)},
        lambda weights: weights | {"norm.weight": torch.ones(24, dtype=torch.int8)},
        lambda weights: weights | {"model.norm.weight": torch.ones(24)},
        lambda weights: {name: value for name, value in weights.items() if name != "norm.weight"},
    ),
    ids=("shape", "type", "twice", "missing"),
)
def test_other_checkpoints_are_left_to_transformers(change, llama):
    assert llama(change=change) is None


def test_special_models_are_left_to_transformers(llama, monkeypatch):
    assert llama("auto") is None
    assert llama(quantization_config={"quant_method": "any"}) is None
    with torch.device("meta"):
        assert llama() is None
    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "_keep_in_fp32_modules_strict", ["norm"])
        assert llama(torch.bfloat16) is None and llama(torch.float32) is not None
    with monkeypatch.context() as patch:
        merged = WeightConverter("up_proj", "up_proj", operations=[Transpose(0, 1)])
        patch.setattr(modeling_lean, "get_model_conversion_mapping", lambda model: [merged])
        assert llama() is None
    with monkeypatch.context() as patch:
        patch.setattr(modeling_stored, "MOUNTS", llama.folder / "mounts")
        (llama.folder / "mounts").write_text("proc /proc proc rw 0 0\nhf-mount /data fuse rw 0 0\n", encoding="utf-8")
        assert llama() is None
    assert llama() is not None
    (llama.folder / "adapter_config.json").write_text("{}")
    assert llama() is None


def test_weights_are_converted_piece_by_piece(llama, monkeypatch):
    monkeypatch.setattr(modeling_stored, "PIECE", 7)
    scalars = {"scalar": torch.tensor(0.3), "empty": torch.ones(0, 3)}
    save_file(load_file(llama.folder / "model.safetensors") | scalars, llama.folder / "model.safetensors")
    expected = load_file(llama.folder / "model.safetensors")
    weights = stored_weights(str(llama.folder), {})
    found = read_weights(weights, torch.bfloat16)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in expected.items())
    path = llama.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors' ends within"):
        read_weights(weights, torch.bfloat16)
    with pytest.raises(SafetensorError):
        stored_weights(str(llama.folder), {})


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
    LlamaModel(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
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
    model = model_of_weights(layout, weights)
    assert all(value.data_ptr() == weights[name].data_ptr() for name, value in model.named_parameters())
    assert torch.equal(model.visual_projection.weight, given[transposed].T)
