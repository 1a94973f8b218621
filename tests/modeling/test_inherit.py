"""Models and processors from existing towers: step 0 equals the CLIP that the weights came from."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from builders import build_model, build_texts
from PIL import Image
from safetensors.torch import load_file, save_file

import pixclip_hf
from pixclip_hf.training.llm import load_text_model

MODELS = {"cloc": pixclip_hf.CLOCModel, "pixclip": pixclip_hf.PixCLIPModel}
PROCESSORS = {"cloc": pixclip_hf.CLOCProcessor, "pixclip": pixclip_hf.PixCLIPProcessor}
SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "image_size": 32, "patch_size": 8, **SIZES}
TOKENS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 258}
TEXT = {"hidden_size": 24, "max_position_embeddings": 64, **SIZES, **TOKENS}
LLAMA = {"num_key_value_heads": 2, "tie_word_embeddings": False}


def build_source(name):
    if name.startswith("CLIPText"):
        return getattr(transformers, name)(transformers.CLIPTextConfig(**TEXT, projection_dim=16))
    if name.startswith("CLIPVision"):
        return getattr(transformers, name)(transformers.CLIPVisionConfig(**VISION, projection_dim=16))
    if name.startswith("CLIP"):
        config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)
        return getattr(transformers, name)(config)
    if name == "SiglipVisionModel":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    if name.startswith("Siglip"):
        text = TEXT | {"hidden_size": 32, "vocab_size": 512 if name == "Siglip2" else 259}
        return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))
    if name.startswith("Bert"):
        return getattr(transformers, name)(transformers.BertConfig(**TEXT))
    if name.startswith("Qwen3"):
        return getattr(transformers, name)(transformers.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8))
    return getattr(transformers, name)(transformers.LlamaConfig(**TEXT, **LLAMA))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """`towers("CLIPModel")`: folder of a tiny random model of that class, its weights wide enough to matter."""
    root = tmp_path_factory.mktemp("towers")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(sum(map(ord, name)))
            source = build_source(name)
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            source.save_pretrained(root / name)
            if name == "Siglip2":
                # As the fixed-resolution checkpoints of the Hub: a SigLIP by its type, and no word of a class.
                path = root / name / "config.json"
                content = json.loads(path.read_text())
                assert content["model_type"] == "siglip" and content.pop("architectures")
                path.write_text(json.dumps(content))
        return str(root / name)

    return folder


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def texts(seed=0):
    """Token ids of two texts, the second padded, and their mask."""
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, -1] = ids[1, 5] = 258
    ids[1, 6:], mask[1, 6:] = 0, 0
    return ids, mask


def load(folder, dtype=torch.float32):
    return transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", MODELS)
def test_equals_its_clip(family, dtype, towers, pixels):
    clip = load(towers("CLIPModel"), dtype)
    model = MODELS[family].from_vision_text_pretrained(
        towers("CLIPModel"), towers("CLIPModel"), text_pooling="eos", text_projection="linear", dtype=dtype
    )
    assert not model.training and {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.projection_dim == 16
    expected = clip.get_image_features(pixels).pooler_output
    assert expected.dtype == dtype and expected.std() > 0.05
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)
    ids, mask = texts()
    expected = clip.get_text_features(ids, mask).pooler_output
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_one_clip_on_both_sides_gives_its_logits(family, towers, pixels):
    clip = load(towers("CLIPModel"))
    options = {"text_pooling": "eos", "text_projection": "linear"}
    both = towers("CLIPModel"), towers("CLIPModel")
    model = MODELS[family].from_vision_text_pretrained(*both, **options)
    ids, mask = texts()
    expected = clip(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_image
    assert clip.logit_scale.item() != pytest.approx(2.6592, abs=1e-3)
    torch.testing.assert_close(model(pixels, input_ids=ids, attention_mask=mask).logits_per_image, expected)
    model = MODELS[family].from_vision_text_pretrained(*both, logit_scale_init_value=3.0, **options)
    assert model.logit_scale().item() == pytest.approx(20.0855, rel=1e-4)
    # A scale belongs to two sides that have met.
    for text, changes in (("CLIPTextModelWithProjection", options), ("CLIPModel", options | {"projection_dim": 20})):
        model = MODELS[family].from_vision_text_pretrained(towers("CLIPModel"), towers(text), **changes)
        assert model.logit_scale.log_scale.item() == pytest.approx(2.6592)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vision", ("SiglipModel", "Siglip2", "SiglipVisionModel"))
def test_equals_its_siglip(vision, dtype, family, towers, pixels):
    source = load(towers(vision), dtype)
    model = MODELS[family].from_vision_text_pretrained(towers(vision), towers("LlamaModel"), dtype=dtype)
    expected = source(pixels).pooler_output if vision == "SiglipVisionModel" else source.get_image_features(pixels)
    expected = getattr(expected, "pooler_output", expected)
    assert model.config.projection_dim == 32 and expected.std() > 0.05
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("source", ["cloc", "pixclip"])
def test_a_region_model_gives_its_towers(vision, source, family, pixels, tmp_path):
    old = build_model(source, vision, "llama", text_pooling="mean", text_projection="linear", bidirectional=True)
    old.save_pretrained(tmp_path)
    if (source, family) == ("pixclip", "cloc"):
        with pytest.raises(ValueError, match="left over .*mask_weight"):
            MODELS[family].from_vision_text_pretrained(tmp_path, tmp_path, text_projection="linear")
        return
    new = MODELS[family].from_vision_text_pretrained(tmp_path, tmp_path, text_projection="linear")
    assert (new.config.text_pooling, new.config.bidirectional) == ("mean", True)
    ids, mask = build_texts(3)
    assert torch.equal(new.get_image_features(pixels).pooler_output, old.get_image_features(pixels).pooler_output)
    texts = [model.get_text_features(ids, mask).pooler_output for model in (old, new)]
    assert torch.equal(*texts)
    assert new.logit_scale() == old.logit_scale()


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_single_towers_with_their_projection(family, towers, pixels):
    folders = towers("CLIPVisionModelWithProjection"), towers("CLIPTextModelWithProjection")
    model = MODELS[family].from_vision_text_pretrained(*folders, text_pooling="eos", text_projection="linear")
    vision, text = (getattr(transformers, Path(folder).name).from_pretrained(folder).eval() for folder in folders)
    assert torch.equal(model.get_image_features(pixels).pooler_output, vision(pixels).image_embeds)
    ids, mask = texts()
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, text(ids, mask).text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vision", ("CLIPModel", "SiglipModel"))
def test_any_mask_equals_the_source(vision, dtype, towers, pixels):
    source = load(towers(vision), dtype)
    expected = source.get_image_features(pixels).pooler_output
    model = MODELS["pixclip"].from_vision_text_pretrained(
        towers(vision), towers("LlamaModel"), mask_bias=True, dtype=dtype
    )
    masks = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    masks[:, 0] = False
    found = model.get_region_features(pixels, masks).pooler_output
    # One pass per region: the same rows in a batch of another size may round otherwise, so each is its own reference.
    repeated = source.get_image_features(pixels.repeat_interleave(3, 0)).pooler_output
    assert torch.equal(found.flatten(0, 1), repeated)
    assert torch.equal(model.get_image_features(pixels, use_mask=False).pooler_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("vision", ("CLIPVisionModel", "SiglipModel", "CLIPModel"))
def test_vision_towers(vision, family, towers, pixels):
    model = MODELS[family].from_vision_text_pretrained(towers(vision), towers("CLIPTextModel"), projection_dim=20)
    source = load(towers(vision))
    source = getattr(source, "vision_model", source)
    assert torch.equal(model.vision_model(pixels).pooler_output, source(pixels).pooler_output)
    assert model.get_image_features(pixels).pooler_output.shape == (2, 20)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("text", "pooling"),
    [
        ("CLIPTextModel", "eos"),
        ("BertModel", "cls"),
        ("LlamaModel", "last"),
        ("Qwen3Model", "last"),
        ("CLIPModel", "eos"),
    ],
)
def test_text_towers(text, pooling, family, towers):
    model = MODELS[family].from_vision_text_pretrained(towers("CLIPModel"), towers(text), text_pooling=pooling)
    ids, mask = texts()
    source = load(towers(text))
    source = getattr(source, "text_model", source)
    states = source(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = states[:, 0] if pooling == "cls" else states[[0, 1], [8, 5]]
    expected = model.text_projection(pooled)
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("text", ("LlamaForCausalLM", "Qwen3ForCausalLM", "BertForMaskedLM", "BertForPreTraining"))
def test_checkpoints_with_a_task_head(text, towers):
    """What language models come as: the head is left behind, masked language models have no pooler."""
    model = MODELS["pixclip"].from_vision_text_pretrained(towers("CLIPModel"), towers(text))
    source = load(towers(text))
    ids, mask = texts()
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


@torch.no_grad()
def test_low_precision_leaves_the_rotary_frequencies_alone(towers):
    source = load(towers("LlamaModel"), torch.bfloat16)
    model = MODELS["pixclip"].from_vision_text_pretrained(
        towers("CLIPModel"), towers("LlamaModel"), dtype=torch.bfloat16
    )
    assert model.text_model.rotary_emb.inv_freq.dtype == torch.float32
    ids, mask = texts()
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", MODELS)
def test_saves_and_loads(family, dtype, towers, pixels, tmp_path):
    model = MODELS[family].from_vision_text_pretrained(towers("SiglipModel"), towers("LlamaModel"), dtype=dtype)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert again.dtype == dtype
    if family == "cloc":
        regions = torch.tensor([[[0.1, 0.2, 0.7, 0.9]]]).repeat(2, 1, 1)
    else:
        regions = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    for method, inputs in (("get_region_features", (pixels, regions)), ("get_text_features", texts())):
        expected = getattr(model, method)(*inputs).pooler_output
        assert expected.dtype == dtype
        assert torch.equal(getattr(again, method)(*inputs).pooler_output, expected)


def test_configuration_fields_pass_through(towers):
    model = MODELS["pixclip"].from_vision_text_pretrained(
        towers("CLIPModel"), towers("LlamaModel"), bidirectional=True, mask_bias=True, logit_scale_init_value=3.0
    )
    assert model.config.bidirectional and model.text_model.config.is_causal is False
    assert model.vision_model.get_input_embeddings().mask_bias.abs().sum() == 0
    assert model.logit_scale().item() == pytest.approx(20.0855, rel=1e-4)


def change(folder, tmp_path, edit):
    """A copy of a checkpoint whose tensors are edited, or replaced by what `edit` returns."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "config.json").write_text(Path(folder, "config.json").read_text())
    tensors = load_file(f"{folder}/model.safetensors")
    edited = edit(tensors)
    tensors = edited if isinstance(edited, dict) else tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path)


