"""Images of another size than the tower's: processor, patch grid, masks and boxes agree."""

import pytest
import torch
from builders import FAMILIES, VISION_KINDS, build_model
from conftest import build_tokenizer
from transformers import pipeline

import pixclip_hf

PROCESSORS = {"cloc": pixclip_hf.CLOCProcessor, "pixclip": pixclip_hf.PixCLIPProcessor}
# 5 x 8 patches of 8; the image itself is three times as large.
SIZE = {"height": 40, "width": 64}
IMAGE = torch.randint(0, 256, (120, 192, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
# The patches of rows 1 to 2 and columns 3 to 6.
BOX, INSIDE = [3 * 24, 1 * 24, 7 * 24, 3 * 24], [row * 8 + column for row in (1, 2) for column in (3, 4, 5, 6)]


def build(family, vision):
    changes = {"region_readout": "image_head"} if family == "cloc" else {}
    image_processor = pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    return build_model(family, vision, **changes), PROCESSORS[family](image_processor, build_tokenizer())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", VISION_KINDS)
def test_regions_lie_on_their_patches(vision, family):
    """Regions that cover whole patches, against the tower's tokens of these patches."""
    model, processor = build(family, vision)
    mask = torch.zeros(120, 192)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    options = {"mode": "pooled"} if family == "pixclip" else {}
    found = []
    for regions in ({"boxes": [BOX]}, {"masks": [mask]}):
        inputs = processor(images=IMAGE, size=SIZE, **regions)
        assert inputs["pixel_values"].shape == (1, 3, 40, 64)
        found.append(model.get_region_features(**inputs, interpolate_pos_encoding=True, **options).pooler_output[0, 0])
    pixels = inputs["pixel_values"]
    if family == "pixclip":
        scaled = (1 - model.config.mask_mean) / model.config.mask_std
        pixels = torch.cat([pixels, torch.full_like(pixels[:, :1], scaled)], dim=1)
    tower = model.vision_model
    tokens = tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[0, -40:][INSIDE]
    if vision == "siglip":
        pooled = tower.head(tokens.mean(0)[None, None])[0]
    elif vision == "clip":
        pooled = tower.post_layernorm(tokens).mean(0)
    else:
        adapter = model.vision_adapter
        pooled = adapter.pool_regions(tower, tokens[None], torch.ones(1, 1, len(INSIDE)))[0, 0]
    for one in found:
        torch.testing.assert_close(one, model.visual_projection(pooled), atol=1e-5, rtol=1e-4)
    assert (
        found[0] - model.get_image_features(inputs["pixel_values"], interpolate_pos_encoding=True).pooler_output
    ).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", VISION_KINDS)
def test_pipelines_take_a_size(vision, family):
    model, processor = build(family, vision)
    extract = pipeline("region-feature-extraction", model=model, processor=processor)
    found = extract([IMAGE, IMAGE], boxes=[[BOX], []], size=SIZE, batch_size=2, return_tensors=True, normalize=False)
    inputs = processor(images=IMAGE, boxes=[BOX], size=SIZE)
    expected = model.get_region_features(**inputs, interpolate_pos_encoding=True).pooler_output[0]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    assert found[1].shape == (0, 16)
    own = extract(IMAGE, boxes=[BOX], return_tensors=True, normalize=False)
    assert (own - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_that_are_no_multiples_of_the_patches(family):
    model, processor = build(family, "clip")
    inputs = processor(images=IMAGE, boxes=[BOX], size={"height": 40, "width": 60})
    with pytest.raises(ValueError, match=r"multiples of the patch size 8, got \(40, 60\)"):
        model.get_region_features(**inputs, interpolate_pos_encoding=True)
