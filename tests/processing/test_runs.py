"""Masks as runs against the same masks in pixels: measured, resampled, and never laid out on the way to a batch."""

import tracemalloc

import numpy as np
import pytest
from coco_codes import compressed

from pixclip_hf import CLOCProcessor, PixCLIPProcessor
from pixclip_hf.processing import processing_runs
from pixclip_hf.processing.image_processing_region import RegionImageProcessor
from pixclip_hf.processing.processing_geometry import crop_geometry, sample_masks
from pixclip_hf.processing.processing_regions import encode_rle, mask_box, read_mask, read_rle
from pixclip_hf.processing.processing_runs import RunMask, box_runs, polygon_runs

SIZES = [(1, 1), (1, 9), (7, 1), (13, 21), (40, 33)]
BLOB = [[5.0, 3, 30, 8, 36, 30, 18, 37.5, 2, 20]]


def by_rows(mask):
    """A mask in pixels as runs row by row, one pixel at a time."""
    edges, inside = [], False
    for place, value in enumerate([*mask.ravel().tolist(), False]):
        if value != inside:
            edges.append(place)
            inside = value
    return RunMask(mask.shape, np.array(edges, dtype=np.int64), by_columns=False)


def both(mask):
    return by_rows(mask), read_rle(encode_rle(mask))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.0])
def test_measures_are_those_of_the_pixels(size, share):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(size) < share
        mask[seed % size[0], -1] = True
        for runs in both(mask):
            assert np.array_equal(runs.decode(), mask)
            assert runs.area == mask.sum() and type(runs.area) is int
            y, x = np.nonzero(mask)
            assert runs.box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [(3, 4), (40, 33), (90, 70)], ids=str)
def test_samples_are_those_of_the_pixels(size, grid):
    generator = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = generator.random(size) < share
        # Smaller, as large and larger than the mask, repeats and gaps among them.
        rows, columns = (np.sort(generator.integers(0, side, count)) for side, count in zip(size, grid, strict=True))
        for runs in both(mask):
            assert np.array_equal(runs.sample(rows, columns), mask[np.ix_(rows, columns)])
            assert runs.sample(rows[:0], columns).shape == (0, grid[1])


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_of_every_pixel_is_the_mask(size):
    mask = np.random.default_rng(0).random(size) < 0.4
    rows, columns = (np.arange(side) for side in size)
    for runs in both(mask):
        assert np.array_equal(runs.sample(rows, columns), mask)
        # As many lines as the mask has, but not all of its own.
        again = np.minimum(rows, max(size[0] - 2, 0))
        assert np.array_equal(runs.sample(again, columns), mask[again])


@pytest.mark.parametrize(("runs", "kept"), [([3, 5], True), ([7] * 9000, False)], ids=["short", "long"])
def test_who_reads_a_code_again_finds_the_same_mask(runs, kept):
    height = sum(runs)
    code = {"size": [height, 1], "counts": compressed(runs)}
    first = read_rle(code)
    first.decode()[:] = True
    if kept:
        with pytest.raises(ValueError, match="read-only"):
            first.edges[:] = 0
    again = read_rle(code)
    assert (again is first) == kept and again.area == sum(runs[1::2])
    for _ in range(2):
        with pytest.raises(ValueError, match="add up"):
            read_rle({**code, "size": [height + 1, 1]})


