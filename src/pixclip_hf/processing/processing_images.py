"""Reads images in every form into RGB: files, addresses, PIL images, arrays and tensors."""

import os
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

from .processing_addresses import is_address, read_address
from .processing_numbers import as_array, most_pixels

logger = logging.get_logger(__name__)

EXIF_ORIENTATION = 0x0112
# How the stored pixels are turned upright, by the value of the tag.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Finish = Callable[[Image.Image, str], Image.Image]
# What PIL keeps of a file's metadata: it may say again how to turn, and where the photograph was taken.
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "photoshop", "comment")


def is_batch(images: Any) -> bool:
    """Whether `images` is a list of images (list, tuple or 4-D array) and not one bare image."""
    return isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4)


def is_nested(images: Any) -> bool:
    """Whether `images` is a list of lists of images."""
    return isinstance(images, list | tuple) and any(isinstance(entry, list | tuple) for entry in images)


def load_images(
    images: Any, input_data_format: str | None = None, convert_to_rgb: bool | None = True
) -> list[Image.Image]:
    """
    Read one image or a list of images into PIL images.

    Args:
        images: PIL image, array or tensor ((H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4), path, http(s) URL, a
            list of these, or a list of such lists, whose images are read one after the other. Arrays are uint8, uint16
            or float in [0, 1]. Where the shape leaves the channel axis open, numpy means the last one and torch the
            first; `input_data_format` decides it.
        convert_to_rgb: makes every image RGB, with transparency laid over white; otherwise an image keeps its
            channels.

    16-bit images are scaled to 8 bits, and of several frames the first one is read. A file or URL is turned upright by
    its EXIF orientation; a tag that can't be read, or holds no number from 1 to 8, means upright. A PIL image is used
    as it is, because its boxes and masks are given in the frame of its pixels (`image.size`); where it carries an
    orientation, that is warned about.

    A URL has 30 seconds and 100 MiB. `file:` URLs and hosts in private networks are read only where the environment
    variable `PIXCLIP_HF_LOCAL_ADDRESSES` is 1.

    Raises:
        TypeError: an entry is none of these, or an array of another dtype.
        ValueError: no images, an image without pixels or with more than twice `PIL.Image.MAX_IMAGE_PIXELS`, a file
            that cannot be read, values out of range, or PIL modes "I" and "F", whose value range is unknown, and,
            without conversion, those of palettes.
        FileNotFoundError: a path without a file.
        TimeoutError, ConnectionError: a URL that is slow or can't be reached.
    """
    if is_nested(images):
        named = []
        for i, entries in enumerate(images):
            if not isinstance(entries, list | tuple):
                raise TypeError(f"images[{i}] must be a list of images like the others, got {type(entries).__name__}")
            named += [(f"images[{i}][{j}]", image) for j, image in enumerate(entries)]
    elif is_batch(images):
        named = [(f"images[{i}]", image) for i, image in enumerate(images)]
    else:
        named = [("images", images)]
    if not named:
        raise ValueError("images must hold at least one image, got an empty list")
    finish = to_rgb if convert_to_rgb else to_8_bit
    return [_load_image(image, name, input_data_format, finish) for name, image in named]


def _load_image(image: Any, name: str, input_data_format: str | None, finish: Finish) -> Image.Image:
    if isinstance(image, np.ndarray | torch.Tensor):
        _check_pixels(_sides(image), name)
        return finish(_array_to_pil(image, name, input_data_format), name)
    if is_address(image):
        return read_image(BytesIO(read_address(image, name)), name, image, finish=finish)
    if isinstance(image, str | os.PathLike):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"{name}: no such file or http(s) URL: {str(image)!r:.200}")
        return read_image(image, name, image, finish=finish)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"{name} must be a PIL image, a numpy array, a torch tensor, a path or a URL, got {type(image).__name__}"
        )
    _check_pixels(image.size, name)
    _read_pixels(image, name, image)
    if (orientation := exif_orientation(image)) != 1:
        logger.warning(
            f"{name} has EXIF orientation {orientation}; its pixels are used as stored, and boxes and masks must be "
            "in that frame. For the upright image pass its path, or call PIL.ImageOps.exif_transpose first."
        )
    return finish(image, name)


def read_image(
    file: Any,
    name: str = "image",
    source: Any = None,
    at_least: int | None = None,
    finish: Finish | None = None,
) -> Image.Image:
    """
    The image of an encoded file: decoded, upright, in 8 bits, without metadata. Whatever the decoder raises on foreign
    bytes comes out as a ValueError.

    Args:
        file: a path or an open binary file.
        name: what it is, for messages.
        source: where it comes from, for messages.
        at_least: a JPEG is decoded at a half, a quarter or an eighth of its sides as long as both keep so many pixels,
            which takes a fraction of the time; other images keep their size.
        finish: what is done to its channels, `to_rgb` by default.

    Raises:
        ValueError: the file is no image, is damaged, or has too many pixels.
    """
    image = open_image_file(file, name, source)
    with image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        _read_pixels(image, name, source)
        turn = _TURNS.get(exif_orientation(image))
        # A copy in any case: the class of a file would read its tags again, and they would turn it a second time.
        plain = image.copy() if turn is None else image.transpose(turn)
    plain = (finish or to_rgb)(plain, name)
    plain.info = {key: value for key, value in plain.info.items() if key not in _METADATA}
    return plain


