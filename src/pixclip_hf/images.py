"""Reading images: one function for every form in which an image may come."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from .processing.image_processing_region import load_images, to_rgb


@dataclass(frozen=True)
class StoredImage:
    """The image of a row of a `datasets.Dataset`, decoded when it is opened, so that thousands of them fit into
    memory."""

    dataset: Any
    index: int


def open_image(image: Any, at_least: int | None = None) -> Image.Image:
    """One image as an RGB PIL image.

    Args:
        image: a PIL image, array, tensor, path or URL (`processing.image_processing_region.load_images`), a
            [`StoredImage`], or an encoded image as `datasets` stores it, `{"bytes": ..., "path": ...}`. The pixels of
            a file are used as stored; an encoded image is turned upright by its EXIF orientation, as `datasets` does.
        at_least: an encoded JPEG is decoded at a half, a quarter or an eighth of its sides as long as both keep so
            many pixels, which takes a fraction of the time; other images keep their size.

    Raises:
        TypeError: none of these.
        ValueError: an image that cannot be read.
        FileNotFoundError: a path without a file.
    """
    if isinstance(image, StoredImage):
        image = image.dataset[image.index]["image"]
    if isinstance(image, Mapping):
        if image.get("bytes") is None:
            return open_image(image.get("path"))
        with Image.open(io.BytesIO(image["bytes"])) as stored:
            if at_least is not None:
                stored.draft(None, (at_least, at_least))
            return to_rgb(ImageOps.exif_transpose(stored), "image")
    return load_images(image)[0]