def test_runs_of_no_length_are_no_runs():
    runs = read_rle({"size": [3, 4], "counts": [2, 0, 3, 2, 0, 1, 4]})
    assert runs.edges.tolist() == [5, 7, 7, 8]
    assert np.array_equal(runs.decode(), [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    assert runs.box.tolist() == [1, 0, 3, 3] and runs.area == 3


def test_rings_that_touch_and_overlap_are_united():
    rings = [[0, 0, 4, 0, 4, 4, 0, 4], [4, 0, 6, 0, 6, 4, 4, 4], [2, 2, 5, 2, 5, 6, 2, 6]]
    expected = np.zeros((7, 8), dtype=bool)
    expected[:4, :6] = expected[2:6, 2:5] = True
    runs = polygon_runs(rings, (7, 8))
    assert np.array_equal(runs.decode(), expected) and runs.area == expected.sum()


@pytest.mark.parametrize("crop", [False, True])
def test_a_canvas_takes_runs_and_pixels_alike(crop):
    size = (40, 33)
    masks = [polygon_runs(BLOB, size), box_runs(np.array([1.2, 2, 9, 8.7]), size), read_rle(encode_rle(np.eye(*size)))]
    # A pixel that the resize skips, and, in the crop, squares that reach beyond the image on every side.
    masks.append(box_runs(np.array([3, 4, 4, 5]), size))
    (geometry,) = RegionImageProcessor(size={"height": 12, "width": 15}).get_geometries([size])
    for mask in masks:
        if crop:
            geometry = crop_geometry(mask.box, size, (12, 15), 1.5)
        pixels = [np.ascontiguousarray(mask.decode()), np.asfortranarray(mask.decode())]
        of_runs, *of_pixels = sample_masks([mask, *pixels], geometry, ["a", "b", "c"])
        assert of_runs.any()
        assert all(np.array_equal(of_runs, other) for other in of_pixels)


@pytest.mark.parametrize("processor_class", [PixCLIPProcessor, CLOCProcessor])
def test_coded_masks_and_boxes_are_never_laid_out(processor_class, monkeypatch):
    size = (40, 60)
    image = np.zeros((*size, 3), dtype=np.uint8)
    regions = {"polygon": [BLOB], "RLE": [encode_rle(polygon_runs(BLOB, size).decode())]}
    monkeypatch.setattr(RunMask, "decode", lambda self: pytest.fail("a mask was laid out in pixels"))
    processor = processor_class(RegionImageProcessor(size={"height": 24, "width": 24}))
    results = [processor(images=image, masks=masks, return_regions=True) for masks in regions.values()]
    assert results[0]["regions"] == results[1]["regions"]
    for name in results[0]:
        assert np.array_equal(results[0][name], results[1][name])
    assert processor(images=image, boxes=[[5, 6, 30, 31]], return_regions=True)["regions"][0][0]["mask_area"] == 625


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_reading_copies_a_mask_once_at_most(dtype):
    size = (300, 400)
    mask = np.zeros(size, dtype=dtype)
    mask[50:200, 60:300] = 1
    for values in (mask, 255 * mask.astype(dtype)) if np.issubdtype(dtype, np.integer) else (mask,):
        tracemalloc.start()
        read = read_mask(values, size, "masks[0]")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read.itemsize == 1 and mask_box(read).tolist() == [60, 50, 300, 200]
        # A byte per pixel, and next to nothing where the array is already so.
        assert peak < (1.1 if values.itemsize > 1 else 0.1) * mask.size


@pytest.mark.parametrize("runs", [[0, 5, 3, 4], [1000, 1, 0, 1] * 3, list(range(9)), [40, 2] * 80, [3000] * 90])
def test_short_and_long_codes_are_read_alike(runs, monkeypatch):
    rle = {"size": [1, sum(runs)], "counts": compressed(runs)}
    read = []
    for most in (0, len(rle["counts"])):  # as a whole; code by code
        monkeypatch.setattr(processing_runs, "_FEW_CODES", most)
        read.append(read_rle(rle))
        with pytest.raises(ValueError, match=rf"add up to 1 x {sum(runs) + 1}, got a sum of {sum(runs)}"):
            read_rle({"size": [1, sum(runs) + 1], "counts": rle["counts"]})
    places = np.cumsum(runs).tolist()
    filled = [edge for pair in zip(places[::2], places[1::2], strict=False) if pair[0] < pair[1] for edge in pair]
    assert [mask.edges.tolist() for mask in read] == [filled] * 2
