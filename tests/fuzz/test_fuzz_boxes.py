"""Boxes: round trips through the processor, every format, and nothing but named errors for what is none."""

import numpy as np
import torch
from cases import fuzz, named_errors, one_replaced, wild, wild_numbers
from hypothesis import strategies as st
from PIL import Image

from pixclip_hf import CLOCProcessor, RegionImageProcessor
from pixclip_hf.processing.processing_regions import read_boxes

PROCESSORS = {
    "square": CLOCProcessor(RegionImageProcessor(size={"height": 24, "width": 20})),
    "shortest edge, padded": CLOCProcessor(RegionImageProcessor(size={"shortest_edge": 16}, do_pad=True)),
    "as it is": CLOCProcessor(RegionImageProcessor(do_resize=False, do_pad=True)),
}
sides = st.integers(1, 90)


@st.composite
def images_with_boxes(draw):
    """An image's (height, width) and boxes on it, slivers and whole images among them."""
    height, width = draw(sides), draw(sides)
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        ends = []
        for side in (width, height):
            low = draw(st.one_of(st.integers(0, side - 1), st.floats(0, side, exclude_max=True)))
            extent = draw(st.one_of(st.sampled_from([1e-3, 0.4, 1, side]), st.floats(1e-3, side)))
            ends.append((low, min(low + extent, side)))
        (x0, x1), (y0, y1) = ends
        # A sliver of 1e-14 pixels is lost where its center and size are computed.
        if x1 - x0 > 1e-6 and y1 - y0 > 1e-6:
            boxes.append([x0, y0, x1, y1])
    return (height, width), boxes or [[0, 0, width, height]]


@fuzz(3000, case=images_with_boxes(), name=st.sampled_from(sorted(PROCESSORS)))
def test_boxes_come_back(case, name):
    size, boxes = case
    processor = PROCESSORS[name]
    batch = processor(images=Image.new("RGB", size[::-1]), boxes=boxes, normalized=False)
    shares = batch["region_boxes"][0]
    assert (shares[:, 2:] > shares[:, :2]).all() and shares.min() >= 0 and shares.max() <= 1
    (back,) = processor.post_process_boxes(batch["region_boxes"], [size])
    # float32 of a share of the canvas.
    assert np.abs(back.numpy() - np.array(boxes)).max() <= 1e-5 * max(size) * 8


@fuzz(2000, case=images_with_boxes())
def test_formats_say_the_same(case):
    size, boxes = case
    height, width = size
    values = np.array(boxes, dtype=np.float64)
    expected, _ = read_boxes(values, size, "boxes", normalized=False)
    corner = np.concatenate([values[:, :2], values[:, 2:] - values[:, :2]], axis=1)
    center = np.concatenate([(values[:, :2] + values[:, 2:]) / 2, values[:, 2:] - values[:, :2]], axis=1)
    shares = values / np.array([width, height, width, height])
    for given, options in (
        (corner, {"box_format": "xywh"}),
        (center, {"box_format": "cxcywh"}),
        (shares, {"normalized": True}),
        (values.tolist(), {}),
        (torch.tensor(values, requires_grad=True), {}),
        ([torch.tensor(box, dtype=torch.float64) for box in boxes], {}),
    ):
        found, _ = read_boxes(given, size, "boxes", **({"normalized": False} | options))
        assert np.abs(found - expected).max() <= 1e-9 * max(size)


hostile_boxes = st.one_of(
    wild,
    st.lists(one_replaced(st.lists(st.integers(0, 40), min_size=4, max_size=4)), max_size=3),
    one_replaced(st.lists(st.lists(st.floats(-10, 50), min_size=4, max_size=4), max_size=3), wild),
)


@fuzz(
    5000,
    boxes=hostile_boxes,
    box_format=st.sampled_from(["xyxy", "xywh", "cxcywh"]),
    normalized=st.sampled_from([None, True, False]),
)
def test_no_box_gets_away(boxes, box_format, normalized):
    with named_errors("boxes"):
        found, cut = read_boxes(boxes, (31, 47), "boxes", box_format, normalized)
        assert np.isfinite(found).all() and (found[:, 2:] > found[:, :2]).all()
        assert found.size == 0 or (found.min() >= 0 and found[:, ::2].max() <= 47 and found[:, 1::2].max() <= 31)


@fuzz(
    1500,
    boxes=st.one_of(wild, wild_numbers),
    sizes=st.one_of(wild, st.lists(st.lists(wild_numbers, max_size=3), max_size=2)),
)
def test_no_result_gets_away(boxes, sizes):
    processor = PROCESSORS["square"]
    with named_errors("boxes", "target_sizes"):
        processor.post_process_boxes(boxes, [(9, 9)])
    with named_errors("boxes", "target_sizes"):
        processor.post_process_boxes(torch.ones(1, 1, 4), sizes)
    with named_errors("masks", "target_sizes"):
        processor.post_process_masks(torch.ones(1, 1, 4, 4), sizes)
