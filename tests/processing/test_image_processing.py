"""The image processor against transformers' own, every way to give an image, and every image that is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pixclip_hf.processing.image_processing_region import RegionImageProcessor
from pixclip_hf.processing.processing_geometry import crop_geometry
from pixclip_hf.processing.processing_images import load_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (14, 19, 3), dtype=np.uint8)


def noise(height, width):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"height": 40, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 33}, "do_center_crop": True, "crop_size": {"height": 20, "width": 31}},
        {
            "size": {"shortest_edge": 16},
            "do_center_crop": False,
            "do_pad": True,
            "pad_size": {"height": 40, "width": 60},
        },
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "do_normalize": False},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
    ],
)
def test_equals_transformers_clip_processor(settings):
    images = [noise(48, 64), noise(65, 47), noise(37, 37)]
    ours = RegionImageProcessor(**settings)(images, return_tensors="pt")["pixel_values"]
    theirs = CLIPImageProcessorPil(**settings)(images, return_tensors="pt")["pixel_values"].float()
    assert ours.dtype == torch.float32 and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_default_is_the_whole_image_in_a_square():
    pixel_values = RegionImageProcessor()([noise(30, 90)], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 224, 224)


def test_padding_to_the_largest_of_the_batch():
    processor = RegionImageProcessor(size={"shortest_edge": 16}, do_pad=True)
    pixel_values = processor([noise(32, 64), noise(40, 20)], return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (2, 3, 32, 32)
    assert (pixel_values[0, :, 16:] == 0).all() and (pixel_values[1, :, :, 16:] == 0).all()
    assert (pixel_values[0, :, :16] != 0).any() and (pixel_values[1, :, :, :16] != 0).any()


def test_different_sizes_without_padding_raise():
    with pytest.raises(ValueError, match=r"\(16, 32\), \(32, 16\).*do_pad"):
        RegionImageProcessor(size={"shortest_edge": 16})([noise(32, 64), noise(40, 20)])
    with pytest.raises(ValueError, match="pad_size"):
        RegionImageProcessor(do_pad=True, pad_size={"height": 100, "width": 300})([noise(32, 64)])
    with pytest.raises(ValueError, match="size must have"):
        RegionImageProcessor(size={"max_height": 16, "max_width": 16})([noise(32, 64)])


def png(image, **kwargs):
    file = io.BytesIO()
    image.save(file, "PNG", **kwargs)
    return file.getvalue()


def test_every_image_form_reads_alike(tmp_path):
    image = Image.fromarray(PIXELS)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))

    forms = [
        image,
        path,
        str(path),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        PIXELS / 255,
        torch.from_numpy(PIXELS / 255).float().permute(2, 0, 1),
        PIXELS.astype(np.uint16) * 257,
        np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, dtype=np.uint8)]),
    ]
    for form in forms:
        (read,) = load_images(form)
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), PIXELS), type(form)
    assert len(load_images(forms)) == len(forms)
    assert len(load_images(np.stack([PIXELS] * 2))) == 2


def test_ambiguous_channels():
    image = RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert load_images(image)[0].size == (5, 3)
    assert load_images(torch.from_numpy(image))[0].size == (3, 5)
    assert load_images(image, "channels_first")[0].size == (3, 5)
    assert load_images(torch.from_numpy(image), "channels_last")[0].size == (5, 3)
    with pytest.raises(ValueError, match=r"images must have 1, 3 or 4 channels, got shape \(3, 5, 7\)"):
        load_images(np.zeros((3, 5, 7), dtype=np.uint8), "channels_last")


GRAY = np.array([[0, 255], [128, 7]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GRAY), GRAY),
        (Image.fromarray(GRAY >= 128), np.array([[0, 255], [255, 0]])),
        (Image.fromarray(GRAY).convert("P"), GRAY),
        (Image.fromarray(np.dstack([GRAY, np.full_like(GRAY, 255)]), "LA"), GRAY),
        # Transparent is white, as transformers has it.
        (Image.fromarray(np.dstack([GRAY, np.zeros_like(GRAY)]), "LA"), np.full((2, 2), 255)),
        (Image.fromarray(np.dstack([GRAY, GRAY, GRAY, np.zeros_like(GRAY)]), "RGBA"), np.full((2, 2), 255)),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), GRAY),
        (Image.fromarray(np.array([[65535, 128, 129]], dtype=np.uint16)), np.array([[255, 0, 1]])),
        (Image.merge("CMYK", [Image.fromarray(255 - GRAY)] * 3 + [Image.new("L", (2, 2), 0)]), GRAY),
        (GRAY, GRAY),
        (GRAY[None], GRAY),
        (GRAY[..., None], GRAY),
    ],
    ids=["L", "1", "P", "LA", "LA-clear", "RGBA-clear", "I;16", "I;16-rounding", "CMYK", "HW", "1HW", "HW1"],
)
def test_image_modes(image, expected):
    (read,) = load_images(image)
    assert np.array_equal(np.asarray(read), np.repeat(np.asarray(expected)[..., None], 3, axis=2))


def test_a_16_bit_png_file(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(load_images(path)[0])[..., 0], GRAY)


def test_user_images_are_left_alone():
    image = Image.fromarray(PIXELS)
    RegionImageProcessor()(image)
    assert image.size == (19, 14) and np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((0, 5, 3), dtype=np.uint8), ValueError, "at least one pixel"),
        (torch.zeros(3, 5, 0), ValueError, "at least one pixel"),
        (Image.new("RGB", (0, 5)), ValueError, "at least one pixel"),
        (np.zeros((5, 5, 2), dtype=np.uint8), ValueError, r"1, 3 or 4 channels.*\(5, 5, 2\)"),
        (np.zeros((5, 5), dtype=np.int64), TypeError, "int64"),
        (np.full((5, 5), 2.0), ValueError, r"\[0, 1\].*2.0"),
        (np.full((5, 5), np.nan), ValueError, r"\[0, 1\].*nan"),
        (np.zeros((2, 3, 5, 5), dtype=np.uint8), ValueError, r"\(2, 3, 5, 5\)"),
        (Image.new("F", (5, 5)), ValueError, "mode 'F'"),
        (Image.new("I", (5, 5)), ValueError, "mode 'I'"),
        ("/nowhere/image.png", FileNotFoundError, "/nowhere/image.png"),
        (3.5, TypeError, "float"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=rf"images\[1\].*{message}"):
        load_images([PIXELS, image])


def test_no_images():
    with pytest.raises(ValueError, match="images must hold at least one image"):
        load_images([])


def test_corrupt_files(tmp_path):
    whole = png(noise(64, 64))
    for name, content in (("text.png", b"no image"), ("cut.png", whole[: len(whole) // 2]), ("empty.jpg", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"images\[0\].*{name}"):
            load_images([path])
    jpeg = io.BytesIO()
    noise(64, 64).save(jpeg, "JPEG")
    lazy = Image.open(io.BytesIO(jpeg.getvalue()[:700]))
    with pytest.raises(ValueError, match="images: .*corrupt"):
        load_images(lazy)


def test_save_and_load(tmp_path):
    processor = RegionImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size=30, image_mean=[0, 0, 0]
    )
    processor.save_pretrained(tmp_path)
    loaded = RegionImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = noise(50, 60)
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
    )


def test_crops_show_the_square_and_zeros_beyond_the_image():
    # Four flat quarters; the square around the center of a corner's pixel reaches beyond the image.
    colors = np.array([[10, 60], [120, 250]], dtype=np.uint8)
    image = Image.fromarray(np.kron(colors, np.ones((20, 20), dtype=np.uint8))).convert("RGB")
    processor = RegionImageProcessor(size={"height": 16, "width": 16}, do_normalize=False, rescale_factor=1.0)
    inside = crop_geometry(np.array([15.0, 15, 25, 25]), (40, 40), (16, 16), 1.6)  # 12..28, one pixel to one
    corner = crop_geometry(np.array([30.0, 30, 40, 40]), (40, 40), (16, 16), 2.0)  # 25..45, 20 pixels to 16
    first, second = processor.render([image, image], [inside, corner])
    assert np.array_equal(first[0], np.kron(colors, np.ones((8, 8))))
    assert (second[:, :12, :12] == 250).all()
    assert (second[:, 12:] == 0).all() and (second[:, :, 12:] == 0).all()


def test_crops_are_antialiased_like_a_resize_of_the_cut_out():
    image = noise(90, 120)
    processor = RegionImageProcessor(size={"height": 16, "width": 16})
    geometry = crop_geometry(np.array([30.0, 20, 70, 60]), (90, 120), (16, 16), 1.0)
    (crop,) = processor.render([image], [geometry])
    expected = processor(image.crop((30, 20, 70, 60)), return_tensors="np")["pixel_values"][0]
    # At its edge the filter of the crop also sees the pixels around the square.
    np.testing.assert_allclose(crop[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-6)
    assert np.abs(crop - expected).max() < 0.5
