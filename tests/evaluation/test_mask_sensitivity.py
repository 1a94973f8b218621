"""Mask sensitivity: the changes of a mask, and models that do and do not look at it."""

import numpy as np
import pytest
import torch

from pixclip_hf.data.scenes import make_scene
from pixclip_hf.evaluation.cache import CachedEncoder
from pixclip_hf.evaluation.encoders import RegionEncoder
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.mask_sensitivity import inverted, measure_sensitivity, moved, shrunk, whole

CHANGES = {"moved", "shrunk", "inverted", "whole"}


def rectangle(top, left, bottom, right, shape=(20, 30)):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_changes_of_a_mask():
    mask = rectangle(2, 3, 8, 13)
    assert np.array_equal(moved(mask), rectangle(12, 18, 18, 28))
    # One pixel from each side leaves 32 of 60, a second one 12.
    assert np.array_equal(shrunk(mask), rectangle(4, 5, 6, 11))
    assert np.array_equal(inverted(mask), ~mask) and whole(mask).all()
    assert inverted(whole(mask)).all()


def test_shrinking_always_leaves_something():
    border = shrunk(whole(rectangle(0, 0, 1, 1)))
    assert 0 < border.sum() <= 300 and not border[0].any() and not border[:, 0].any()
    line = shrunk(rectangle(5, 2, 6, 12))
    assert line.sum() == 5 and rectangle(5, 2, 6, 12)[line].all()
    assert shrunk(rectangle(5, 5, 6, 6)).sum() == 1


@pytest.fixture
def scenes():
    return Images("scenes", [make_scene(index, "test", size=32) for index in range(4)], split="test")


def encoder(parts):
    return CachedEncoder(RegionEncoder(*parts), progress=False)


def test_a_model_that_does_not_look_at_its_mask_is_told(tiny_pixclip, scenes):
    model, _ = tiny_pixclip
    with torch.no_grad():
        model.vision_model.get_input_embeddings().mask_weight.zero_()
    result = measure_sensitivity(encoder(tiny_pixclip), scenes)
    for change in CHANGES:
        assert result.metrics[f"{change}_distance_cosine"] == pytest.approx(0, abs=1e-5)
        assert result.metrics[f"{change}_top_text_changed"] == 0
    assert "has no effect" in result.notes[0]
    assert result.metrics["regions_distance_cosine"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_a_model_that_looks_at_its_prompt(family, request, scenes):
    parts = request.getfixturevalue(f"tiny_{family}")
    if family == "pixclip":
        with torch.no_grad():
            # Untrained attention is all but uniform: made sharp, it sees where a mask lies.
            parts[0].vision_model.embeddings.position_embedding.weight.mul_(50)
            for layer in parts[0].vision_model.encoder.layers:
                layer.self_attn.q_proj.weight.mul_(10)
    result = measure_sensitivity(encoder(parts), scenes)
    changes = CHANGES if family == "pixclip" else CHANGES - {"inverted"}
    assert {name.split("_")[0] for name in result.metrics if name.endswith("_changed")} == changes
    for change in changes:
        assert result.metrics[f"{change}_distance_cosine"] > 1e-5
        assert 0 <= result.metrics[f"{change}_top_text_changed"] <= 1
    assert result.metrics["regions_distance_cosine"] > 1e-5
    assert result.metrics["region_count"] == sum(len(scene["regions"]) for scene in scenes.records)
    assert result.notes == ["The prompt has an effect."]


def test_whole_image_by_hand(tiny_pixclip, scenes):
    model, processor = tiny_pixclip
    scene = scenes.records[0]
    result = measure_sensitivity(encoder(tiny_pixclip), Images("one", [scene]))
    masks = [region["mask"] for region in scene["regions"]]
    full = [np.ones((32, 32), dtype=bool)] * len(masks)
    with torch.no_grad():
        own = model(**processor(images=scene["image"], masks=masks)).region_embeds[0]
        other = model(**processor(images=scene["image"], masks=full)).region_embeds[0]
    expected = (1 - (own * other).sum(-1)).mean().item()
    assert result.metrics["whole_distance_cosine"] == pytest.approx(expected, abs=1e-5)


def test_no_more_regions_than_asked_for(tiny_cloc, scenes):
    assert measure_sensitivity(encoder(tiny_cloc), scenes, most=5).metrics["region_count"] == 5
    with pytest.raises(ValueError, match="scenes has no region"):
        measure_sensitivity(encoder(tiny_cloc), Images("scenes", []))
