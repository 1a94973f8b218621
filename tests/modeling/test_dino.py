"""DINO and ViT towers: tokens read in their places, positions of another size, and everything a new tower must do."""

import json

import pytest
import torch
import transformers
from builders import MODELS, build_batch, build_config, region_key
from test_towers import folders, upstream_image_features  # noqa: F401 - a fixture
from torch import nn
from towers import IMAGES, SIZES, TEXT, VISION, WIDTHS, build
from transformers import AutoModel

import pixclip_hf
from pixclip_hf.modeling.modeling_vision import MaskedPatchConv

NAMES = [name for name in VISION if name.startswith(("DINO", "ViT"))]
REGISTERS = {name: VISION[name][1].get("num_register_tokens", 0) for name in NAMES}
both = pytest.mark.parametrize("family", MODELS)
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def make(folders):  # noqa: F811
    def model(family, name, **changes):
        options = {"text_pooling": TEXT["Llama"][2], "text_projection": "linear", **changes}
        return MODELS[family].from_vision_text_pretrained(folders("vision", name), folders("text", "Llama"), **options)

    return model


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@every
def test_patch_tokens_are_those_of_the_patches(name, make, folders, pixels):  # noqa: F811
    model = make("cloc", name)
    tokens = AutoModel.from_pretrained(folders("vision", name))(pixels).last_hidden_state
    assert tokens.shape[1] == 1 + REGISTERS[name] + 16
    found = model.vision_adapter.patch_tokens(tokens, (4, 4))
    assert torch.equal(found, tokens[:, 1 + REGISTERS[name] :])


