"""The affine geometry that images, masks, boxes and crops share, against pixel-by-pixel references."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from pixclip_hf.processing.image_processing_region import RegionImageProcessor
from pixclip_hf.processing.processing_geometry import crop_geometry, place_boxes, sample_masks

RESIZE = {"size": {"height": 24, "width": 24}}
CROP = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 14}}
WIDE_CROP = {"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 16, "width": 15}}
PAD = {"size": {"shortest_edge": 10}, "do_pad": True, "pad_size": {"height": 30, "width": 40}}
SIZES = [(30, 40), (41, 23), (24, 24), (7, 9)]


def placement(size, settings):
    """(resized height, width, top, left, canvas height, width) by transformers' rules."""
    height, width = size
    if "height" in settings["size"]:
        resized = (settings["size"]["height"], settings["size"]["width"])
    else:
        edge = settings["size"]["shortest_edge"]
        resized = (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))
    if settings.get("do_center_crop"):
        canvas = (settings["crop_size"]["height"], settings["crop_size"]["width"])
        return *resized, (resized[0] - canvas[0]) // 2, (resized[1] - canvas[1]) // 2, *canvas
    pad = settings.get("pad_size")
    return *resized, 0, 0, *((pad["height"], pad["width"]) if pad else resized)


def sampled_by_hand(mask, settings):
    rows, columns, top, left, height, width = placement(mask.shape, settings)
    result = np.zeros((height, width), dtype=bool)
    for i in range(height):
        for j in range(width):
            y = floor(Fraction(2 * (i + top) + 1, 2) * mask.shape[0] / rows)
            x = floor(Fraction(2 * (j + left) + 1, 2) * mask.shape[1] / columns)
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]:
                result[i, j] = mask[y, x]
    return result


