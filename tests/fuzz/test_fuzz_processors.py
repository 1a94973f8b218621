"""Processors: a batch is what its images are one by one, and nothing but named errors for what is no input."""

import io

import numpy as np
import torch
from cases import fuzz, json_values, named_errors, tensors_and_arrays, wild, wild_numbers
from hypothesis import strategies as st
from PIL import Image
from shared_tokenizer import build_tokenizer

from pixclip_hf import CLOCProcessor, PixCLIPProcessor, RegionImageProcessor
from pixclip_hf.images import open_image, store_image
from pixclip_hf.processing.processing_images import load_images
from pixclip_hf.processing.processing_regions import encode_rle

PROCESSORS = {
    processor.__name__: processor(RegionImageProcessor(size={"height": 12, "width": 16}), build_tokenizer())
    for processor in (CLOCProcessor, PixCLIPProcessor)
}
processors = st.sampled_from(sorted(PROCESSORS))
WORDS = ("images", "masks", "boxes", "text", "prompt", "box_format", "normalized", "size", "image_", "argument")
WORDS += (
    "padding",
    "truncation",
    "max_length",
    "kwargs",
    "return_",
    "channels",
    "resample",
    "rescale",
    "do_",
    "image ",
)


@st.composite
def pictures(draw, modes=("RGB", "L", "RGBA", "LA", "P", "1", "I;16", "CMYK", "YCbCr", "HSV", "LAB")):
    """Images of every mode that can be read, one pixel wide ones among them."""
    height, width, mode = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from(modes))
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        values = noise[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        return Image.fromarray(values)
    return Image.fromarray(noise).convert("RGB").convert(mode if mode != "LA" else "L").convert(mode)


@st.composite
def images_with_regions(draw):
    """An image with masks or boxes, in every form."""
    image = draw(pictures())
    size, boxes, masks = image.size[::-1], [], []
    for _ in range(draw(st.integers(0, 3))):
        top, left = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
        bottom, right = draw(st.integers(top + 1, size[0])), draw(st.integers(left + 1, size[1]))
        boxes.append([left, top, right, bottom])
        mask = np.zeros(size, dtype=draw(st.sampled_from([bool, np.uint8, np.float32, np.int64])))
        mask[top:bottom, left:right] = 1
        ring = [left, top, right, top, right, bottom, left, bottom]
        forms = {
            "array": lambda mask: mask,
            "tensor": torch.from_numpy,
            "rle": encode_rle,
            "polygon": lambda mask, ring=ring: [ring],
            "PIL": lambda mask: Image.fromarray((mask != 0).astype(np.uint8) * 255),
        }
        masks.append(forms[draw(st.sampled_from(sorted(forms)))](mask))
    return image, boxes, masks


@fuzz(
    2000,
    name=processors,
    items=st.lists(images_with_regions(), min_size=1, max_size=3),
    kind=st.sampled_from(["boxes", "masks"]),
)
def test_a_batch_is_its_images(name, items, kind):
    processor = PROCESSORS[name]
    regions = [item[1 if kind == "boxes" else 2] for item in items]
    if not any(regions):
        return
    options = {"return_regions": True, "normalized": False}
    batch = processor(images=[item[0] for item in items], **{kind: regions}, **options)
    key = "region_masks" if "region_masks" in batch else "region_boxes"
    assert batch["region_attention_mask"].sum(1).tolist() == [len(own) for own in regions]
    for i, (item, own) in enumerate(zip(items, regions, strict=True)):
        if not own:
            single = processor(images=item[0])
            assert not batch[key][i].any() and batch["regions"][i] == []
        else:
            single = processor(images=item[0], **{kind: own}, **options)
            assert torch.equal(batch[key][i, : len(own)], single[key][0]) and not batch[key][i, len(own) :].any()
            assert batch["regions"][i] == single["regions"][0]
            box = batch["regions"][i][0]["box"]
            assert [box[edge] for edge in ("xmin", "ymin", "xmax", "ymax")] == item[1][0]
        assert torch.equal(batch["pixel_values"][i], single["pixel_values"][0])
        assert torch.isfinite(single["pixel_values"]).all()


texts = st.one_of(st.text(max_size=12), st.lists(st.text(max_size=8), max_size=3), wild)
odd_images = st.one_of(
    pictures(),
    pictures(modes=("I", "F", "RGB")),
    tensors_and_arrays(),
    wild,
    st.lists(st.one_of(pictures(), wild), max_size=3),
)
SETTINGS = {
    "box_format": st.sampled_from(["xyxy", "xywh", "no"]),
    "normalized": st.sampled_from([True, False, None]),
    "prompt": st.sampled_from(["box", "mask", "no", None]),
    "return_regions": st.booleans(),
    "padding": st.sampled_from([True, False, "longest", "max_length", "no", None, 3]),
    "truncation": st.sampled_from([True, False, "longest_first", "no", None]),
    "max_length": st.sampled_from([0, 1, 5, -1, None, 2**63, 10**400, "x", 2.5, True]),
    "pad_to_multiple_of": st.sampled_from([None, 0, 8, -3, "x"]),
    "size": st.fixed_dictionaries(
        {},
        optional={
            "height": st.sampled_from([0, -1, 1, 9, 2**31, 10**400]),
            "width": st.sampled_from([4, 0, 2**40]),
            "shortest_edge": st.sampled_from([7, 2**30]),
        },
    ),
    "do_center_crop": st.booleans(),
    "crop_size": st.fixed_dictionaries(
        {"height": st.sampled_from([1, 8, 0, -4, 2**31]), "width": st.sampled_from([8, 2**31])}
    ),
    "do_pad": st.booleans(),
    "do_convert_rgb": st.booleans(),
}


@fuzz(
    4000,
    name=processors,
    images=odd_images,
    given=st.fixed_dictionaries({}, optional={"masks": wild, "boxes": wild, "text": texts, "region_text": texts}),
    settings=st.fixed_dictionaries({}, optional=SETTINGS),
)
def test_nothing_gets_away(name, images, given, settings):
    with named_errors(*WORDS):
        batch = PROCESSORS[name](images=images, **given, **settings)
        assert all(
            len(value) == len(batch["pixel_values"]) for key, value in batch.items() if key.startswith("region")
        )


@fuzz(
    3000,
    name=processors,
    item=images_with_regions(),
    values=st.one_of(wild_numbers, wild),
    kind=st.sampled_from(["masks", "boxes"]),
)
def test_no_region_gets_away(name, item, values, kind):
    regions = [*item[1 if kind == "boxes" else 2], values]
    for arguments in ({"images": item[0], kind: regions}, {"images": [item[0]], kind: [regions]}):
        with named_errors(*WORDS):
            PROCESSORS[name](**arguments)


FORMATS = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]


@fuzz(
    2000,
    image=pictures(modes=("RGB",)),
    kind=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
)
def test_no_file_gets_away(image, kind, changes, cut):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    data = bytearray(buffer.getvalue())
    for place, value in changes:
        data[place % len(data)] = value
    data = bytes(data[: max(len(data) - cut, 0)] if cut < 200 else data)
    with named_errors("image"):
        assert open_image({"bytes": data, "path": None}).mode == "RGB"
    with named_errors("image", "file", "header", "chunk", "segment", "JPEG", "PNG", "WebP"):
        stored, size = store_image(data)
        with named_errors("image"):
            assert open_image({"bytes": stored, "path": None}).size == size


@fuzz(
    1500,
    images=st.one_of(odd_images, json_values),
    convert=st.sampled_from([True, False, None]),
    order=st.sampled_from(["channels_first", "channels_last", None]),
)
def test_no_image_gets_away(images, convert, order):
    with named_errors("images"):
        assert all(min(image.size) > 0 for image in load_images(images, order, convert))
