"""How regions are shown: windows against pixel arithmetic written out, masks that follow."""

import numpy as np
import pytest
from PIL import Image

from pixclip_hf.encoders.views import blurred, crop, official_crop, outlined, padded_square, pixel_mask
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle

WIDTH, HEIGHT = 60, 40


@pytest.fixture
def image():
    """Every pixel another color: red is its column, green its row."""
    y, x = np.indices((HEIGHT, WIDTH))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8))


def region(box, mask=None):
    return {"box": box, "mask": None if mask is None else encode_rle(mask), "category": "thing"}


def test_crop_is_a_square_around_the_box(image):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[12:20, 30:34] = True
    record = crop(image, region([30, 12, 34, 20], mask), fill=(1, 2, 3))
    picture = np.asarray(record["image"])
    # 1.5 times the longer side, 8, around (32, 16).
    assert picture.shape == (12, 12, 3)
    assert picture[0, 0].tolist() == [26, 10, 7] and picture[-1, -1].tolist() == [37, 21, 7]
    (shown,) = record["regions"]
    assert shown["box"] == [4, 2, 8, 10] and shown["category"] == "thing"
    assert np.array_equal(np.argwhere(decode_rle(shown["mask"]))[[0, -1]], [[2, 4], [9, 7]])


def test_crop_beyond_the_image_is_filled(image):
    record = crop(image, region([0, 0, 8, 8]), fill=(1, 2, 3))
    picture = np.asarray(record["image"])
    assert picture.shape == (12, 12, 3)
    assert picture[1, 1].tolist() == [1, 2, 3] and picture[2, 2].tolist() == [0, 0, 7]
    assert record["regions"][0]["box"] == [2, 2, 10, 10] and record["regions"][0]["mask"] is None


def reference_official_window(box, size):
    """Of the published script, in its own terms: the bordered image, corner and size in whole pixels."""
    x, y, w, h = box[0] + 600, box[1] + 600, box[2] - box[0], box[3] - box[1]
    x, y, w, h = int(x), int(y), max(int(w), 1), max(int(h), 1)
    r = max(w, h)
    x, y = x - (r - w) / 2, y - (r - h) / 2
    image_w, image_h = size[0] + 1200, size[1] + 1200
    left = int(x - 0.25 * r) if x - 0.25 * r > 0 else 0
    right = int(x + 1.25 * r) if x + 1.25 * r < image_w else image_w - 1
    top = int(y - 0.25 * r) if y - 0.25 * r > 0 else 0
    bottom = int(y + 1.25 * r) if y + 1.25 * r < image_h else image_h - 1
    return left - 600, top - 600, right - 600, bottom - 600


@pytest.mark.parametrize("box", ([10.7, 5.2, 21.9, 9.9], [0, 0, 60, 40], [50.5, 30.5, 59.9, 39.9], [3.2, 3.2, 3.9, 8]))
def test_official_crop(image, box):
    left, top, right, bottom = reference_official_window(box, image.size)
    picture = np.asarray(official_crop(image, region(box))["image"])
    assert picture.shape == (bottom - top, right - left, 3)
    for y, x in ((top, left), (bottom - 1, right - 1), ((top + bottom) // 2, (left + right) // 2)):
        inside = 0 <= x < WIDTH and 0 <= y < HEIGHT
        assert picture[y - top, x - left].tolist() == ([x, y, 7] if inside else [255, 255, 255])


def test_official_crop_of_a_long_object_is_no_square():
    image = Image.new("RGB", (1800, 100))
    picture = official_crop(image, region([0, 0, 1800, 100]))["image"]
    # 1.5 x 1800 fits neither into 600 + 100 + 600 rows.
    assert picture.size == (2700, 1299)


def test_a_mask_that_rounding_cuts_off_becomes_its_box(image):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[10, 12] = True
    record = official_crop(image, region([10.0, 10.0, 10.9, 10.9], mask))
    assert record["regions"][0]["mask"] is None


def test_padded_square(image):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = True
    record = padded_square(image, region([0, 0, 1, 1], mask))
    picture = np.asarray(record["image"])
    assert picture.shape == (60, 60, 3)
    assert picture[9, 0].tolist() == [0, 0, 0] and picture[10, 5].tolist() == [5, 0, 7]
    assert np.argwhere(decode_rle(record["regions"][0]["mask"])).tolist() == [[10, 0]]


def test_blurred_and_outlined(image):
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    shown = np.asarray(blurred(sharp, region([10, 10, 20, 20]), radius=5)).astype(int)
    original = np.asarray(sharp).astype(int)
    assert np.array_equal(shown[10:20, 10:20], original[10:20, 10:20])
    assert np.abs(shown - original)[:8].mean() > 30
    framed = np.asarray(outlined(image, region([10, 10, 30, 30])))
    assert framed[10, 15].tolist() == [255, 0, 0] and framed[20, 20].tolist() == [20, 20, 7]
    assert np.asarray(image)[10, 15].tolist() == [15, 10, 7]


def test_pixel_mask():
    assert pixel_mask(region([2, 1, 4, 3]), (6, 5)).sum() == 4
    mask = np.eye(5, 6, dtype=bool)
    assert np.array_equal(pixel_mask(region([0, 0, 6, 5], mask), (6, 5)), mask)
    assert pixel_mask({"box": [0, 0, 6, 5], "mask": [[0, 0, 6, 0, 6, 5, 0, 5]]}, (6, 5)).all()
