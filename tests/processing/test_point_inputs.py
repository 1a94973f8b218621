"""Points in a processor call: nesting, geometry, points among boxes and masks, and bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

IMAGE = Image.new("RGB", (64, 48), (10, 20, 30))
POINTS = [[[16, 12]], [[32, 24], [48, 36]]]
LABELS = [[1], [1, 0]]
BOX = [8, 6, 40, 30]


@pytest.fixture(scope="module")
def process():
    from conftest import build_tiny

    import pixclip_hf

    return build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor)[1]


def mask(box=(0, 0, 20, 10)):
    pixels = np.zeros((48, 64), dtype=bool)
    pixels[box[1] : box[3], box[0] : box[2]] = True
    return pixels


def test_points_of_one_image(process):
    batch = process(images=IMAGE, points=POINTS, point_labels=LABELS, return_regions=True, region_text=["a", "b"])
    assert batch["region_points"].dtype == torch.float32 and batch["region_point_labels"].dtype == torch.int64
    wanted = torch.tensor([[[[0.25, 0.25], [0, 0]], [[0.5, 0.5], [0.75, 0.75]]]])
    assert torch.equal(batch["region_points"], wanted)
    assert batch["region_point_labels"].tolist() == [[[1, -1], [1, 0]]]
    assert batch["region_attention_mask"].tolist() == [[1, 1]] and batch["region_input_ids"].shape[:2] == (1, 2)
    assert batch["regions"] == [[
        {"points": [[16.0, 12.0]], "point_labels": [1]},
        {"points": [[32.0, 24.0], [48.0, 36.0]], "point_labels": [1, 0]},
    ]]  # fmt: skip
    assert not {"region_boxes", "region_masks"} & set(batch)
    plain = process(images=IMAGE, points=POINTS)
    assert plain["region_point_labels"].tolist() == [[[1, -1], [1, 1]]]
    shares = process(images=IMAGE, points=[[[0.25, 0.25]], [[0.5, 0.5], [0.75, 0.75]]], normalized=True)
    assert torch.equal(shares["region_points"], wanted)


def test_points_of_several_images(process):
    batch = process(images=[IMAGE, IMAGE, IMAGE], points=[POINTS, [], np.array([[[64, 48]]])])
    assert batch["region_points"].shape == (3, 2, 2, 2)
    assert batch["region_attention_mask"].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert batch["region_point_labels"][1:].flatten().tolist() == [-1] * 4 + [1] + [-1] * 3
    assert batch["region_points"][2, 0, 0].tolist() == [1, 1]
    nested = process(images=[[IMAGE], [IMAGE, IMAGE]], points=[[POINTS], [[], [[[64, 48]]]]])
    assert all(torch.equal(nested[name], batch[name]) for name in batch)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_points_among_boxes_or_masks(process, kind):
    value, name = (BOX, "region_boxes") if kind == "boxes" else (mask(), "region_masks")
    mixed = process(images=IMAGE, points=[None, POINTS[1]], point_labels=[None, [1, 0]], **{kind: [value, None]})
    assert torch.equal(mixed[name][:, :1], process(images=IMAGE, **{kind: [value]})[name])
    assert not mixed[name][0, 1].any()
    assert mixed["region_point_labels"].tolist() == [[[-1, -1], [1, 0]]]
    assert torch.equal(mixed["region_points"][:, 1], process(images=IMAGE, points=POINTS)["region_points"][:, 1])
    assert mixed["region_attention_mask"].tolist() == [[1, 1]]
    described = process(images=IMAGE, points=[None, POINTS[1]], **{kind: [value, None]}, return_regions=True)[
        "regions"
    ]
    assert set(described[0][0]) == {"box", "mask_area"} and set(described[0][1]) == {"points", "point_labels"}
    # An image of points beside one of boxes.
    batch = process(images=[IMAGE, IMAGE], points=[None, POINTS], **{kind: [[value, value], None]})
    assert batch["region_point_labels"].tolist() == [[[-1, -1], [-1, -1]], [[1, -1], [1, 1]]]
    assert batch[name][0].any() and not batch[name][1].any()


def test_what_prompts_is_said_where_a_region_has_both(process):
    given = {"images": IMAGE, "points": POINTS, "boxes": [BOX, BOX]}
    with pytest.raises(ValueError, match=r"points\[0\] has a box or a mask too: prompt must say which"):
        process(**given)
    by_box = process(**given, prompt="box")
    assert torch.equal(by_box["region_boxes"], process(images=IMAGE, boxes=[BOX, BOX])["region_boxes"])
    assert "region_points" not in by_box
    by_point = process(**given, prompt="point")
    assert torch.equal(by_point["region_points"], process(images=IMAGE, points=POINTS)["region_points"])
    # The boxes go along, for a loss.
    assert torch.equal(by_point["region_boxes"], by_box["region_boxes"])
    some = process(images=IMAGE, points=[POINTS[0], None], boxes=[BOX, BOX], prompt="mask")
    assert "region_points" not in some and some["region_masks"].any((2, 3)).all()


BAD = [
    (
        {"points": [[[16, 49]]]},
        r"points\[0\]\[0\] must lie in its image of width 64 and height 48, got \[16.0, 49.0\]",
    ),
    ({"points": [[[16, 12]], [[3, 4], [-1, 2]]]}, r"points\[1\]\[1\] must lie in its image"),
    ({"points": [[[float("nan"), 1]]]}, r"points\[0\]\[0\] must lie in its image"),
    ({"points": [[[1.5, 0.2]]], "normalized": True}, r"points\[0\]\[0\] must lie in \[0, 1\] with normalized=True"),
    ({"points": [[[0.5, 0.5]]]}, r"points\[0\] holds no value above 1, so it looks like fractions"),
    ({"points": [[16, 12]]}, r"points\[0\] must hold the points of a region, shape \(P, 2\)"),
    ({"points": [[[1, 2, 3]]]}, r"points\[0\] must hold the points of a region"),
    ({"points": [[["a", 2]]]}, r"points\[0\] must be a list of points \[x, y\]"),
    ({"points": [[]]}, r"points\[0\] must hold the points of a region, shape \(P, 2\) with at least one"),
    ({"points": torch.ones(1, 1, 2, device="meta")}, r"points\[0\] must be a list of points \[x, y\]"),
    ({"points": POINTS, "point_labels": [[1], [1, 1j]]}, r"point_labels\[1\] must be a list of labels"),
    ({"points": np.array(3)}, "points must be a list with the points of each region, got ndarray"),
    ({"points": 3}, "points must be a list with the points of each region, got int"),
    ({"points": [None]}, r"points\[0\] must hold points, or a box or a mask must be given for that region, got None"),
    ({"points": POINTS, "point_labels": [[1], [1, 2]]}, r"point_labels\[1\]\[1\] must be 1 .* or 0 .*, got 2"),
    ({"points": POINTS, "point_labels": [[1], [1, -1]]}, r"point_labels\[1\]\[1\] must be 1 .* or 0 .*, got -1"),
    ({"points": POINTS, "point_labels": [[1], [1]]}, r"point_labels\[1\] must hold one label for each of 2 points"),
    ({"points": POINTS, "point_labels": [[1]]}, r"point_labels must hold labels for each of the 2 regions"),
    ({"points": POINTS, "point_labels": [[0], [1, 0]]}, r"point_labels\[0\] must hold a positive point"),
    ({"point_labels": LABELS, "boxes": [BOX]}, "point_labels needs points"),
    ({"points": POINTS, "masks": [mask()]}, r"points and masks must match: got \[2\] regions with points and \[1\]"),
    ({"points": POINTS, "boxes": [BOX] * 3}, r"points and boxes must match"),
    ({"points": [POINTS[0], None], "boxes": [BOX, BOX], "prompt": "point"}, r"points\[1\] must hold points, got None"),
    ({"points": POINTS, "prompt": "box"}, "prompt='box' needs boxes or masks, got points alone"),
    ({"boxes": [BOX], "prompt": "point"}, "prompt='point' needs points"),
    ({"points": []}, "points holds no region for any image"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_points(process, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        process(images=IMAGE, **arguments)


def test_a_point_that_a_crop_removes(process):
    crop = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    kept = process(images=IMAGE, points=[[[32, 24]]], **crop)
    assert kept["region_points"][0, 0, 0].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    with pytest.raises(
        ValueError, match=r"points\[1\]\[0\] lies in the part of its image that the center crop removes"
    ):
        process(images=IMAGE, points=[[[32, 24]], [[1, 24]]], **crop)


def test_pixclip_refuses_points_by_name(tiny_pixclip):
    with pytest.raises(ValueError, match="points must be None for a model that 'mask' prompts: make masks of them"):
        tiny_pixclip[1](images=IMAGE, points=POINTS)
