"""Masks, boxes and RLE read in every form, and each bad one refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_codes import compressed
from PIL import Image

from pixclip_hf.processing.processing_regions import (
    box_mask,
    decode_rle,
    encode_rle,
    mask_box,
    polygon_mask,
    read_boxes,
    read_mask,
    read_regions,
)

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "regions-train"


def runs_of(mask):
    """Column-major run lengths, starting with zeros, one pixel at a time."""
    runs, current = [0], False
    for value in mask.T.ravel():
        if bool(value) != current:
            runs.append(0)
            current = bool(value)
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (13, 21), (90, 70)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_rle_equals_cocos_coding(size, share):
    mask = np.random.default_rng(3).random(size) < share
    runs = runs_of(mask)
    assert encode_rle(mask) == {"size": list(size), "counts": compressed(runs)}
    for counts in (compressed(runs), compressed(runs).encode(), runs):
        assert np.array_equal(decode_rle({"size": size, "counts": counts}), mask)


def test_rle_of_long_runs():
    mask = np.zeros((1500, 2000), dtype=bool)
    mask[100:1300, 50:1950] = True
    rle = encode_rle(mask)
    assert rle["counts"] == compressed(runs_of(mask))
    assert np.array_equal(decode_rle(rle), mask)


def test_rle_known_string():
    # A 2 x 3 mask, columns (0, 1), (1, 1), (0, 0): runs 1, 3, 2.
    assert encode_rle(np.array([[0, 1, 0], [1, 1, 0]])) == {"size": [2, 3], "counts": "132"}


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3]}, "counts"),
        ({"size": [2, 3], "counts": [1, 3, 3]}, "add up to 2 x 3"),
        ({"size": [2, 3], "counts": [7, -1]}, "add up"),
        ({"size": [2, 0], "counts": [0]}, "positive"),
        ({"size": 5, "counts": [5]}, "height, width"),
        ({"size": [2, 3], "counts": "1~"}, "run-length string"),
        ({"size": [2, 3], "counts": "1R"}, "run-length string"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "integers"),
    ],
)
def test_bad_rle(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


@pytest.mark.parametrize("seed", range(5))
def test_polygons_are_those_of_coco(seed):
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    # Self-crossing, partly beyond the image; the second ring has whole and half coordinates, on pixel centers.
    rings = [rng.uniform(-5, 30, 14).tolist(), (rng.integers(0, 40, 8) / 2).tolist()]
    expected = coco.decode(coco.merge(coco.frPyObjects(rings, 18, 25)))
    assert expected.any() and np.array_equal(polygon_mask(rings, (18, 25)), expected)


def test_polygon_takes_the_pixels_whose_center_is_inside():
    assert np.argwhere(polygon_mask([[1, 1, 3, 1, 3, 2, 1, 2]], (5, 6))).tolist() == [[1, 1], [1, 2]]
    # On a left or upper edge a center is outside, on a right or lower one inside.
    assert np.argwhere(polygon_mask([[1.5, 0.5, 3.5, 0.5, 3.5, 1.5, 1.5, 1.5]], (5, 6))).tolist() == [[1, 2], [1, 3]]
    triangle = polygon_mask([[0, 0, 6, 0, 0, 6]], (6, 6))
    assert np.array_equal(triangle, np.add.outer(np.arange(6), np.arange(6)) < 5)


def test_polygon_too_thin_for_a_center_keeps_a_pixel():
    mask = polygon_mask([[3.1, 4.1, 3.3, 4.1, 3.2, 4.3]], (9, 9))
    assert np.argwhere(mask).tolist() == [[4, 3]]


SIZE = (12, 17)
REGION = np.zeros(SIZE, dtype=bool)
REGION[2:7, 3:11] = True
REGION[6:9, 3:5] = True


@pytest.mark.parametrize(
    "mask",
    [
        REGION,
        REGION.astype(np.uint8),
        REGION.astype(np.uint8) * 255,
        REGION.astype(np.int64),
        REGION.astype(np.int32) * 255,
        REGION.astype(np.float64),
        REGION.astype(np.float32) * 0.2 + 0.4,
        torch.from_numpy(REGION),
        torch.from_numpy(REGION).to(torch.uint8),
        torch.from_numpy(REGION).to(torch.bfloat16),
        Image.fromarray(REGION),
        Image.fromarray(REGION.astype(np.uint8)),
        Image.fromarray(REGION.astype(np.uint8) * 255),
        Image.fromarray(REGION.astype(np.uint8)).convert("P"),
        encode_rle(REGION),
        {"size": list(SIZE), "counts": runs_of(REGION)},
        [[3, 2, 11, 2, 11, 7, 3, 7], [3, 6, 5, 6, 5, 9, 3, 9]],
        np.asfortranarray(REGION),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_every_mask_form_reads_alike(mask):
    assert np.array_equal(read_mask(mask, SIZE, "masks[0]") != 0, REGION)


def test_float_masks_are_cut_at_a_half():
    mask = np.full(SIZE, 0.49)
    mask[1, 2] = 0.5
    assert np.argwhere(read_mask(mask, SIZE, "masks[0]")).tolist() == [[1, 2]]


def changed(value, dtype=np.float32):
    mask = REGION.astype(dtype)
    mask[0, 0] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((12, 16)), ValueError, r"\(12, 16\).*image has \(12, 17\)"),
        (encode_rle(np.ones((3, 3))), ValueError, r"\(3, 3\)"),
        (np.zeros(SIZE), ValueError, "empty"),
        (np.zeros(SIZE, dtype=np.uint8), ValueError, "empty"),
        (encode_rle(np.zeros(SIZE)), ValueError, "empty"),
        ([[20, 1, 30, 1, 30, 5]], ValueError, "empty"),
        ([], ValueError, "empty"),
        (changed(np.nan), ValueError, "nan"),
        (changed(np.inf), ValueError, "inf"),
        (changed(1.5), ValueError, "1.5"),
        (changed(-0.1), ValueError, "-0.1"),
        (changed(255.0), ValueError, "255"),
        (changed(7, np.uint8), ValueError, r"\{0, 255\}; got 7"),
        (changed(2, np.uint8) * 255, ValueError, "got 254"),
        (changed(-1, np.int64), ValueError, "got -1"),
        (changed(3, np.int64) * 255, ValueError, "got 765"),
        (np.ones((*SIZE, 3)), ValueError, r"\(H, W\)"),
        (Image.new("RGB", SIZE[::-1]), ValueError, r"\(H, W\)"),
        ([[1, 2, 3, 4]], ValueError, "three finite points"),
        ([[1, 2, 3, 4, 5, 6, 7]], ValueError, "three finite points"),
        ([[1, 2, 3, np.nan, 5, 6]], ValueError, "three finite points"),
        ([1, 2, 3, 4, 5, 6], ValueError, "flat rings"),
        ([["a", "b"]], ValueError, "flat rings"),
        ("mask.png", TypeError, "str"),
        (changed(0).astype(str), TypeError, "U"),
    ],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=rf"masks\[0\]\[1\].*{message}"):
        read_mask(mask, SIZE, "masks[0][1]")


@pytest.mark.parametrize(
    ("values", "kwargs"),
    [
        ([[2, 3, 10, 9]], {}),
        ([[2, 3, 8, 6]], {"box_format": "xywh"}),
        ([[6, 6, 8, 6]], {"box_format": "cxcywh"}),
        ([[0.1, 0.3, 0.5, 0.9]], {"normalized": True}),
        ([[0.1, 0.3, 0.4, 0.6]], {"normalized": True, "box_format": "xywh"}),
        ([[0.3, 0.6, 0.4, 0.6]], {"normalized": True, "box_format": "cxcywh"}),
    ],
)
@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_every_box_form_reads_alike(values, kwargs, form):
    read, cut = read_boxes(form(values), (10, 20), "boxes", **kwargs)
    assert read.dtype == np.float64 and cut == []
    np.testing.assert_allclose(read, [[2, 3, 10, 9]], atol=1e-5)


@pytest.mark.parametrize(
    ("box", "kwargs", "message"),
    [
        ([10, 3, 10, 9], {}, r"boxes\[0\]\[1\].*x1 > x0.*\[10.0, 3.0, 10.0, 9.0\]"),
        ([10, 9, 12, 3], {}, r"boxes\[0\]\[1\].*y1 > y0"),
        ([10, 3, -2, 4], {"box_format": "xywh"}, r"boxes\[0\]\[1\].*xywh"),
        ([20, 3, 25, 9], {}, r"boxes\[0\]\[1\].*outside its image of width 20 and height 10"),
        ([3, -8, 9, 0], {}, r"boxes\[0\]\[1\].*outside"),
        ([np.nan, 3, 10, 9], {}, r"boxes\[0\]\[1\] must be finite.*nan"),
        ([2, 3, np.inf, 9], {}, r"boxes\[0\]\[1\] must be finite.*inf"),
        ([2, 3, 10, 9], {"normalized": True}, r"boxes\[0\]\[1\].*normalized=True.*10.0"),
        ([2, 3, 10, 9], {"box_format": "yxyx"}, "box_format.*'yxyx'"),
    ],
)
def test_bad_boxes(box, kwargs, message):
    good = [0.1, 0.1, 0.2, 0.2] if kwargs.get("normalized") else [1, 1, 5, 5]
    with pytest.raises(ValueError, match=message):
        read_boxes([good, box], (10, 20), "boxes[0]", **kwargs)


@pytest.mark.parametrize("boxes", [[[1, 2, 3]], [1, 2, 3, 4], [[[1, 2, 3, 4]]], [["a", 1, 2, 3]], [[1, 2, 3, 4], [1]]])
def test_boxes_of_another_shape(boxes):
    with pytest.raises(ValueError, match=r"boxes\[2\] must .*\(R, 4\)"):
        read_boxes(boxes, (10, 20), "boxes[2]")


def test_fractions_without_normalized():
    with pytest.raises(ValueError, match=r"boxes\[0\].*normalized=True.*0.5"):
        read_boxes([[0.1, 0.1, 0.5, 0.5]], (10, 20), "boxes[0]")


def test_boxes_partly_outside_are_clipped_with_one_warning(caplog):
    boxes = [[[-5, 2, 8, 40], [1, 1, 3, 3]], [[4, 4, 20.001, 8], [15, 5, 30, 9]]]
    first, second = read_regions(None, boxes, [(10, 20), (10, 20)], True, "boxes")
    assert first.boxes.tolist() == [[0, 2, 8, 10], [1, 1, 3, 3]]
    assert second.boxes.tolist() == [[4, 4, 20, 8], [15, 5, 20, 9]]
    (record,) = caplog.records
    # Rounding (20.001) is no news.
    assert record.levelname == "WARNING" and record.message.startswith("2 boxes")
    assert "boxes[0][0], boxes[1][1]" in record.message


def test_box_mask_takes_pixel_centers():
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 3:5] = True
    assert np.array_equal(box_mask(np.array([2.6, 0.51, 5.4, 3.51]), (6, 8)), expected)
    assert np.argwhere(box_mask(np.array([2.6, 3.7, 2.9, 3.9]), (6, 8))).tolist() == [[3, 2]]
    assert np.argwhere(box_mask(np.array([7.9, 5.9, 8.0, 6.0]), (6, 8))).tolist() == [[5, 7]]


def test_mask_box_is_tight():
    assert mask_box(REGION).tolist() == [3, 2, 11, 9]


SIZES = [(12, 17), (12, 17)]


def test_counts_and_nesting():
    one_each = read_regions([[REGION], np.stack([REGION] * 3)], None, SIZES, True, "masks")
    assert [len(entry.names) for entry in one_each] == [1, 3]
    assert one_each[1].names[2] == "masks[1][2]"
    assert read_regions([REGION], None, SIZES[:1], False, "masks")[0].names == ["masks[0]"]
    ragged = read_regions(None, [None, [[1, 1, 5, 5]]], SIZES, True, "boxes")
    assert [len(entry.names) for entry in ragged] == [0, 1]
    assert read_regions(None, None, SIZES, True, "masks") is None


@pytest.mark.parametrize("use", ["masks", "boxes"])
def test_both_given(use):
    (entry,) = read_regions([REGION], [[1, 1, 5.5, 5]], SIZES[:1], False, use)
    expected = [3, 2, 11, 9] if use == "masks" else [1, 1, 5.5, 5]
    assert entry.get_boxes().tolist() == [expected]
    area = REGION.sum() if use == "masks" else 16
    assert entry.describe() == [
        {"box": dict(zip(("xmin", "ymin", "xmax", "ymax"), expected, strict=True)), "mask_area": area}
    ]


@pytest.mark.parametrize(
    ("masks", "boxes", "error", "message"),
    [
        ([[REGION]], None, ValueError, "masks.*2 images, got 1"),
        (None, [[[1, 1, 5, 5]]] * 3, ValueError, "boxes.*2 images, got 3"),
        (REGION, None, ValueError, "masks.*2 images, got 12"),
        ([REGION, [REGION]], None, ValueError, r"masks\[0\].*3 dimensions.*\(12, 17\)"),
        ([[REGION], encode_rle(REGION)], None, TypeError, r"masks\[1\].*dict"),
        ([[REGION], [REGION]], [[[1, 1, 5, 5]], []], ValueError, r"\[1, 1\] masks and \[1, 0\] boxes"),
        ([[], []], None, ValueError, "masks holds no region"),
        (None, [[], []], ValueError, "boxes holds no region"),
        ([[REGION], [REGION, REGION * 0]], None, ValueError, r"masks\[1\]\[1\] is empty"),
        (None, [[[1, 1, 5, 5]], [[1, 1, 5, 5], [5, 5, 5, 8]]], ValueError, r"boxes\[1\]\[1\].*x1 > x0"),
    ],
)
def test_counts_that_do_not_match(masks, boxes, error, message):
    with pytest.raises(error, match=message):
        read_regions(masks, boxes, SIZES, True, "masks" if masks is not None else "boxes")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no photographs with regions at {SHARED_DATA}")
def test_real_annotations_agree_with_their_areas():
    rles, ratios = 0, []
    for line in (SHARED_DATA / "regions.jsonl").read_text().splitlines():
        record = json.loads(line)
        size = (record["height"], record["width"])
        for region in record["regions"]:
            if region["segmentation"] is None:
                continue
            mask = read_mask(region["segmentation"], size, "masks[0]")
            if isinstance(region["segmentation"], dict):
                assert encode_rle(mask)["counts"] == region["segmentation"]["counts"]
                assert mask.sum() == region["area"]
                rles += 1
            elif region["area"] > 1000:
                ratios.append(mask.sum() / region["area"])
    assert rles > 0 and len(ratios) > 100
    # A few listed areas leave out what other objects cover; the polygons do not.
    assert np.mean(np.abs(np.array(ratios) - 1) < 0.03) > 0.95