def open_image_file(file: Any, name: str = "image", source: Any = None) -> Image.Image:
    """
    An image file whose header is read, and whose pixels are not.

    Raises:
        ValueError: as [`read_image`].
    """
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {_told(source)} has too many pixels: {error}") from error
    except Exception as error:  # any: what a decoder raises on foreign bytes is not for its callers to know
        raise ValueError(f"{name}: {_told(source)} is not an image that PIL can read: {error}") from error
    _check_pixels(image.size, name)
    return image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, upright, where it has none, or one that can't be read."""
    try:
        found = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # any, again
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _told(source: Any) -> str:
    return f"{str(source)!r:.200}" if source is not None else "the file"


def _sides(array: Any) -> tuple[int, int]:
    """The two longest sides of an array, whatever their order."""
    sides = sorted(array.shape)
    return (sides[-1], sides[-2]) if len(sides) > 1 else (0, 0)


def _check_pixels(size: tuple[int, int], name: str) -> None:
    """
    Raises:
        ValueError: more pixels than PIL reads.
    """
    most = most_pixels()
    if size[0] * size[1] > most:
        raise ValueError(
            f"{name} must have at most {most} pixels (twice PIL.Image.MAX_IMAGE_PIXELS), got {size[0]} x {size[1]}"
        )


def _read_pixels(image: Image.Image, name: str, source: Any) -> None:
    try:
        image.load()
    except Exception as error:  # any, again
        raise ValueError(f"{name}: {_told(source)} is a corrupt image: {error}") from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """
    An image in RGB: transparency laid over white, 16 bits scaled to 8.

    Raises:
        ValueError: no pixels, or PIL modes "I" and "F", whose value range is unknown; `name` is the image's in it.
    """
    _check_mode(image, name)
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        if isinstance(transparency, int):
            values = np.where(values == transparency, 65535, values)
        return _from_16_bit(values).convert("RGB")
    if image.mode == "RGB" and transparency is None:
        return image
    try:
        if isinstance(transparency, tuple) and max(transparency) > 255:
            # PIL has read 16 bits per channel as 8, and left the transparent color as it was.
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in transparency)
        if image.mode in ("La", "RGBa"):  # colors that are multiplied by the alpha already
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if "A" in image.getbands() or "transparency" in image.info:
            return Image.fromarray(convert_to_rgb(image, return_numpy=True))
        return image.convert("RGB")
    except Exception as error:  # a palette or a transparency that is not what the header says
        raise ValueError(f"{name} has PIL mode {image.mode!r} and can't be converted to RGB: {error}") from error


def to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """
    An image with the channels that it has, 8 bits each.

    Raises:
        ValueError: as [`to_rgb`]; a palette, whose indices are no intensities.
    """
    _check_mode(image, name)
    if image.mode in ("P", "PA"):
        raise ValueError(
            f"{name} has PIL mode {image.mode!r}, whose values are indices of a palette: it needs do_convert_rgb=True"
        )
    if image.mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image))
    return image.convert("L") if image.mode == "1" else image


def _check_mode(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise ValueError(f"{name} must have at least one pixel, got width x height = {image.size}")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has PIL mode {image.mode!r}, whose value range is unknown; scale it to 8 bits (mode 'L') first"
        )


def _from_16_bit(values: np.ndarray) -> Image.Image:
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _array_to_pil(image: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> Image.Image:
    channels_last_by_default = isinstance(image, np.ndarray)
    if isinstance(image, torch.Tensor):
        image = as_array(image, name)
        image = image.astype(np.float32) if image.dtype.kind == "f" else image
    if image.size == 0:
        raise ValueError(f"{name} must have at least one pixel, got shape {image.shape}")
    if image.ndim == 3:
        last, first = image.shape[-1] in (1, 3, 4), image.shape[0] in (1, 3, 4)
        if input_data_format is not None:
            channels_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        else:
            channels_last = last and (channels_last_by_default or not first)
        if not (last if channels_last else first):
            raise ValueError(f"{name} must have 1, 3 or 4 channels, got shape {image.shape}")
        image = image if channels_last else np.moveaxis(image, 0, -1)
        image = image[..., 0] if image.shape[-1] == 1 else image
    elif image.ndim != 2:
        raise ValueError(f"{name} must have shape (H, W), (H, W, C) or (C, H, W), got {image.shape}")
    if image.dtype == np.uint16:
        return _from_16_bit(image)
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not (0 <= low and high <= 1):
            raise ValueError(f"{name} holds floats, which must lie in [0, 1]; got values from {low} to {high}")
        image = np.rint(image * 255).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise TypeError(f"{name} must hold uint8, uint16 or float in [0, 1], got {image.dtype}")
    return Image.fromarray(np.ascontiguousarray(image))