LAYER = "encoder.layers.1.mlp.fc1.weight"
EXTRA = {"name.of.nothing": torch.zeros(1)}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("side", "source", "edit", "message"),
    [
        ("vision", "CLIPModel", lambda t: t.pop(f"vision_model.{LAYER}"), rf"missing \['vision_model\.{LAYER}'\]"),
        ("text", "CLIPModel", lambda t: t.update(EXTRA), r"left over \['name\.of\.nothing'\]"),
        ("vision", "CLIPVisionModel", lambda t: t.pop(next(k for k in t if k.endswith(LAYER))), rf"missing.*{LAYER}"),
        ("vision", "CLIPVisionModel", lambda t: t.update(EXTRA), r"left over \['name\.of\.nothing'\]"),
        ("text", "LlamaModel", lambda t: t.pop("layers.0.mlp.up_proj.weight"), r"missing \['layers\.0\.mlp\.up_proj"),
        ("text", "LlamaModel", lambda t: t.update(EXTRA), r"left over \['name\.of\.nothing'\]"),
        (
            "text",
            "LlamaForCausalLM",
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(1)}),
            r"left over \[.*layers\.7\.mlp\.up_proj\.weight'\]",
        ),
        ("text", "BertForMaskedLM", lambda t: t.pop("bert.encoder.layer.0.output.dense.bias"), "missing.*dense.bias'"),
        (
            "vision",
            "CLIPVisionModel",
            lambda t: t.update({next(k for k in t if k.endswith(LAYER)): torch.zeros(3, 32)}),
            rf"of another shape \['{LAYER} \(3, 32\) for \(48, 32\)'\]",
        ),
        (
            "text",
            "BertModel",
            lambda t: t.update({"encoder.layer.0.output.dense.bias": torch.zeros(5)}),
            r"of another shape \['encoder\.layer\.0\.output\.dense\.bias \(5,\) for \(24,\)'\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(side, source, edit, message, family, towers, tmp_path):
    folders = {"vision": towers("CLIPModel"), "text": towers("CLIPTextModel")}
    folders[side] = change(towers(source), tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        MODELS[family].from_vision_text_pretrained(**folders)


def wrong_config(name):
    """Configurations that make no tower of one side or the other."""
    small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return {
        "llama": lambda: transformers.LlamaConfig(**TEXT, **LLAMA),
        "clip_vision": lambda: transformers.CLIPVisionConfig(**VISION),
        "t5": lambda: transformers.T5Config(**small),
        "llava": lambda: transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION}, text_config={"model_type": "llama", **TEXT}
        ),
        "vit_msn": lambda: transformers.ViTMSNConfig(**VISION),
    }[name]()


