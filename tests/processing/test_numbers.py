"""Numbers that others write are bounded before anything is sized, indexed or computed by them."""

import warnings

import numpy as np
import pytest
import torch
from coco_codes import compressed
from PIL import Image

from pixclip_hf import CLOCProcessor, PixCLIPProcessor, RegionImageProcessor
from pixclip_hf.processing.processing_numbers import as_array, as_float64, read_number, read_numbers, read_whole, shown
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle, polygon_mask, read_boxes, read_mask
from pixclip_hf.record import validate_record

SIZE = (16, 20)
WRAPPING = [0, 2**62, 2**62, 2**62, 2**62, 320]  # 2**64 too many, which int64 does not see
PROCESSOR = CLOCProcessor(RegionImageProcessor(size={"height": 8, "width": 8}))


def record_of(mask):
    region = dict.fromkeys(("category", "caption", "long_caption", "score", "source")) | {"id": 1, "box": [0, 0, 9, 9]}
    return {
        "image": Image.new("RGB", SIZE[::-1]),
        "width": 20,
        "height": 16,
        "captions": [],
        "alt_text": None,
        "regions": [{**region, "mask": mask}],
    }


@pytest.mark.parametrize("form", [list, np.array, compressed], ids=["list", "array", "compressed"])
@pytest.mark.parametrize(
    "runs",
    [
        WRAPPING,
        [0, 2**62] * 4 + [320],
        [2**61] * 8 + [320],  # the sums of differences wrap as well
        [10, 2**63 - 1, 310],
        [400, -80],
        [0, 321, -1],
    ],
)
def test_runs_that_wrap_are_no_mask(runs, form):
    rle = {"size": list(SIZE), "counts": form(runs)}
    for read in (decode_rle, lambda rle: read_mask(rle, SIZE, "masks[0]")):
        with pytest.raises(ValueError, match="add up to 16 x 20|64 bits"):
            read(rle)
    with pytest.raises(ValueError, match=r"masks\[0\]: an RLE's runs|masks\[0\]: counts"):
        PROCESSOR(images=Image.new("RGB", SIZE[::-1]), masks=[rle], return_regions=True)
    if form is compressed:
        with pytest.raises(ValueError, match=r"`regions\[0\]\['mask'\]` is not a valid run-length code"):
            validate_record(record_of(rle))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([10**400, 1], "must be at most"),
        ([2**40, 2**40], "must be at most"),
        ([100_000, 100_000], "must be of at most .* pixels"),
        ([float("inf"), 1], "must be an integer"),
        ([16.5, 20], "must be an integer"),
        ([True, 20], "must be an integer"),
        ([16], r"must be \[height, width\]"),
        (np.array(16), r"must be \[height, width\]"),
        (torch.ones(2, device="meta"), r"must be \[height, width\]"),
    ],
)
def test_sizes_of_masks_are_bounded(size, message):
    with pytest.raises(ValueError, match=f"an RLE's size {message}|an RLE's size must be .*{message}"):
        decode_rle({"size": size, "counts": [320]})
    assert decode_rle({"size": np.array([1, 2], dtype=np.uint8), "counts": [1, 1]}).tolist() == [[False, True]]
    assert decode_rle({"size": [1.0, 2.0], "counts": "11"}).tolist() == [[False, True]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_unsigned_runs_and_boxes_are_what_they_say(kind):
    runs = np.array([100, 20, 200], dtype=kind)
    mask = decode_rle({"size": list(SIZE), "counts": runs})
    assert mask.sum() == 20 and np.array_equal(mask, decode_rle({"size": list(SIZE), "counts": runs.tolist()}))
    # In unsigned arithmetic x1 - x0 of a turned box would be a large number.
    with pytest.raises(ValueError, match=r"boxes\[0\] must have x1 > x0"):
        read_boxes(np.array([[10, 2, 5, 9]], dtype=kind), SIZE, "boxes")
    boxes, _ = read_boxes(np.array([[5, 2, 10, 9]], dtype=kind), SIZE, "boxes", "xywh")
    assert boxes.tolist() == [[5, 2, 15, 11]]


META, GRAD = torch.ones(4, device="meta"), torch.tensor([2.0, 3.0, 9.0, 10.0], requires_grad=True)
NO_BOXES = {
    "a 400-digit number": [[0, 0, 10**400, 9]],
    "a 5000-digit number": [[0, 0, 10**5000, 9]],
    "too far": [[0, 0, 1e300, 9]],
    "too far, as center and size": [[-1e308, 0, 1e308, 9]],
    "not a number": [[0, 0, float("nan"), 9]],
    "complex": np.ones((1, 4), dtype=complex),
    "0-d": np.array(3),
    "a 0-d tensor": torch.tensor(3.0),
    "0-d entries": [np.array(3), np.array(4)],
    "meta": META[None],
    "meta entries": [META],
    "ragged": [[1, 2, 3, 4], [1, 2]],
    "objects": [[object()] * 4],
    "None": [[None] * 4],
    "dates": np.zeros((1, 4), dtype="M8[s]"),
}


@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
@pytest.mark.parametrize("name", NO_BOXES)
def test_numbers_that_are_no_boxes(name, box_format):
    image = Image.new("RGB", SIZE[::-1])
    for images, boxes in ((image, NO_BOXES[name]), ([image], [NO_BOXES[name]])):
        with warnings.catch_warnings(), pytest.raises((ValueError, TypeError), match="^boxes"):
            warnings.simplefilter("error")
            PROCESSOR(images=images, boxes=boxes, box_format=box_format)


def test_tensors_with_a_gradient_are_read():
    image = Image.new("RGB", SIZE[::-1])
    expected = PROCESSOR(images=image, boxes=[[2, 3, 9, 10]])["region_boxes"]
    for boxes in (GRAD[None], [GRAD], [list(GRAD)]):
        found = PROCESSOR(images=image, boxes=boxes)["region_boxes"]
        assert torch.equal(found, expected) and not found.requires_grad
    mask = torch.ones(SIZE, requires_grad=True)
    assert PROCESSOR(images=image, masks=[mask])["region_masks"].all()
    (back,) = PROCESSOR.post_process_boxes([torch.ones(1, 4, requires_grad=True)], [SIZE])
    assert back.tolist() == [[20, 16, 20, 16]]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(SIZE, device="meta"),
        np.array(1),
        torch.tensor(1),
        torch.ones(SIZE, dtype=torch.complex64),
        torch.ones(SIZE).to_sparse(),
        np.full(SIZE, np.nan),
        np.full(SIZE, 2**63, dtype=np.uint64),
        [[0, 0, 10**400, 0, 5, 5]],
        [[0, 0, 1e300, 0, 5, 5]],
        [[0, 0, float("inf"), 0, 5, 5]],
        [META.repeat(2)],
        [np.array(3)],
        {"size": list(SIZE), "counts": torch.ones(3, device="meta")},
        {"size": list(SIZE), "counts": np.array(320)},
        {"size": list(SIZE), "counts": [10**400]},
        {"size": list(SIZE), "counts": "\ud800"},
    ],
    ids=lambda mask: f"{type(mask).__name__}",
)
@pytest.mark.parametrize("family", [CLOCProcessor, PixCLIPProcessor])
def test_numbers_that_are_no_masks(mask, family):
    processor = family(RegionImageProcessor(size={"height": 8, "width": 8}))
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError), match=r"^masks\[0\]"):
        warnings.simplefilter("error")
        processor(images=Image.new("RGB", SIZE[::-1]), masks=[mask])


