"""Mask sensitivity: the changes of a mask, and models that do and do not look at it."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.tasks.mask_sensitivity import inverted, measure_sensitivity, moved, shrunk, whole
from pixclip_hf.scenes.dataset import make_scene

CHANGES = {"moved", "shrunk", "inverted", "whole"}


def rectangle(top, left, bottom, right, shape=(20, 30)):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_changes_of_a_mask():
    mask = rectangle(2, 3, 8, 13)
    assert np.array_equal(moved(mask), rectangle(14, 20, 20, 30))
    assert np.array_equal(moved(rectangle(14, 3, 20, 13)), rectangle(0, 20, 6, 30))
    assert np.array_equal(moved(rectangle(0, 20, 20, 30)), rectangle(0, 0, 20, 10))
    # Its form stays, also where half of the image away it would lie across the border.
    form = rectangle(8, 10, 14, 18)
    form[8:11, 10:14] = False
    assert moved(form).sum() == form.sum() and np.array_equal(moved(form)[0:6, 22:30], form[8:14, 10:18])
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
    assert "has no effect: no change of it moves the embeddings by more than 0.001 in cosine on average" in " ".join(
        result.notes
    )
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


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_prompts_at_the_border_move_whole(family, request):
    """Of three regions one fills the image; a box keeps its size to fractions of a pixel."""
    cached = encoder(request.getfixturevalue(f"tiny_{family}"))
    boxes = [[0.5, 0.25, 10.0, 8.0], [20.0, 12.0, 32.0, 31.75], [0.0, 0.0, 32.0, 32.0]]
    regions = [{"box": box, "mask": None, "category": name} for box, name in zip(boxes, "abc", strict=True)]
    seen, embed = {}, cached.encode_records

    def watch(records, name):
        seen[name] = [region["box"] for record in records for region in record["regions"]]
        return embed(records, name=name)

    cached.encode_records = watch
    data = Images("one", [{"image": Image.new("RGB", (32, 32), (9, 90, 200)), "regions": regions}])
    result = measure_sensitivity(cached, data, resamples=3)
    assert seen["moved regions"] == [[22.5, 24.25, 32, 32], [0, 0, 12, 19.75]]
    assert result.left_out == {"regions that cannot be moved": 1}
    assert len(seen["shrunk regions"]) == result.metrics["region_count"] == 3
    assert result.protocol == "texts: category" and result.intervals.keys() == {
        name for name in result.metrics if name.endswith(("_cosine", "_changed")) and "regions" not in name
    }


def test_no_more_regions_than_asked_for(tiny_cloc, scenes):
    assert measure_sensitivity(encoder(tiny_cloc), scenes, most=5).metrics["region_count"] == 5
    with pytest.raises(ValueError, match="scenes has no region"):
        measure_sensitivity(encoder(tiny_cloc), Images("scenes", []))
