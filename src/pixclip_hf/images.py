"""Reading and storing images: one function for every form in which an image may come, and one for what is kept of it.

Every program reads images here, by the rules of `processing.processing_images`: upright, RGB, within limits.
"""

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .image_metadata import may_turn, pixels_alone
from .processing.processing_addresses import ALLOW_LOCAL, is_address
from .processing.processing_images import exif_orientation, load_images, open_image_file, read_image, to_rgb
from .record import LeftOut, foreign


@dataclass(frozen=True)
class StoredImage:
    """The image of a row of a `datasets.Dataset`, decoded when it is opened, so that thousands of them fit into
    memory."""

    dataset: Any
    index: int


def encoded_images(records: Any) -> Any:
    """The images of a `datasets.Dataset`, encoded: rows of [`StoredImage`], for `open_image` to read as any other."""
    from datasets import Image as ImageFeature

    return records.select_columns("image").cast_column("image", ImageFeature(decode=False))


def open_image(image: Any, at_least: int | None = None) -> Image.Image:
    """One image as an RGB PIL image, upright.

    Args:
        image: a PIL image, array, tensor, path or URL (`processing.processing_images.load_images`), a
            [`StoredImage`], or an encoded image as `datasets` stores it, `{"bytes": ..., "path": ...}`.
        at_least: an encoded JPEG is decoded at a half, a quarter or an eighth of its sides as long as both keep so
            many pixels, which takes a fraction of the time; other images keep their size.

    Raises:
        TypeError: none of these.
        ValueError: an image that cannot be read.
        LeftOut: an encoded image with neither bytes nor path, or of a dataset that may not name its path.
        FileNotFoundError: a path without a file.
    """
    if isinstance(image, StoredImage):
        image = image.dataset[image.index]["image"]
    if isinstance(image, Mapping):
        if image.get("bytes") is None:
            if is_address(image.get("path")):
                raise ValueError(
                    "an image of a dataset is stored by an address alone, which its author may not choose"
                )
            if image.get("path") is None:
                raise LeftOut("image missing")
            if "\0" in image["path"]:  # as `own_images` leaves what lies elsewhere
                raise LeftOut("image outside of its folder")
            return open_image(image["path"])
        return read_image(io.BytesIO(image["bytes"]), "image", image.get("path"), at_least)
    return load_images(image)[0]


def check_image(image: Any) -> None:
    """Decodes an image to find out whether it can be read; a JPEG in an eighth of its size, which takes less time.

    Args:
        image: as in [`open_image`].

    Raises:
        LeftOut: it can't be read.
    """
    with foreign("image not readable", detail=True):
        if isinstance(image, StoredImage):
            image = image.dataset[image.index]["image"]
        data = image.get("bytes") if isinstance(image, Mapping) else None
        if data is None and not isinstance(image, str | os.PathLike):
            open_image(image)
            return
        with open_image_file(image if data is None else io.BytesIO(data)) as file:
            file.draft(None, (max(file.width // 8, 1), max(file.height // 8, 1)))
            file.load()
            to_rgb(file, "image")


def encoded_orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded image, 1 to 8; 1 where there is none, or one that can't be read.

    Raises:
        ValueError: the image cannot be read.
    """
    with open_image_file(io.BytesIO(data)) as image:
        return _orientation(image, data)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image as it is meant to be seen; its pixels are not decoded.

    Raises:
        ValueError: the image cannot be read.
    """
    with open_image_file(io.BytesIO(data)) as image:
        return image.size[::-1] if _orientation(image, data) >= 5 else image.size


def holds_more(data: bytes) -> bool:
    """Whether an encoded image holds, or may hold, more than upright pixels and color: whether [`store_image`] would
    not keep it as it is.

    Raises:
        ValueError: the image cannot be read.
    """
    with open_image_file(io.BytesIO(data)) as image:
        return _orientation(image, data) != 1 or pixels_alone(data, image.format) is not data


def store_image(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What is stored of an encoded image, and its (width, height): upright pixels, without EXIF and other metadata,
    which would turn them again and may tell where and by whom a photograph was taken.

    JPEG, PNG and WebP files that are upright keep their pixels as they are encoded; the others are written anew, as
    PNG in RGB.

    Raises:
        ValueError: the image cannot be read.
    """
    with open_image_file(io.BytesIO(data)) as image:
        size, kind = image.size, image.format
        upright = _orientation(image, data) == 1
    kept = pixels_alone(data, kind) if upright else None
    if kept is data:
        return data, size
    if kept is not None:
        # Not for what its header alone says: a file of an odd structure is written anew.
        with suppress(ValueError), open_image_file(io.BytesIO(kept)) as image:
            if image.size == size:
                return kept, size
    buffer = io.BytesIO()
    turned = read_image(io.BytesIO(data))
    turned.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue(), turned.size


def _orientation(image: Image.Image, data: bytes) -> int:
    return exif_orientation(image) if may_turn(image, data) else 1


def stored_bytes(cell: Any, folder: str | os.PathLike | None = None) -> bytes:
    """The encoded image of a cell of a dataset, `{"bytes": ..., "path": ...}`.

    Args:
        cell: the cell.
        folder: where a path without bytes may lie. Any other file of this machine, and any address, is left alone:
            whoever wrote the cell may not decide what is read and published here.

    Raises:
        LeftOut: the cell holds neither bytes nor a path inside of the folder.
        OSError: the file cannot be read.
    """
    if not isinstance(cell, Mapping) or (cell.get("bytes") is None and not cell.get("path")):
        raise LeftOut("image missing")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    if folder is None:
        raise LeftOut("image stored by its path alone")
    return inside(folder, cell["path"]).read_bytes()


def inside(folder: str | os.PathLike, name: str | bytes) -> Path:
    """The path of a file that foreign data name, if it lies in its folder.

    Args:
        folder: the folder.
        name: a path relative to it, or one that leads into it.

    Raises:
        LeftOut: an absolute path or `..` leads out of the folder, and `PIXCLIP_HF_LOCAL_ADDRESSES=1` does not allow
            it.
    """
    path = os.fsdecode(name)
    root = os.path.abspath(folder)
    found = os.path.abspath(os.path.join(root, path))
    try:
        outside = os.path.commonpath([root, found]) != root
    except ValueError:  # another drive
        outside = True
    if "\0" in path or (outside and os.environ.get(ALLOW_LOCAL) != "1"):
        raise LeftOut("image outside of its folder")
    return Path(folder, path)