@pytest.mark.parametrize(
    ("side", "name", "message"),
    [
        ("vision", "llama", "`vision` must name .*'llama' checkpoint"),
        ("vision", "llava", "`vision` must name .*'llava' checkpoint"),
        ("vision", "vit_msn", "convolutional patch projection, got 'vit_msn'"),
        ("text", "clip_vision", "`text` must name a CLIP or SigLIP text tower, .*'clip_vision_model' checkpoint"),
        ("text", "t5", "`text` must name .*'t5' checkpoint"),
        ("text", "llava", "`text` must name .*'llava' checkpoint"),
    ],
)
def test_wrong_architectures_fail_before_weights_are_read(side, name, message, towers, tmp_path):
    folders = {"vision": towers("CLIPModel"), "text": towers("CLIPTextModel")}
    # There are no weights: reading them would be another error.
    wrong_config(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MODELS["pixclip"].from_vision_text_pretrained(**folders | {side: str(tmp_path)})


def test_arguments(towers):
    both = towers("CLIPModel"), towers("LlamaModel")
    for error, changes, message in (
        (TypeError, {"projection_dims": 3}, "no fields 'projection_dims'"),
        (ValueError, {"dtype": "int8"}, "`dtype` must be a floating-point dtype.*'int8'"),
        (ValueError, {"dtype": "half-way"}, "`dtype` must be a floating-point dtype.*'half-way'"),
        (ValueError, {"image_size": 35}, "`image_size` must be a multiple of the patch size 8, got 35"),
        (ValueError, {"image_size": 0}, "`image_size` must be a multiple of the patch size 8, got 0"),
        (ValueError, {"max_position_embeddings": 99}, "can be changed in CLIP text towers.*99.*'llama'"),
        (ValueError, {"bidirectional": True, "text": both[0]}, "needs a decoder"),
    ):
        with pytest.raises(error, match=message):
            MODELS["pixclip"].from_vision_text_pretrained(**{"vision": both[0], "text": both[1]} | changes)
    with pytest.raises(ValueError, match="must be at least the tower's own 64.*got 63"):
        MODELS["cloc"].from_vision_text_pretrained(both[0], both[0], max_position_embeddings=63)


def store(folder, tmp_path, dtype):
    """A copy of a checkpoint in another precision."""
    transformers.AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path)
    return str(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("vision", "text", "asked", "expected"),
    [
        ("bfloat16", "bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "auto", "float32"),
        ("bfloat16", "float16", "auto", "float32"),
        ("float16", "bfloat16", None, "float32"),
        ("float32", "float16", "bfloat16", "bfloat16"),
    ],
)
def test_one_dtype_for_the_whole_model(vision, text, asked, expected, towers, pixels, tmp_path):
    vision = store(towers("CLIPModel"), tmp_path / "vision", getattr(torch, vision))
    text = store(towers("BertModel"), tmp_path / "text", getattr(torch, text))
    expected = getattr(torch, expected)
    model = MODELS["pixclip"].from_vision_text_pretrained(vision, text, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected} and model.dtype == expected
    assert model.config.dtype == model.config.vision_config.dtype == model.config.text_config.dtype == expected
    source = load(vision, expected).get_image_features(pixels).pooler_output
    assert torch.equal(model.get_image_features(pixels).pooler_output, source)


@torch.no_grad()
def test_sharded_checkpoints(towers, pixels, tmp_path):
    for name in ("CLIPModel", "LlamaForCausalLM"):
        getattr(transformers, name).from_pretrained(towers(name)).save_pretrained(
            tmp_path / name, max_shard_size="20KB"
        )
        assert len(list((tmp_path / name).glob("model-*-of-*.safetensors"))) > 1
    whole = MODELS["cloc"].from_vision_text_pretrained(towers("CLIPModel"), towers("LlamaForCausalLM"))
    again = MODELS["cloc"].from_vision_text_pretrained(str(tmp_path / "CLIPModel"), str(tmp_path / "LlamaForCausalLM"))
    assert torch.equal(again.get_image_features(pixels).pooler_output, whole.get_image_features(pixels).pooler_output)
    for name, value in whole.text_model.state_dict().items():
        assert torch.equal(again.text_model.state_dict()[name], value)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ("", "vision_model."))
