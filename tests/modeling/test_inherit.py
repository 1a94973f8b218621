"""Models and processors from existing towers: step 0 equals the CLIP that the weights came from."""

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import pixclip_hf

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
    if name.startswith("Siglip"):
        text = TEXT | {"hidden_size": 32}
        return getattr(transformers, name)(transformers.SiglipConfig(vision_config=VISION, text_config=text))
    if name.startswith("Bert"):
        return getattr(transformers, name)(transformers.BertConfig(**TEXT))
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
def test_any_mask_equals_the_clip(towers, pixels):
    expected = load(towers("CLIPModel")).get_image_features(pixels).pooler_output
    model = MODELS["pixclip"].from_vision_text_pretrained(towers("CLIPModel"), towers("LlamaModel"))
    masks = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    masks[:, 0] = False
    found = model.get_region_features(pixels, masks).pooler_output
    # One pass a region: the same rows in a batch of another size may round otherwise, so each is its own reference.
    repeated = load(towers("CLIPModel")).get_image_features(pixels.repeat_interleave(3, 0)).pooler_output
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
    ("text", "pooling"), [("CLIPTextModel", "eos"), ("BertModel", "cls"), ("LlamaModel", "last"), ("CLIPModel", "eos")]
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
@pytest.mark.parametrize("text", ("LlamaForCausalLM", "BertForMaskedLM", "BertForPreTraining"))
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
    """A copy of a checkpoint whose tensors are edited."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    tensors = load_file(f"{folder}/model.safetensors")
    edit(tensors)
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
        ("vision", "CLIPVisionModelWithProjection", lambda t: None, r"left over \['visual_projection\.weight'\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit(side, source, edit, message, family, towers, tmp_path):
    folders = {"vision": towers("CLIPModel"), "text": towers("CLIPTextModel")}
    folders[side] = change(towers(source), tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        MODELS[family].from_vision_text_pretrained(**folders)


def test_towers_of_the_wrong_side(towers):
    with pytest.raises(ValueError, match="`vision_config.image_size` must be an int"):
        MODELS["cloc"].from_vision_text_pretrained(towers("LlamaModel"), towers("CLIPModel"))


def test_old_clip_checkpoints_with_position_ids(towers, tmp_path):
    """The first CLIP checkpoints of the Hub carry these buffers."""
    buffers = {f"{side}_model.embeddings.position_ids": torch.arange(5)[None] for side in ("vision", "text")}
    folder = change(towers("CLIPModel"), tmp_path, lambda tensors: tensors.update(buffers))
    MODELS["pixclip"].from_vision_text_pretrained(folder, folder)


@pytest.mark.parametrize("family", MODELS)
def test_processor(family, towers, tiny_tokenizer, tmp_path):
    source = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], resample=2
    )
    source.save_pretrained(tmp_path / "vision")
    transformers.AutoConfig.from_pretrained(towers("CLIPModel")).save_pretrained(tmp_path / "vision")
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tmp_path / "text")
    processor = PROCESSORS[family].from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))
    assert type(processor) is PROCESSORS[family]
    image_processor = processor.image_processor
    assert dict(image_processor.size) == {"height": 32, "width": 32}
    assert list(image_processor.image_mean) == [0.1, 0.2, 0.3] and image_processor.resample == 2
    assert list(image_processor.image_std) == list(source.image_std)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "<eos>"
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    inputs = processor(images=image, text=["a", "a longer text"], boxes=[[4, 5, 30, 20]])
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    model = MODELS[family].from_vision_text_pretrained(towers("CLIPModel"), towers("LlamaModel"))
    assert model(**inputs).logits_per_region.shape == (1, 1, 2)
    processor.save_pretrained(tmp_path / "both")
    again = PROCESSORS[family].from_pretrained(tmp_path / "both")
    assert again(images=image, text="a")["pixel_values"].equal(inputs["pixel_values"])
