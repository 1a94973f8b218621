"""Run lengths and polygons: equal to COCO's own code, and nothing but named errors for what is none."""

import numpy as np
from cases import fuzz, json_values, named_errors, one_replaced, plain_numbers, wild, wild_numbers
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from pixclip_hf.processing.processing_regions import decode_rle, encode_rle, polygon_mask, read_mask
from pixclip_hf.processing.processing_runs import polygon_runs, read_rle
from pixclip_hf.record import validate_record

sides = st.integers(1, 40)
sizes = st.tuples(sides, sides)


@st.composite
def masks(draw):
    """Masks of long and of short runs, with and without a first pixel, empty and full ones among them."""
    height, width = draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    flat = np.repeat(
        rng.random(height * width) < draw(st.sampled_from([0, 0.02, 0.3, 0.9, 1])), draw(st.integers(1, 9))
    )
    return np.asfortranarray(flat[: height * width].reshape(width, height).T)


@fuzz(6000, mask=masks())
def test_codes_are_those_of_coco(mask):
    theirs = coco.encode(mask.astype(np.uint8, order="F"))
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    for counts in (theirs["counts"], theirs["counts"].decode()):
        runs = read_rle({"size": theirs["size"], "counts": counts})
        assert np.array_equal(runs.decode(), mask) and runs.area == coco.area(theirs)
        if runs.area:
            x, y, width, height = coco.toBbox(theirs)
            # COCO has a run that goes on in the next column from top to bottom, as here.
            assert runs.box.tolist() == [x, y, x + width, y + height]


@st.composite
def plain_codes(draw):
    """Runs that add up, some of them of no length."""
    height, width = draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cuts = np.sort(rng.integers(0, height * width + 1, draw(st.integers(0, 12))))
    return {"size": [height, width], "counts": np.diff(cuts, prepend=0, append=height * width).tolist()}


@fuzz(4000, rle=plain_codes())
def test_plain_runs_are_those_of_coco(rle):
    theirs = coco.decode(coco.frPyObjects(rle, *rle["size"]))
    for counts in (rle["counts"], np.array(rle["counts"], dtype=np.uint32)):
        assert np.array_equal(decode_rle({**rle, "counts": counts}), theirs)


code_texts = st.one_of(
    st.text(alphabet=[chr(code) for code in range(48, 112)], max_size=40),
    st.text(max_size=6),
    st.binary(max_size=6),
    st.sampled_from(["o" * 11 + "0", "P" * 12 + "1", "0" + "oooooooooo_1" * 4, "\ud800"]),
)
hostile_codes = st.one_of(
    wild,
    st.fixed_dictionaries(
        {
            "size": st.one_of(sizes.map(list), one_replaced(sizes.map(list)), wild),
            "counts": st.one_of(code_texts, one_replaced(st.lists(st.integers(0, 300), max_size=8)), wild),
        }
    ),
    plain_codes().flatmap(
        lambda rle: st.builds(lambda counts: {**rle, "counts": counts}, one_replaced(st.just(rle["counts"])))
    ),
)


@fuzz(6000, rle=hostile_codes)
def test_no_code_gets_away(rle):
    with named_errors("RLE", "counts", "mask"):
        mask = decode_rle(rle)
        assert list(mask.shape) == [int(side) for side in rle["size"]]
    with named_errors("masks[0]"):
        assert read_mask(rle, (12, 17), "masks[0]").shape == (12, 17)


@fuzz(2000, size=st.one_of(sizes.map(list), json_values), counts=st.one_of(code_texts, json_values))
def test_a_record_takes_the_codes_that_a_processor_takes(size, counts):
    height, width = (
        size
        if isinstance(size, list) and all(type(side) is int and 0 < side < 99 for side in size) and len(size) == 2
        else (3, 4)
    )
    region = dict.fromkeys(("category", "caption", "long_caption", "score", "source")) | {"id": 1, "box": [0, 0, 1, 1]}
    mask = {"size": size, "counts": counts}
    record = {
        "image": Image.new("RGB", (width, height)),
        "width": width,
        "height": height,
        "captions": [],
        "alt_text": None,
        "regions": [{**region, "mask": mask}],
    }
    taken = False
    with named_errors("mask"):
        validate_record(record)
        taken = True
    if taken:
        assert read_mask(mask, (height, width), "mask").any()


corners = st.one_of(
    st.integers(-20, 60),
    st.integers(-40, 120).map(lambda value: value / 2),
    st.integers(-200, 600).map(lambda value: value / 10),
    st.floats(-30, 80),
)
rings = st.integers(3, 9).flatmap(lambda points: st.lists(corners, min_size=2 * points, max_size=2 * points))


@fuzz(8000, polygon=st.lists(rings, min_size=1, max_size=3), size=sizes)
def test_polygons_are_those_of_coco(polygon, size):
    theirs = coco.decode(coco.merge(coco.frPyObjects(polygon, *size))).astype(bool)
    runs = polygon_runs(polygon, size)
    assert runs.area == runs.decode().sum()
    if theirs.any():
        assert np.array_equal(runs.decode(), theirs)
    else:  # a polygon on the image keeps a pixel
        assert runs.area <= 1


hostile_rings = st.one_of(
    rings, one_replaced(rings), one_replaced(rings, plain_numbers), st.lists(plain_numbers, max_size=10), wild
)


@fuzz(4000, polygon=st.one_of(st.lists(hostile_rings, max_size=3), wild), size=sizes)
def test_no_polygon_gets_away(polygon, size):
    if not isinstance(polygon, list | tuple):
        return
    with named_errors("polygon"):
        assert polygon_mask(polygon, size).shape == size
    with named_errors("masks[0]"):
        assert read_mask(polygon, size, "masks[0]").any()


@fuzz(3000, mask=st.one_of(wild_numbers, wild))
def test_no_mask_gets_away(mask):
    with named_errors("masks[0]"):
        assert read_mask(mask, (12, 17), "masks[0]").any()
