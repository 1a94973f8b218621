"""One suite over both processors: keys, shapes, nesting, texts, saving, and calls that are refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from pixclip_hf import CLOCProcessor, PixCLIPProcessor, RegionImageProcessor
from pixclip_hf.processing.processing_regions import encode_rle

RNG = np.random.default_rng(0)
IMAGE_A = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
IMAGE_B = Image.fromarray(RNG.integers(0, 256, (64, 32, 3), dtype=np.uint8))
MASK_A = np.zeros((40, 60), dtype=bool)
MASK_A[5:25, 12:33] = True
MASK_B = np.zeros((64, 32), dtype=bool)
MASK_B[40:50, 2:30] = True
MASK_B[48:60, 20:24] = True
BOX_A, BOX_B, BOX_C = [12, 5, 33, 25], [2, 40, 30, 60], [4.5, 8, 12, 20.5]

both = pytest.mark.parametrize("processor_class", [PixCLIPProcessor, CLOCProcessor])


def build(processor_class, tokenizer=None, **kwargs):
    return processor_class(RegionImageProcessor(size={"height": 32, "width": 32}), tokenizer, **kwargs)


def region_key(processor_class):
    return "region_masks" if processor_class is PixCLIPProcessor else "region_boxes"


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@both
def test_keys_shapes_and_types(processor_class, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    batch = processor(
        images=[IMAGE_A, IMAGE_B],
        text=["a red mug", "two dogs", "x"],
        boxes=[[BOX_A], [BOX_B, BOX_C]],
        region_text=[["mug"], ["a small dog", "dog"]],
    )
    region_shape = (2, 2, 32, 32) if processor_class is PixCLIPProcessor else (2, 2, 4)
    # One token per byte, between <bos> and <eos>.
    expected = {
        "pixel_values": ((2, 3, 32, 32), torch.float32),
        region_key(processor_class): (region_shape, torch.bool if len(region_shape) == 4 else torch.float32),
        "region_attention_mask": ((2, 2), torch.int64),
        "input_ids": ((3, 11), torch.int64),
        "attention_mask": ((3, 11), torch.int64),
        "region_input_ids": ((2, 2, 13), torch.int64),
        "region_text_attention_mask": ((2, 2, 13), torch.int64),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert set(batch) <= set(processor.model_input_names)
    assert batch["region_attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert not batch[region_key(processor_class)][0, 1].any()
    assert (batch["region_input_ids"][0, 1] == tiny_tokenizer.pad_token_id).all()
    assert not batch["region_text_attention_mask"][0, 1].any()
    assert batch["region_text_attention_mask"].sum(-1).tolist() == [[5, 0], [13, 5]]
    decode = [tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["region_input_ids"].view(4, -1)]
    assert decode == ["mug", "", "a small dog", "dog"]


@both
@pytest.mark.parametrize("form", ["rle", "array", "tensor", "image", "batch of arrays"])
def test_mask_forms_give_the_same_batch(processor_class, form):
    processor = build(processor_class)
    other = ~MASK_A
    make = {
        "rle": lambda: [encode_rle(MASK_A), encode_rle(other)],
        "array": lambda: np.stack([MASK_A, other]),
        "tensor": lambda: torch.from_numpy(np.stack([MASK_A, other]) * 255.0 / 255),
        "image": lambda: [Image.fromarray(MASK_A), Image.fromarray(other)],
        "batch of arrays": lambda: np.stack([MASK_A, other])[None],
    }[form]
    images = [IMAGE_A] if form == "batch of arrays" else IMAGE_A
    assert_same(processor(images, masks=make()), processor([IMAGE_A], masks=[[MASK_A, other]]))


@both
def test_region_values(processor_class):
    processor = build(processor_class)
    batch = processor(IMAGE_A, masks=[MASK_A], prompt=processor.prompts[0])
    if processor_class is CLOCProcessor:
        expected = np.array([[[12 / 60, 5 / 40, 33 / 60, 25 / 40]]])
        np.testing.assert_allclose(batch["region_boxes"].numpy(), expected, atol=1e-7)
    else:
        rows = (np.arange(32) + 0.5) * 40 // 32
        columns = (np.arange(32) + 0.5) * 60 // 32
        expected = MASK_A[np.ix_(rows.astype(int), columns.astype(int))]
        assert np.array_equal(batch["region_masks"][0, 0].numpy(), expected)
    # A whole-pixel box and its rectangle say the same.
    assert_same(batch, processor(IMAGE_A, boxes=[BOX_A]))
    assert_same(batch, processor(IMAGE_A, boxes=[[12, 5, 21, 20]], box_format="xywh"))
    assert_same(batch, processor(IMAGE_A, boxes=[[0.2, 0.125, 0.55, 0.625]], normalized=True))


@both
def test_masks_and_boxes_together(processor_class):
    processor = build(processor_class)
    given = {"mask": {"masks": [MASK_B]}, "box": {"boxes": [BOX_C]}}
    for prompt in (prompt for prompt in processor.prompts if prompt != "point"):
        batch = processor(IMAGE_B, masks=[MASK_B], boxes=[BOX_C], prompt=prompt)
        assert_same(batch, processor(IMAGE_B, **given[prompt]))
        with pytest.raises(ValueError, match="masks and boxes"):
            processor(IMAGE_B, masks=[MASK_B], boxes=[BOX_B, BOX_C], prompt=prompt)
    with pytest.raises(ValueError, match="prompt must say which of masks and boxes"):
        processor(IMAGE_B, masks=[MASK_B], boxes=[BOX_C])
    with pytest.raises(ValueError, match="prompt must be one of .*'mask'.*, got 'line'"):
        processor(IMAGE_B, masks=[MASK_B], prompt="line")


def test_boxes_and_masks_prompt_cloc_as_what_they_are_or_as_what_is_said():
    processor = build(CLOCProcessor)
    by_mask, by_box = processor(IMAGE_A, masks=[MASK_A]), processor(IMAGE_A, boxes=[BOX_A])
    assert set(by_mask) - set(by_box) == {"region_masks"} and set(by_box) - set(by_mask) == {"region_boxes"}
    assert torch.equal(by_mask["region_masks"], build(PixCLIPProcessor)(IMAGE_A, masks=[MASK_A])["region_masks"])
    assert_same(processor(IMAGE_A, boxes=[BOX_A], prompt="mask"), by_mask)
    assert_same(processor(IMAGE_A, masks=[MASK_A], prompt="box"), by_box)


@both
@pytest.mark.parametrize("nothing", [[], None, np.zeros((0, 4))])
def test_an_image_without_regions_in_a_batch(processor_class, nothing):
    processor = build(processor_class)
    batch = processor([IMAGE_A, IMAGE_B], boxes=[nothing, [BOX_B]], return_regions=True)
    assert batch["region_attention_mask"].tolist() == [[0], [1]]
    assert not batch[region_key(processor_class)][0].any()
    assert batch["regions"][0] == []
    with pytest.raises(ValueError, match="boxes holds no region"):
        processor([IMAGE_A, IMAGE_B], boxes=[nothing, nothing])
    with pytest.raises((ValueError, TypeError), match="boxes"):
        processor(IMAGE_A, boxes=[])


@both
def test_batch_equals_one_by_one(processor_class):
    processor = build(processor_class)
    for prompt in (prompt for prompt in processor.prompts if prompt != "point"):
        batch = processor([IMAGE_A, IMAGE_B], masks=[[MASK_A], [MASK_B, ~MASK_B]], prompt=prompt)
        for i, (image, masks) in enumerate([(IMAGE_A, [MASK_A]), (IMAGE_B, [MASK_B, ~MASK_B])]):
            single = processor(image, masks=masks, prompt=prompt)
            for key in ("pixel_values", "region_masks" if prompt == "mask" else "region_boxes"):
                row = batch[key][i] if key == "pixel_values" else batch[key][i, : len(masks)]
                assert torch.equal(row, single[key][0])


@both
def test_regions_in_original_pixels(processor_class):
    processor = build(processor_class)
    given = processor([IMAGE_A, IMAGE_B], boxes=[[[-3, 5.25, 33, 25]], [BOX_B]], return_regions=True)["regions"]
    assert given[0] == [{"box": {"xmin": 0.0, "ymin": 5.25, "xmax": 33.0, "ymax": 25.0}, "mask_area": 33 * 20}]
    masks = processor(IMAGE_B, masks=[MASK_B], return_regions=True)["regions"]
    assert masks == [[{"box": {"xmin": 2, "ymin": 40, "xmax": 30, "ymax": 60}, "mask_area": int(MASK_B.sum())}]]


@both
def test_images_alone_text_alone_and_return_types(processor_class, tiny_tokenizer):
    processor = build(processor_class, tiny_tokenizer)
    assert set(processor(IMAGE_A)) == {"pixel_values"}
    assert set(processor(text="a mug")) == {"input_ids", "attention_mask"}
    assert processor(text="a mug")["input_ids"].shape == (1, 7)
    for return_tensors in ("np", None):
        assert isinstance(processor(IMAGE_A, return_tensors=return_tensors)["pixel_values"], np.ndarray)
    moved = processor(IMAGE_A, boxes=[BOX_A], return_regions=True).to(torch.float16)
    assert moved["pixel_values"].dtype == torch.float16 and moved["regions"]


@both
def test_image_settings_of_one_call(processor_class):
    processor = build(processor_class)
    batch = processor(IMAGE_A, boxes=[BOX_A], size={"height": 48, "width": 40})
    assert batch["pixel_values"].shape == (1, 3, 48, 40)
    crop = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}}
    with pytest.raises(ValueError, match=r"boxes\[0\]\[1\].*center crop"):
        processor([IMAGE_A], boxes=[[BOX_A, [0, 0, 8, 40]]], **crop)
    with pytest.raises(TypeError, match="unknown argument color"):
        processor(IMAGE_A, color="red")


def test_crops():
    processor = build(PixCLIPProcessor, crop_scale=2.0)
    batch = processor([IMAGE_A, IMAGE_B], masks=[[], [MASK_B, ~MASK_B]], return_crops=True)
    assert batch["crop_pixel_values"].shape == (2, 2, 3, 32, 32)
    assert batch["crop_masks"].shape == (2, 2, 32, 32) and batch["crop_masks"].dtype == torch.bool
    assert not batch["crop_pixel_values"][0].any() and not batch["crop_masks"][0].any()
    # The box of MASK_B is 28 x 20 at (2, 40): a square of 56 pixels from (-12, 22), 1.75 pixels to one.
    rows, columns = 22 + 1.75 * (np.arange(32) + 0.5), -12 + 1.75 * (np.arange(32) + 0.5)
    expected = np.array(
        [[0 <= y < 64 and 0 <= x < 32 and MASK_B[int(y), int(x)] for x in columns] for y in rows], dtype=bool
    )
    assert np.array_equal(batch["crop_masks"][1, 0].numpy(), expected)
    beyond = torch.from_numpy((rows[:, None] >= 64) | (columns < 0) | (columns >= 32))
    assert (batch["crop_pixel_values"][1, 0][:, beyond] == 0).all()
    assert (batch["crop_pixel_values"][1, 0][:, ~beyond] != 0).float().mean() > 0.95
    from_boxes = processor(IMAGE_B, boxes=[BOX_C], return_crops=True)
    assert from_boxes["crop_masks"].any() and "crop_masks" in processor.model_input_names


@pytest.mark.parametrize("crop_scale", [0.5, float("nan"), float("inf")])
def test_bad_crop_scale(crop_scale):
    with pytest.raises(ValueError, match="crop_scale"):
        build(PixCLIPProcessor, crop_scale=crop_scale)


def test_cloc_has_no_crops():
    assert build(PixCLIPProcessor).has_crops and not build(CLOCProcessor).has_crops
    with pytest.raises(TypeError, match="unknown argument return_crops"):
        build(CLOCProcessor)(IMAGE_A, boxes=[BOX_A], return_crops=True)


@both
def test_post_processing(processor_class):
    processor = build(processor_class)
    batch = processor([IMAGE_A, IMAGE_B], boxes=[[BOX_A], [BOX_B, BOX_C]])
    sizes = [(40, 60), (64, 32)]
    if processor_class is CLOCProcessor:
        first, second = processor.post_process_boxes(batch["region_boxes"], torch.tensor(sizes))
        torch.testing.assert_close(first[:1], torch.tensor([BOX_A]).float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(second, torch.tensor([BOX_B, BOX_C]), rtol=0, atol=1e-3)
    else:
        first, second = processor.post_process_masks(batch["region_masks"], sizes)
        assert first.shape == (2, 40, 60) and second.shape == (2, 64, 32) and first.dtype == torch.bool
        both_, either = first[0].numpy() & MASK_A, first[0].numpy() | MASK_A
        assert both_.sum() / either.sum() > 0.9


# Texts.


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(processor_class, side, tiny_tokenizer):
    tiny_tokenizer.padding_side = side
    batch = build(processor_class, tiny_tokenizer)(text=["abc", "a"])
    rows = [tiny_tokenizer(text)["input_ids"] for text in ("abc", "a")]
    pad = [tiny_tokenizer.pad_token_id] * 2
    expected = [rows[0], pad + rows[1] if side == "left" else rows[1] + pad]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist()[1] == ([0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0])


@both
def test_long_texts_are_cut_with_one_warning(processor_class, tiny_tokenizer, caplog):
    processor = build(processor_class, tiny_tokenizer)
    arguments = {"text": ["a" * 20, "b"], "boxes": [BOX_A, BOX_A], "region_text": ["c" * 9, "d" * 8]}
    batch = processor(IMAGE_A, **arguments, max_length=10)
    # 22 and 11 tokens with <bos> and <eos>; 10 are left of each.
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "2 of 4 texts exceed max_length=10: 13 tokens were cut"
    assert batch["input_ids"].shape == (2, 10) and batch["region_input_ids"].shape == (1, 2, 10)
    assert batch["input_ids"][0].tolist() == tiny_tokenizer("a" * 8)["input_ids"]
    caplog.clear()
    assert processor(IMAGE_A, **arguments, max_length=22)["input_ids"].shape == (2, 22)
    assert not caplog.records


@both
def test_length_limits(processor_class, tiny_tokenizer, caplog):
    processor = build(processor_class, tiny_tokenizer)
    assert processor(text=["a" * 300])["input_ids"].shape == (1, tiny_tokenizer.model_max_length)
    assert "174 tokens" in caplog.text
    padded = processor(IMAGE_A, text="a", boxes=[BOX_A], region_text=["b"], padding="max_length", max_length=9)
    assert padded["input_ids"].shape == (1, 9) and padded["region_input_ids"].shape == (1, 1, 9)
    tiny_tokenizer.model_max_length = int(1e30)
    assert processor(text=["a" * 300])["input_ids"].shape == (1, 302)
    with pytest.raises(ValueError, match="max_length"):
        processor(text="a", padding="max_length")
    assert processor(text=["ab", "cd"], padding=False)["input_ids"].shape == (2, 4)
    with pytest.raises(ValueError, match="padding=False"):
        processor(text=["ab", "c"], padding=False)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"max_length.*{bad}"):
            processor(text="a", max_length=bad)
    with pytest.raises(ValueError, match="padding.*'some'"):
        processor(text="a", padding="some")


@both
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"text": ""}, ValueError, "text must not be empty"),
        ({"text": ["a", " \n"]}, ValueError, r"text\[1\] must not be empty"),
        ({"text": []}, ValueError, "text must hold"),
        ({"text": ["a", 5]}, TypeError, r"text\[1\].*int"),
        ({"text": [["a", "b"]]}, TypeError, r"text\[0\].*list"),
        ({"text": 5}, TypeError, "text must be.*int"),
        ({"region_text": ["a", ""]}, ValueError, r"region_text\[1\] must not be empty"),
        ({"region_text": ["a"]}, ValueError, "region_text.*got 1 for 2 regions"),
        ({"region_text": "a"}, TypeError, "region_text.*'a'"),
        ({"region_text": [["a", "b"]]}, TypeError, r"region_text\[0\].*list"),
        ({"region_text": ["a", "b"], "padding": False}, ValueError, "padding"),
    ],
)
def test_bad_texts(processor_class, kwargs, error, message, tiny_tokenizer):
    with pytest.raises(error, match=message):
        build(processor_class, tiny_tokenizer)(IMAGE_A, boxes=[BOX_A, BOX_A], **kwargs)


@both
@pytest.mark.parametrize(
    ("region_text", "error", "message"),
    [
        ([["a"]], ValueError, "region_text.*2 images, got 1"),
        ([["a"], ["b"]], ValueError, r"region_text\[1\].*got 1 for 2 regions"),
        ([["a"], "bc"], TypeError, r"region_text\[1\].*'bc'"),
        ([["a"], ["b", None]], TypeError, r"region_text\[1\]\[1\].*NoneType"),
        ([["a"], ["b", " "]], ValueError, r"region_text\[1\]\[1\].*empty"),
    ],
)
def test_bad_region_texts_of_a_list(processor_class, region_text, error, message, tiny_tokenizer):
    with pytest.raises(error, match=message):
        build(processor_class, tiny_tokenizer)(
            [IMAGE_A, IMAGE_B], boxes=[[BOX_A], [BOX_B, BOX_C]], region_text=region_text
        )


@both
def test_missing_pad_token(processor_class, tiny_tokenizer):
    tiny_tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        build(processor_class, tiny_tokenizer)(text="a")


# Calls that make no sense.


@both
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "nothing to process"),
        ({"boxes": [BOX_A]}, "boxes needs the images"),
        ({"masks": [MASK_A]}, "masks needs the images"),
        ({"text": "a", "region_text": ["a"]}, "region_text needs the images"),
        ({"images": IMAGE_A, "region_text": ["a"]}, "region_text needs regions"),
        ({"images": IMAGE_A, "return_regions": True}, "return_regions needs regions"),
        ({"images": [IMAGE_A], "boxes": [BOX_A]}, r"boxes\[0\] must have shape \(R, 4\)"),
        ({"images": [IMAGE_A, IMAGE_B], "boxes": [[BOX_A]]}, "boxes.*2 images, got 1"),
        ({"images": IMAGE_A, "masks": [MASK_B]}, r"masks\[0\].*\(64, 32\).*\(40, 60\)"),
        ({"images": [IMAGE_B, IMAGE_A], "masks": [[MASK_B], [MASK_A, MASK_B]]}, r"masks\[1\]\[1\]"),
        ({"images": IMAGE_A, "boxes": [BOX_A], "box_format": "yxyx"}, "box_format.*'yxyx'"),
        ({"images": IMAGE_A, "boxes": [BOX_A], "normalized": True}, r"boxes\[0\].*normalized"),
        ({"images": IMAGE_A, "boxes": [[0, 0, 1, 1]]}, "boxes.*normalized"),
        ({"images": np.zeros((0, 4, 3), dtype=np.uint8)}, "images must have at least one pixel"),
    ],
)
def test_bad_calls(processor_class, kwargs, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        build(processor_class, tiny_tokenizer)(**kwargs)


def test_return_crops_needs_regions():
    with pytest.raises(ValueError, match="return_crops needs regions"):
        build(PixCLIPProcessor)(IMAGE_A, return_crops=True)


# Saving and loading.


@both
@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("auto", [True, False])
def test_save_and_load(processor_class, with_tokenizer, auto, tiny_tokenizer, tmp_path):
    extra = {"text_model_name": "org/llm"} | ({"crop_scale": 1.75} if processor_class is PixCLIPProcessor else {})
    processor = build(processor_class, tiny_tokenizer if with_tokenizer else None, **extra)
    processor.save_pretrained(tmp_path)
    loaded = (AutoProcessor if auto else processor_class).from_pretrained(tmp_path)
    assert type(loaded) is processor_class
    assert {name: getattr(loaded, name) for name in extra} == extra
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    arguments = {"images": [IMAGE_A, IMAGE_B], "boxes": [[BOX_A], [BOX_B, BOX_C]]}
    if with_tokenizer:
        arguments |= {"text": ["a mug"], "region_text": [["x"], ["yy", "z"]]}
    assert_same(loaded(**arguments), processor(**arguments))
    assert (loaded.tokenizer is not None) == with_tokenizer
    # The loaded one saves like the first.
    loaded.save_pretrained(tmp_path / "again")
    saved, again = (folder / "processor_config.json" for folder in (tmp_path, tmp_path / "again"))
    assert saved.read_text() == again.read_text()


@both
def test_without_a_tokenizer(processor_class):
    processor = build(processor_class, text_model_name="org/llm")
    assert set(processor(IMAGE_A, boxes=[BOX_A])) >= {"pixel_values", "region_attention_mask"}
    with pytest.raises(ValueError, match=r"^text needs a tokenizer.*'org/llm' \(text_model_name\)"):
        processor(text="a mug")
    with pytest.raises(ValueError, match="^region_text needs a tokenizer.*'org/llm'"):
        processor(IMAGE_A, boxes=[BOX_A], region_text=["a mug"])
    assert "get_attributes" not in vars(processor) and repr(processor)


@both
@pytest.mark.slow
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_loads_from_its_folder_without_the_package(processor_class, with_tokenizer, tiny_tokenizer, tmp_path):
    build(processor_class, tiny_tokenizer if with_tokenizer else None).save_pretrained(tmp_path / "saved")
    code = (
        "import sys; sys.modules['pixclip_hf'] = None\n"
        "import numpy as np\n"
        "from transformers import AutoProcessor\n"
        f"processor = AutoProcessor.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True)\n"
        "batch = processor(np.zeros((8, 8, 3), np.uint8), boxes=[[0, 0, 4, 4]])\n"
        "print(type(processor).__name__, processor.tokenizer is None, batch['region_attention_mask'].tolist())"
    )
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [processor_class.__name__, str(not with_tokenizer), "[[1]]"]
