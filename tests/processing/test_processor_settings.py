"""The settings of a processor call, as in every processor of transformers: flat, by kind, from the tokenizer."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.processing_utils import ProcessingKwargs

from pixclip_hf import CLOCProcessor, PixCLIPProcessor, RegionImageProcessor

RNG = np.random.default_rng(0)
IMAGE_A = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
IMAGE_B = Image.fromarray(RNG.integers(0, 256, (64, 32, 3), dtype=np.uint8))
BOX_A, BOX_B, BOX_C = [12, 5, 33, 25], [2, 40, 30, 60], [4.5, 8, 12, 20.5]

both = pytest.mark.parametrize("processor_class", [PixCLIPProcessor, CLOCProcessor])


def build(processor_class, tokenizer=None, **settings):
    return processor_class(RegionImageProcessor(size={"height": 32, "width": 32}, **settings), tokenizer)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@both
@pytest.mark.parametrize(
    ("flat", "by_kind"),
    [
        ({"max_length": 9, "padding": "max_length"}, {"text_kwargs": {"max_length": 9, "padding": "max_length"}}),
        ({"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}),
        ({"size": {"height": 20, "width": 24}}, {"images_kwargs": {"size": {"height": 20, "width": 24}}}),
        (
            {"do_normalize": False, "padding_side": "left", "return_tensors": "pt"},
            {
                "images_kwargs": {"do_normalize": False},
                "text_kwargs": {"padding_side": "left"},
                "common_kwargs": {"return_tensors": "pt"},
            },
        ),
    ],
)
def test_flat_and_by_kind_are_one(processor_class, flat, by_kind, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    arguments = {"images": IMAGE_A, "text": ["abc", "abcde"], "boxes": [BOX_A], "region_text": ["xyz"]}
    batch = processor(**arguments, **flat)
    assert_same(batch, processor(**arguments, **by_kind))
    plain = processor(**arguments)
    assert any(plain[key].shape != batch[key].shape or not torch.equal(plain[key], batch[key]) for key in plain)


@both
def test_special_tokens_and_padding(processor_class, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    bare = processor(text=["abc"], add_special_tokens=False)["input_ids"]
    assert bare.tolist() == [tiny_tokenizer("abc")["input_ids"][1:-1]]
    batch = processor(text=["abc", "a"], padding_side="left", pad_to_multiple_of=8)
    assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"].sum(-1).tolist() == [5, 3]
    assert batch["attention_mask"][1].tolist() == [0] * 5 + [1] * 3
    assert tiny_tokenizer.padding_side == "right"


@both
def test_truncation(processor_class, tiny_tokenizer, caplog):
    processor = build(processor_class, tiny_tokenizer)
    cut = processor(text=["a" * 20], max_length=10)["input_ids"]
    for truncation in (True, None, "longest_first", "only_first"):
        assert torch.equal(processor(text=["a" * 20], max_length=10, truncation=truncation)["input_ids"], cut)
    caplog.clear()
    assert torch.equal(processor(text=["a" * 20], max_length=10, verbose=False)["input_ids"], cut)
    for truncation in (False, "do_not_truncate"):
        assert processor(text=["a" * 20], max_length=10, truncation=truncation)["input_ids"].shape == (1, 22)
        with pytest.raises(ValueError, match=r"text\[1\] has 22 tokens.*10: set truncation=True"):
            processor(text=["b", "a" * 20], max_length=10, truncation=truncation, padding="max_length")
    assert not caplog.records


@both
def test_settings_of_the_tokenizer_hold_unless_the_call_says_otherwise(processor_class, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path, max_length=12, padding="max_length")
    processor = build(processor_class, tokenizer)
    arguments = {"images": IMAGE_A, "text": "abc", "boxes": [BOX_A], "region_text": ["x"]}
    batch = processor(**arguments)
    assert batch["input_ids"].shape == (1, 12) and batch["region_input_ids"].shape == (1, 1, 12)
    assert processor(**arguments, padding=True)["input_ids"].shape == (1, 5)
    assert processor(**arguments, text_kwargs={"max_length": 9})["input_ids"].shape == (1, 9)


@both
def test_return_types(processor_class, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    for given in (
        {"return_tensors": "np"},
        {"common_kwargs": {"return_tensors": "np"}},
        {"text_kwargs": {"return_tensors": "np"}},
        {"images_kwargs": {"return_tensors": "np"}},
    ):
        batch = processor(images=IMAGE_A, text="a", **given)
        assert all(isinstance(value, np.ndarray) for value in batch.values()), given
    with pytest.raises(ValueError, match="return_tensors must be one type.*'np'.*'pt'"):
        processor(IMAGE_A, text_kwargs={"return_tensors": "np"}, images_kwargs={"return_tensors": "pt"})


@both
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"color": "red", "shade": 1}, TypeError, "unknown argument color, shade"),
        ({"images_kwargs": {"color": 1}}, TypeError, r"unknown argument images_kwargs\['color'\]"),
        ({"text_kwargs": {"size": 3}}, TypeError, r"unknown argument text_kwargs\['size'\]"),
        ({"common_kwargs": {"padding": True}}, TypeError, r"unknown argument common_kwargs\['padding'\]"),
        ({"videos_kwargs": {"fps": 3}}, TypeError, "unknown argument videos_kwargs"),
        ({"sampling_rate": 3}, TypeError, "unknown argument sampling_rate"),
        ({"stride": 3}, TypeError, "unknown argument stride"),
        ({"return_mm_token_type_ids": True}, TypeError, "unknown argument return_mm_token_type_ids"),
        ({"text_kwargs": True}, TypeError, "text_kwargs must be a dict.*True"),
        ({"padding": True, "text_kwargs": {"padding": False}}, ValueError, "padding was passed two times"),
        ({"size": "large"}, ValueError, "size.*'large'"),
        ({"normalized": "no"}, ValueError, "normalized.*'no'"),
        ({"padding_side": "top"}, ValueError, "padding_side.*top"),
        ({"truncation": "all"}, ValueError, "truncation must be one of.*'all'"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be a positive integer, got 0"),
        ({"padding": False, "pad_to_multiple_of": 8}, ValueError, "pad_to_multiple_of=8 needs padding"),
        ({"return_tensors": "tf"}, ValueError, "tf"),
    ],
)
def test_bad_settings(processor_class, kwargs, error, message, tiny_tokenizer):
    with pytest.raises(error, match=message):
        build(processor_class, tiny_tokenizer)(images=IMAGE_A, text="a", **kwargs)


def test_every_setting_of_a_call_has_its_place():
    common = {"text_kwargs", "box_format", "normalized", "prompt", "return_regions"}
    for processor_class, own in ((PixCLIPProcessor, {"return_crops"}), (CLOCProcessor, set())):
        schema = processor_class.valid_processor_kwargs
        assert schema.__annotations__.keys() == ProcessingKwargs.__annotations__.keys() | common | own


@both
def test_nested_images(processor_class, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    flat = processor(
        [IMAGE_A, IMAGE_B, IMAGE_A],
        text="a",
        boxes=[[BOX_A], [], [BOX_C, BOX_A]],
        region_text=[["x"], [], ["yy", "z"]],
    )
    nested = processor(
        [[IMAGE_A, IMAGE_B], [], [IMAGE_A]],
        text="a",
        boxes=[[[BOX_A], []], [], [[BOX_C, BOX_A]]],
        region_text=[[["x"], []], [], [["yy", "z"]]],
    )
    assert_same(nested, flat)
    assert_same(processor([[IMAGE_A], [IMAGE_B]]), processor([IMAGE_A, IMAGE_B]))
    with pytest.raises(ValueError, match="boxes must be a list with one list for each of the 2"):
        processor([[IMAGE_A], [IMAGE_B]], boxes=[[[BOX_A]]])
    with pytest.raises(ValueError, match=r"boxes\[1\] must be a list with one list for each of the 2"):
        processor([[IMAGE_A], [IMAGE_B, IMAGE_A]], boxes=[[[BOX_A]], [[BOX_B]]])
    with pytest.raises(TypeError, match=r"images\[1\] must be a list of images like the others, got Image"):
        processor([[IMAGE_A], IMAGE_B])
    for given in ("boxes", "masks"):
        with pytest.raises(TypeError, match=r"images\[0\] must be a list of images like the others, got Image"):
            processor([IMAGE_A, IMAGE_B, []], **{given: [[], [], []]})
    with pytest.raises(TypeError, match=r"images\[1\]\[0\] must be.*got float"):
        processor([[IMAGE_A], [2.5]])
    with pytest.raises(ValueError, match="images must hold at least one image"):
        processor([[], []])


@both
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
def test_images_keep_their_channels_where_nothing_converts_them(processor_class, mode):
    processor = build(processor_class, do_normalize=False, do_rescale=False, do_convert_rgb=False)
    image = IMAGE_A.convert(mode)
    pixels = np.array(image).reshape(40, 60, len(mode))
    # An array of as many channels is an image of that mode, unless it is told apart by its mode alone.
    images = [image] if mode in ("LA", "CMYK") else [image, pixels]
    batch = processor(images, size={"height": 40, "width": 60})
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float()
    for pixel_values in batch["pixel_values"]:
        assert torch.equal(pixel_values, expected)
    resized = processor([image], boxes=[[BOX_A]])
    assert resized["pixel_values"].shape == (1, len(mode), 32, 32)


@both
def test_images_that_must_be_converted(processor_class):
    processor = build(processor_class)
    with pytest.raises(ValueError, match="image 1 has PIL mode 'L', image 0 'RGB'"):
        processor([IMAGE_A, IMAGE_A.convert("L")], do_convert_rgb=False)
    with pytest.raises(ValueError, match=r"images\[0\] has PIL mode 'P'.*do_convert_rgb=True"):
        processor([IMAGE_A.convert("P")], do_convert_rgb=False)
    with pytest.raises(ValueError, match=r"image_mean must hold one number, or one for each of the 4 channels"):
        processor([IMAGE_A.convert("RGBA")], images_kwargs={"do_convert_rgb": False})


@both
def test_a_processor_equals_the_one_that_its_folder_gives(processor_class, tiny_tokenizer, tmp_path):
    build(processor_class, tiny_tokenizer).save_pretrained(tmp_path)
    processor = processor_class.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == processor_class.from_pretrained(tmp_path).to_dict()
    assert "auto_map" in (tmp_path / "processor_config.json").read_text()