@pytest.mark.parametrize("settings", [RESIZE, CROP, WIDE_CROP, PAD], ids=["resize", "crop", "wide_crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_masks_take_the_pixel_under_each_center(settings, size, order):
    (geometry,) = RegionImageProcessor(**settings).get_geometries([size])
    masks = [np.asarray(mask, order=order) for mask in np.random.default_rng(0).random((3, *size)) < 0.5]
    sampled = sample_masks(masks, geometry, ["a", "b", "c"])
    for result, mask in zip(sampled, masks, strict=True):
        assert result.any()
        assert np.array_equal(result, sampled_by_hand(mask, settings))
    assert np.array_equal(sample_masks([m.astype(np.uint8) * 255 for m in masks], geometry, ["a"] * 3), sampled)


@pytest.mark.parametrize("size", SIZES)
def test_a_single_pixel_never_vanishes(size):
    (geometry,) = RegionImageProcessor(size={"height": 4, "width": 5}).get_geometries([size])
    for y in range(size[0]):
        for x in range(size[1]):
            mask = np.zeros(size, dtype=bool)
            mask[y, x] = True
            (result,) = sample_masks([mask], geometry, ["masks[0]"])
            place = [floor(Fraction(2 * y + 1, 2) * 4 / size[0]), floor(Fraction(2 * x + 1, 2) * 5 / size[1])]
            assert np.argwhere(result).tolist() == [place]


def test_a_thin_mask_keeps_the_pixel_nearest_to_its_centroid():
    (geometry,) = RegionImageProcessor(size={"height": 4, "width": 4}).get_geometries([(40, 40)])
    mask = np.zeros((40, 40), dtype=bool)
    mask[1, 3:38] = True  # between the sampled rows 5, 15, ...; centroid at x = 20.5, which is output column 2
    assert np.argwhere(sample_masks([mask], geometry, ["masks[0]"])[0]).tolist() == [[0, 2]]


def test_regions_that_a_crop_removes_raise_by_name():
    (geometry,) = RegionImageProcessor(**CROP).get_geometries([(20, 60)])
    mask = np.zeros((20, 60), dtype=bool)
    mask[:, :15] = True
    with pytest.raises(ValueError, match=r"masks\[3\]\[1\].*center crop"):
        sample_masks([~mask, mask], geometry, ["masks[3][0]", "masks[3][1]"])
    boxes = np.array([[20.0, 5, 30, 15], [0, 0, 24, 20], [40, 0, 60, 20]])
    with pytest.raises(ValueError, match=r"boxes\[3\]\[2\].*center crop"):
        place_boxes(boxes, geometry, ["boxes[3][0]", "boxes[3][1]", "boxes[3][2]"])


@pytest.mark.parametrize("settings", [RESIZE, CROP, WIDE_CROP, PAD], ids=["resize", "crop", "wide_crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_boxes_follow_resize_crop_and_pad(settings, size):
    (geometry,) = RegionImageProcessor(**settings).get_geometries([size])
    rows, columns, top, left, height, width = placement(size, settings)
    box = np.array([0.3, 0.25, 0.75, 0.8]) * [size[1], size[0], size[1], size[0]]
    x0, y0, x1, y1 = (float(value) for value in box)
    x0, x1 = (min(max(x * columns / size[1] - left, 0), width) / width for x in (x0, x1))
    y0, y1 = (min(max(y * rows / size[0] - top, 0), height) / height for y in (y0, y1))
    placed = place_boxes(box[None], geometry, ["boxes[0]"])
    assert placed.dtype == np.float32
    np.testing.assert_allclose(placed, [[x0, y0, x1, y1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [CROP, WIDE_CROP, PAD], ids=["crop", "wide_crop", "pad"])
def test_the_whole_image_is_placed_where_it_shows(settings):
    (geometry,) = RegionImageProcessor(**settings).get_geometries([(30, 40)])
    rows, columns, top, left, height, width = placement((30, 40), settings)
    expected = [max(-left, 0), max(-top, 0), min(columns - left, width), min(rows - top, height)]
    assert geometry.visible_box.tolist() == expected


def test_box_round_trip_is_exact_to_a_thousandth_of_a_pixel():
    processor = RegionImageProcessor()
    rng = np.random.default_rng(1)
    sizes = [(427, 640), (3000, 4000), (17, 1023)]
    corners = [np.sort(rng.random((50, 2, 2)), axis=1).reshape(50, 4) for _ in sizes]
    boxes = [corner * [width, height, width, height] for corner, (height, width) in zip(corners, sizes, strict=True)]
    placed = [
        place_boxes(box, geometry, ["boxes[0]"] * 50)
        for box, geometry in zip(boxes, processor.get_geometries(sizes), strict=True)
    ]
    for back, box in zip(processor.post_process_boxes(np.stack(placed), sizes), boxes, strict=True):
        np.testing.assert_allclose(back.numpy(), box, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [CROP, WIDE_CROP, PAD], ids=["crop", "wide_crop", "pad"])
def test_box_round_trip_returns_what_the_crop_leaves(settings):
    processor = RegionImageProcessor(**settings)
    size = (36, 48)
    (geometry,) = processor.get_geometries([size])
    rows, columns, top, left, height, width = placement(size, settings)
    box = np.array([[1.5, 2.25, 40.5, 30.75]])
    (back,) = processor.post_process_boxes([place_boxes(box, geometry, ["boxes[0]"])], [size])
    lowest = [left * size[1] / columns, top * size[0] / rows]
    highest = [(left + width) * size[1] / columns, (top + height) * size[0] / rows]
    expected = [*np.maximum(box[0, :2], lowest), *np.minimum(box[0, 2:], highest)]
    np.testing.assert_allclose(back[0].numpy(), expected, rtol=0, atol=1e-4)


def test_masks_map_back():
    processor = RegionImageProcessor(**CROP)
    size = (40, 60)  # -> 20 x 30, cropped to rows 2..18 and columns 8..22: rows 4..36 and columns 16..44 remain
    ramp = np.arange(16 * 14, dtype=np.float32).reshape(1, 16, 14) + 1
    (back,) = processor.post_process_masks([ramp], [size])
    expected = np.zeros(size, dtype=np.float32)
    expected[4:36, 16:44] = np.kron(ramp[0], np.ones((2, 2)))
    assert np.array_equal(back[0].numpy(), expected)
    grid = np.array([[[1.0, 2.0], [3.0, 4.0]]], dtype=np.float32)
    (coarse,) = processor.post_process_masks([grid], [size])
    expected[4:36, 16:44] = np.kron(grid[0], np.ones((16, 14)))
    assert np.array_equal(coarse[0].numpy(), expected)


@pytest.mark.parametrize(
    ("boxes", "sizes", "message"),
    [
        (np.zeros((2, 3, 4)), [(10, 10)], "target_sizes.*2 images"),
        (np.zeros((1, 3, 4)), [(10, 10, 3)], "target_sizes"),
        (np.zeros((1, 3, 5)), [(10, 10)], r"boxes must have shape \(R, 4\)"),
    ],
)
def test_bad_post_processing(boxes, sizes, message):
    with pytest.raises(ValueError, match=message):
        RegionImageProcessor().post_process_boxes(boxes, sizes)


def test_crop_geometry_is_a_centered_square():
    geometry = crop_geometry(np.array([10.0, 20, 14, 28]), (50, 60), (32, 32), 1.5)
    # The longer side is 8, so the square has 12 pixels around (12, 24).
    assert geometry.source_box == (6, 18, 18, 30)
    np.testing.assert_allclose(geometry.to_output(np.array([12.0, 24])), [16, 16])
    corner = np.zeros((50, 60), dtype=bool)
    corner[:24, :12] = True
    expected = np.zeros((32, 32), dtype=bool)
    expected[:16, :16] = True
    assert np.array_equal(sample_masks([corner], geometry, ["masks[0]"])[0], expected)