@torch.no_grad()
@every
def test_pooled_regions_are_means_of_their_patches(name, make, folders, pixels):  # noqa: F811
    model = make("pixclip", name)
    tokens = AutoModel.from_pretrained(folders("vision", name))(pixels).last_hidden_state[:, 1 + REGISTERS[name] :]
    masks = torch.zeros(2, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :8, :16] = True
    masks[:, 1] = True
    found = model.get_region_features(pixels, masks, mode="pooled").pooler_output
    expected = torch.stack([tokens[:, :2].mean(1), tokens.mean(1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@both
@every
@pytest.mark.parametrize("size", (48, 16))
def test_another_image_size(size, name, family, make, folders):  # noqa: F811
    """Built for it, or asked on the fly: both are upstream's own interpolation."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    source = AutoModel.from_pretrained(folders("vision", name))
    options = {"interpolate_pos_encoding": True} if name == "ViT" else {}
    outputs = source(pixels, **options)
    expected = outputs.last_hidden_state[:, 0]
    built = make(family, name, image_size=size)
    assert built.config.vision_config.image_size == size
    torch.testing.assert_close(built.get_image_features(pixels).pooler_output, expected, atol=1e-5, rtol=1e-5)
    found = make(family, name).get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(found, expected)


@both
@every
def test_trains_saves_and_loads(name, family, make, tmp_path):
    model = make(family, name).train()
    batch = build_batch(family, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**batch).loss.backward()
    # The token for masked image modeling has no part in it.
    unused = {key for key, value in model.named_parameters() if value.grad is None}
    assert unused <= {"vision_model.embeddings.mask_token"}
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    regions = batch["pixel_values"], batch[region_key(family)], batch["region_attention_mask"]
    with torch.no_grad():
        found, expected = again(*regions), model(*regions)
    assert torch.equal(found.region_embeds, expected.region_embeds)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    if family == "pixclip":
        (conv,) = (module for module in again.modules() if isinstance(module, MaskedPatchConv))
        assert conv.mask_weight.any()
        empty = torch.zeros_like(batch["region_masks"])
        with torch.no_grad():
            other = again(batch["pixel_values"], empty, batch["region_attention_mask"])
        assert (other.region_embeds - found.region_embeds).abs().max() > 1e-4
    whole = {key: value.clone() for key, value in state.items()}
    vision_model = getattr(pixclip_hf, f"{type(model).__name__.removesuffix('Model')}VisionModel")
    part = vision_model.from_pretrained(tmp_path).state_dict()
    assert part and all(torch.equal(value, whole[key]) for key, value in part.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ("ViTModel", "ViTForImageClassification"))
def test_vit_checkpoints_with_and_without_a_pooling_layer(kind, folders, pixels, tmp_path):  # noqa: F811
    source = getattr(transformers, kind)(transformers.ViTConfig(**IMAGES, **WIDTHS)).eval()
    source.save_pretrained(tmp_path)
    model = MODELS["pixclip"].from_vision_text_pretrained(str(tmp_path), folders("text", "Llama"))
    tower = getattr(source, "vit", source)
    assert torch.equal(model.get_image_features(pixels).pooler_output, tower(pixels).last_hidden_state[:, 0])
    assert not any("pooler" in name for name in model.state_dict())


def test_classifiers_of_dino_leave_their_head_behind(folders, pixels, tmp_path):  # noqa: F811
    config = transformers.Dinov2Config(**IMAGES, **SIZES)
    source = transformers.Dinov2ForImageClassification(config).eval()
    source.save_pretrained(tmp_path)
    model = MODELS["cloc"].from_vision_text_pretrained(str(tmp_path), folders("text", "Llama"))
    with torch.no_grad():
        expected = source.dinov2(pixels).pooler_output
        assert torch.equal(model.get_image_features(pixels).pooler_output, expected)


def test_towers_without_a_square_grid_are_refused(folders, tmp_path):  # noqa: F811
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    transformers.DINOv3ConvNextModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`vision` must name a CLIP, SigLIP, .* got .* a 'dinov3_convnext' checkpoint"
    ):
        MODELS["cloc"].from_vision_text_pretrained(str(tmp_path), folders("text", "Llama"))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("DINOv2", "BitImageProcessor", {"size": {"shortest_edge": 40}, "resample": 3, **IMAGENET}),
        (
            "DINOv3 (ViT)",
            "DINOv3ViTImageProcessorFast",
            {**SQUARE, "resample": 2, **IMAGENET},
        ),
        ("ViT", "ViTImageProcessor", {**SQUARE, "image_mean": [0.5] * 3}),
    ],
)
def test_processors(name, kind, settings, tiny_tokenizer, tmp_path):
    """The square that the tower takes, normalized as its own processor does it; no torchvision is needed."""
    vision, text = tmp_path / "vision", tmp_path / "text"
    build("vision", name).save_pretrained(vision)
    (vision / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **settings}))
    build("text", "Llama").save_pretrained(text)
    tiny_tokenizer.save_pretrained(text)
    processor = pixclip_hf.PixCLIPProcessor.from_vision_text_pretrained(str(vision), str(text))
    image_processor = processor.image_processor
    assert dict(image_processor.size) == {"height": 32, "width": 32}
    assert list(image_processor.image_mean) == settings["image_mean"]
    if "resample" in settings:
        assert image_processor.resample == settings["resample"]


def test_a_processor_that_cannot_be_built_and_says_nothing(tiny_tokenizer, tmp_path):
    build("vision", "DINOv3 (ViT)").save_pretrained(tmp_path)
    content = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision builds it")
    with pytest.raises(ValueError, match="cannot be built here.*does not say image_mean, image_std, resample"):
        pixclip_hf.PixCLIPProcessor.from_vision_text_pretrained(str(tmp_path), str(tmp_path))


def test_the_mask_branch_of_a_new_tower_is_part_of_its_patch_embedding():
    config = build_config("pixclip", vision_config={"model_type": "dinov2", **VISION["DINOv2"][1]})
    model = MODELS["pixclip"](config)
    tower = model.vision_model
    assert isinstance(tower.embeddings.patch_embeddings.projection, MaskedPatchConv)
    assert not tower.embeddings.patch_embeddings.projection.mask_weight.any()
    assert isinstance(tower.embeddings.patch_embeddings.projection, nn.Conv2d)