@pytest.mark.parametrize("masks", [np.array(1), torch.tensor(1), np.ones(3), 7, {"size": [1, 1]}])
def test_masks_that_are_no_list(masks):
    for images, given in ((Image.new("RGB", SIZE[::-1]), masks), ([Image.new("RGB", SIZE[::-1])], masks)):
        with pytest.raises((ValueError, TypeError), match="^masks"):
            PROCESSOR(images=images, masks=given)


@pytest.mark.parametrize(
    "image", [torch.ones(3, 8, 8, device="meta"), np.array(3), torch.tensor(0.5), torch.ones(3, 8, 8).to_sparse()]
)
def test_numbers_that_are_no_images(image):
    with pytest.raises((ValueError, TypeError), match="^images"):
        PROCESSOR(images=image)
    grad = torch.rand(3, 8, 8, requires_grad=True)
    assert torch.equal(PROCESSOR(images=grad)["pixel_values"], PROCESSOR(images=grad.detach())["pixel_values"])


def test_far_corners_of_polygons_cost_nothing():
    far = 2**31 - 1
    assert polygon_mask([[-far, -far, far, -far, far, far, -far, far]], SIZE).all()
    assert polygon_mask([[-far, 3, far, 3, far, 5, -far, 5]], SIZE).sum() == 2 * 20
    assert polygon_mask([[3, -far, 5, -far, 5, far, 3, far]], SIZE).sum() == 2 * 16
    with pytest.raises(ValueError, match="between -2147483647 and 2147483647"):
        polygon_mask([[0, 0, 2**31, 0, 5, 5]], SIZE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(10**400, 4)], r"target_sizes\[0\]\[0\] must be at most"),
        ([(0, 4)], r"target_sizes\[0\]\[0\] must be at least 1"),
        ([(4.5, 4)], r"target_sizes\[0\]\[0\] must be an integer"),
        ([(2**20, 2**20)], r"target_sizes\[0\] must be of at most"),
    ],
)
def test_target_sizes_are_bounded(sizes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PROCESSOR.post_process_boxes(torch.ones(1, 1, 4), sizes)
    assert len(PROCESSOR.post_process_boxes(torch.ones(1, 1, 4), torch.tensor([[4, 5]]))) == 1
    with pytest.raises(ValueError, match="boxes.* 'meta'"):
        PROCESSOR.post_process_boxes(torch.ones(1, 1, 4, device="meta"), [(4, 5)])
    for boxes in (3, torch.tensor(3), "3", [object()], [["x"]], [None]):
        with pytest.raises((ValueError, TypeError), match="^boxes"):
            PROCESSOR.post_process_boxes(boxes, [(4, 5)])
    for given in (7, torch.tensor(7), [7], [[4, 5, 6]], torch.ones(1, 2, device="meta"), [["a", "b"]], None):
        with pytest.raises((ValueError, TypeError), match="^target_sizes"):
            PROCESSOR.post_process_boxes(torch.ones(1, 1, 4), given)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"height": -1, "width": 8}},
        {"size": {"shortest_edge": 2**30}, "do_pad": True},
        {"do_center_crop": True, "crop_size": {"height": 2**20, "width": 2**20}},
        {"do_pad": True, "pad_size": {"height": 2**20, "width": 2**20}},
    ],
)
def test_canvases_are_bounded(settings):
    with pytest.raises(ValueError, match="size, crop_size and pad_size must give between 1 and"):
        PROCESSOR(images=Image.new("RGB", SIZE[::-1]), **settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 10**400, "`width` must be at most"),
        ("width", np.array(20), "`width` must be an integer"),
        ("id", 2**63, r"`regions\[0\]\['id'\]` must be at most"),
        ("id", np.uint64(2**64 - 1), r"`regions\[0\]\['id'\]` must be at most"),
        ("score", 10**400, r"`regions\[0\]\['score'\]` must be a number that a float32 holds"),
        ("score", 1e300, r"`regions\[0\]\['score'\]` must be a number that a float32 holds"),
        ("box", [0, 0, 10**400, 9], r"`regions\[0\]\['box'\]\[2\]` must be a number that a float32 holds"),
        ("box", np.array(3.0), r"`regions\[0\]\['box'\]` must be a list"),
        ("mask", {"size": None, "counts": "0"}, r"`regions\[0\]\['mask'\]\['size'\]` must be a list"),
        ("mask", {"size": [16, 20], "counts": "\ud800"}, "not a valid run-length code"),
    ],
)
def test_records_are_bounded(field, value, message):
    record = record_of(None)
    (record if field in record else record["regions"][0])[field] = value
    with pytest.raises((ValueError, TypeError), match=message):
        validate_record(record)


def test_readers_of_numbers():
    assert read_whole(np.int16(3), "n") == 3 and type(read_whole(np.uint8(3), "n")) is int
    assert read_number(np.float16(0.5), "n") == 0.5
    for value, kind in ((1.0, TypeError), (True, TypeError), ("1", TypeError), (-1, ValueError), (2**31, ValueError)):
        with pytest.raises(kind, match="^n must be"):
            read_whole(value, "n")
    for value, kind in ((True, TypeError), ("1", TypeError), (float("inf"), ValueError), (10**400, ValueError)):
        with pytest.raises(kind, match="^n must be"):
            read_number(value, "n")
    assert read_numbers([torch.tensor(1), 2.5], "n").tolist() == [1, 2.5]
    assert as_float64([float("nan")], "n").dtype == np.float64
    assert as_array(torch.ones(2, dtype=torch.bfloat16), "n").dtype == np.float32
    assert shown(10**5000) == "a value of type int" and len(shown("x" * 999)) == 80
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 2] = True
    assert encode_rle(torch.from_numpy(mask)) == encode_rle(mask)