def test_vision_only_checkpoints_with_either_naming(prefix, towers, pixels, tmp_path):
    strip = "vision_model."
    folder = change(
        towers("CLIPVisionModel"), tmp_path, lambda t: {prefix + name.removeprefix(strip): t[name] for name in t}
    )
    model = MODELS["pixclip"].from_vision_text_pretrained(folder, towers("CLIPTextModel"))
    source = load(towers("CLIPVisionModel"))
    assert torch.equal(model.vision_model(pixels).pooler_output, source(pixels).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (56, 16))
@pytest.mark.parametrize("vision", ("CLIPModel", "SiglipModel"))
def test_another_image_size(vision, size, dtype, family, towers):
    """transformers' own interpolation on the fly is the reference; the new model needs no such argument."""
    folder = towers(vision)
    model = MODELS[family].from_vision_text_pretrained(folder, towers("LlamaModel"), image_size=size, dtype=dtype)
    assert model.config.vision_config.image_size == size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    source = load(folder).get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    found = model.get_image_features(pixels.to(dtype)).pooler_output.float()
    torch.testing.assert_close(found, source, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5)
    assert (load(folder).get_image_features(pixels.new_zeros(2, 3, 32, 32)).pooler_output - source).abs().max() > 0.3


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_pixels_that_no_patch_covers(family, towers, pixels, tmp_path):
    """SigLIP so400m at 384 pixels has 27 patches of 14, which cover 378."""
    source = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION | {"image_size": 36})).eval()
    source.save_pretrained(tmp_path)
    model = MODELS[family].from_vision_text_pretrained(str(tmp_path), towers("LlamaModel"))
    assert model.config.vision_config.image_size == 32
    expected = source(torch.nn.functional.pad(pixels, (0, 4, 0, 4), value=9.0)).pooler_output
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("text", ("CLIPModel", "CLIPTextModel"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_stretched_text_positions(dtype, text, towers):
    source = load(towers(text), dtype)
    source = getattr(source, "text_model", source)
    model = MODELS["pixclip"].from_vision_text_pretrained(
        towers("CLIPModel"), towers(text), max_position_embeddings=150, dtype=dtype
    )
    assert model.config.text_config.max_position_embeddings == 150
    found = model.text_model.embeddings.position_embedding.weight
    old = source.embeddings.position_embedding.weight
    assert torch.equal(found[:20], old[:20]) and torch.equal(found[-1], old[-1])
    places = np.linspace(20, 63, 130)
    expected = np.stack([np.interp(places, range(64), column) for column in old.float().T.numpy()], axis=1)
    torch.testing.assert_close(
        found[20:], torch.tensor(expected).to(dtype), atol=1e-5 if dtype == torch.float32 else 4e-3, rtol=0
    )
    # Short texts are read as before, long ones at all.
    ids, mask = texts()
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    long = torch.randint(2, 258, (2, 150), generator=torch.Generator().manual_seed(2))
    features = model.get_text_features(long, torch.ones_like(long)).pooler_output
    changed = model.get_text_features(long.index_fill(1, torch.tensor([140]), 5), torch.ones_like(long)).pooler_output
    assert (features - changed).abs().max() > 1e-4


def test_hub_ids_and_revisions(towers, pixels, tmp_path):
    """Repositories as the Hub's cache keeps them, with two revisions each."""
    for repository, sources in (
        ("org/clip", {"main": "CLIPModel", "v1": "CLIPVisionModel"}),
        ("org/llm", {"main": "LlamaModel", "v2": "BertModel"}),
    ):
        cache = tmp_path / f"models--{repository.replace('/', '--')}"
        for revision, source in sources.items():
            commit = f"{sum(map(ord, source)):040x}"
            (cache / "refs").mkdir(parents=True, exist_ok=True)
            (cache / "refs" / revision).write_text(commit)
            (cache / "snapshots").mkdir(exist_ok=True)
            (cache / "snapshots" / commit).symlink_to(towers(source))
    for revisions, vision, text in (
        ({}, "CLIPModel", "LlamaModel"),
        ({"vision_revision": "v1"}, "CLIPVisionModel", "LlamaModel"),
        ({"text_revision": "v2"}, "CLIPModel", "BertModel"),
        ({"revision": "v1", "text_revision": "v2"}, "CLIPVisionModel", "BertModel"),
    ):
        model = MODELS["pixclip"].from_vision_text_pretrained("org/clip", "org/llm", cache_dir=tmp_path, **revisions)
        expected = MODELS["pixclip"].from_vision_text_pretrained(towers(vision), towers(text))
        for part in ("vision_model", "text_model"):
            for name, value in getattr(expected, part).state_dict().items():
                assert torch.equal(getattr(model, part).state_dict()[name], value)


def test_old_clip_checkpoints_with_position_ids(towers, tmp_path):
    """The first CLIP checkpoints of the Hub carry these buffers."""
    buffers = {f"{side}_model.embeddings.position_ids": torch.arange(5)[None] for side in ("vision", "text")}
    folder = change(towers("CLIPModel"), tmp_path, lambda tensors: tensors.update(buffers))
    MODELS["pixclip"].from_vision_text_pretrained(folder, folder)


IMAGE_PROCESSORS = {
    "CLIPModel": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    ),
    "SiglipModel": lambda: transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "Siglip2": lambda: transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2),
}


@pytest.fixture
def pair(towers, tiny_tokenizer, tmp_path):
    """Folders of a vision and a text source with weights and what their processors need."""

    def folders(vision, text, max_length=None):
        IMAGE_PROCESSORS[vision]().save_pretrained(towers(vision))
        tiny_tokenizer.model_max_length = max_length or int(1e30)
        tiny_tokenizer.pad_token = None
        tiny_tokenizer.save_pretrained(towers(text))
        return towers(vision), towers(text)

    return folders


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("vision", IMAGE_PROCESSORS)
def test_model_and_processor(vision, family, pair, tmp_path):
    folders = pair(vision, "LlamaModel")
    processor = PROCESSORS[family].from_vision_text_pretrained(*folders)
    assert type(processor) is PROCESSORS[family]
    image_processor, source = processor.image_processor, IMAGE_PROCESSORS[vision]()
    assert dict(image_processor.size) == {"height": 32, "width": 32}
    for name in ("resample", "image_mean", "image_std", "rescale_factor", "do_normalize"):
        assert getattr(image_processor, name) == getattr(source, name)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "<eos>"
    assert processor.tokenizer.model_max_length == 64
    # Of a square image transformers' processors cut nothing off either.
    square = Image.linear_gradient("L").resize((40, 40)).convert("RGB")
    found, expected = processor(images=square)["pixel_values"], source(square, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    image = square.resize((48, 40))
    inputs = processor(images=image, text=["a", "a longer text" * 9], boxes=[[4, 5, 30, 20]])
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["input_ids"].shape == (2, 64)
    model = MODELS[family].from_vision_text_pretrained(*folders)
    assert model(**inputs).logits_per_region.shape == (1, 1, 2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "both")
    again = PROCESSORS[family].from_pretrained(tmp_path / "both")
    assert again(images=image, text="a")["pixel_values"].equal(inputs["pixel_values"])
    assert again.tokenizer.model_max_length == 64


@pytest.mark.parametrize("family", MODELS)
def test_model_and_processor_of_other_sizes(family, pair):
    """A tokenizer that cuts at the tower's own length must not cut where the tower was stretched."""
    folders = pair("CLIPModel", "CLIPTextModel", max_length=64)
    sizes = {"image_size": 48, "max_position_embeddings": 150}
    model = MODELS[family].from_vision_text_pretrained(*folders, **sizes)
    processor = PROCESSORS[family].from_vision_text_pretrained(*folders, **sizes)
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    inputs = processor(images=image, text="a text " * 30, boxes=[[4, 5, 30, 20]])
    assert inputs["pixel_values"].shape == (1, 3, 48, 48) and inputs["input_ids"].shape == (1, 150)
    assert model(**inputs).logits_per_region.shape == (1, 1, 1)


def test_processor_of_the_wrong_checkpoint(towers):
    with pytest.raises(ValueError, match="one image size, got .*a 'llama' tower"):
        PROCESSORS["cloc"].from_vision_text_pretrained(towers("LlamaModel"), towers("LlamaModel"))


@pytest.mark.parametrize(
    ("kind", "sizes", "limit"),
    [
        ("roberta", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("xlm-roberta", {"max_position_embeddings": 40, "pad_token_id": 3}, 36),
        ("mpnet", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("bert", {"max_position_embeddings": 40, "pad_token_id": 1}, 40),
        ("opt", {"max_position_embeddings": 40, "pad_token_id": 1, "ffn_dim": 48, "word_embed_proj_dim": 24}, 40),
    ],
)
def test_token_limits_of_towers_that_count_positions_behind_their_padding(kind, sizes, limit, towers, tmp_path):
    """Long texts are cut to what the tower has positions for, and no token fewer."""
    from conftest import build_tokenizer

    config = transformers.AutoConfig.for_model(kind, **{**TEXT, **sizes})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "text")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "text")
    transformers.CLIPImageProcessor().save_pretrained(towers("CLIPModel"))
    names = towers("CLIPModel"), str(tmp_path / "text")
    processor = pixclip_hf.PixCLIPProcessor.from_vision_text_pretrained(*names)
    assert processor.tokenizer.model_max_length == limit
    model = pixclip_hf.PixCLIPModel.from_vision_text_pretrained(*names, text_pooling="mean")
    inputs = processor(text=["x" * 100, "short"], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, limit)
    # The tokenizer's padding is not the tower's, which counts by its own.
    inputs["input_ids"][inputs["attention_mask"] == 0] = config.pad_token_id
    assert model.get_text_features(**inputs).pooler_output.isfinite().all()
    if limit < 40:
        longer = torch.full((1, limit + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model.get_text_features(input_ids=longer)


def test_a_language_model_with_code_of_its_own_is_announced(towers, tmp_path):
    """Its code is not run, and nothing says whether it is causal: what to set is said."""
    from shutil import copytree

    folder = Path(copytree(towers("LlamaModel"), tmp_path / "own"))
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "modeling_own.py").write_text("raise RuntimeError('this ran')\n")

    def warnings(load):
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        library = logging.getLogger("pixclip_hf")
        library.addHandler(handler)
        try:
            load()
        finally:
            library.removeHandler(handler)
        return [message for message in messages if "code of its own" in message]

    make, vision = pixclip_hf.PixCLIPModel.from_vision_text_pretrained, towers("CLIPModel")
    (message,) = warnings(lambda: make(vision, str(folder)))
    assert "modeling_own.OwnModel" in message and "causal" in message and "`bidirectional=True`" in message
    for options in ({"bidirectional": True}, {"bidirectional": False}):
        assert not warnings(lambda options=options: make(vision, str(folder), **options))
    assert not warnings(lambda: make(vision, towers("LlamaModel")))
    assert len(warnings(lambda: load_text_model(str(folder)))) == 1
    assert not warnings(lambda: load_text_model(str(folder), bidirectional=True))
