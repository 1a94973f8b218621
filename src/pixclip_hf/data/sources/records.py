"""From what a source says of an image to a record of the schema, and what is left out of it, by reason."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...images import open_image
from ...processing.processing_geometry import clip_boxes
from ...processing.processing_regions import encode_rle, mask_box, read_mask
from ...record import ORIENTATION, record_features
from .base import AnnotatedImage, Source, in_pixels, readable

if TYPE_CHECKING:
    import pyarrow as pa

# What the annotations of one item of millions may raise. XML errors are SyntaxErrors.
BROKEN_ANNOTATION = (OSError, AttributeError, LookupError, TypeError, ValueError, SyntaxError)


_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files


class LeftOut(Exception):
    """An image that can't become a record; the message is the reason."""


def read_image(item: AnnotatedImage, at_least: int | None = None) -> tuple[bytes, Image.Image, tuple[int, int]]:
    """The image of an item: encoded, decoded as [`open_image`] does it, and its upright size (width, height).

    Args:
        item: an item of a source.
        at_least: as in [`open_image`]; the decoded image may then be smaller than the size.

    Raises:
        LeftOut: an image that is missing, can't be decoded, or has another size than its annotations speak of.
    """
    try:
        data = read_bytes(item)
    except OSError as error:
        raise LeftOut("image missing") from error
    try:
        image = open_image({"bytes": data}, at_least)
        size = image.size if at_least is None else upright_size(data)
    except _BROKEN_IMAGE as error:
        raise LeftOut("image not readable") from error
    if item.size is not None and tuple(item.size) != size:
        raise LeftOut("image of another size than its annotations")
    return data, image, size


def read_regions(item: AnnotatedImage, size: tuple[int, int], kind: str) -> tuple[list[dict[str, Any]], Counter]:
    """The regions of an item in the record schema, and how much of the item was left out, by reason.

    Boxes are clipped to the image. A region keeps its box when its mask is empty or can't be read; a region without a
    box takes that of its mask. A region whose other fields can't be read is left out.

    Args:
        item: an item of a source.
        size: (width, height) of its image.
        kind: the kind of the source, which a region without a `source` of its own comes from.
    """
    width, height = size
    counts = Counter(item.left_out)
    regions, seen = [], set()
    for region in item.regions:
        if item.normalized:
            region = in_pixels(region, size)
        mask = _read_region_mask(region.get("mask"), (height, width), counts)
        try:
            number = int(np.int64(region["id"]))  # what the schema stores
            box = _read_region_box(region.get("box"), mask, (width, height))
            score = 1.0 if region.get("score") is None else float(region["score"])
        except (KeyError, OverflowError, TypeError, ValueError):
            counts["region left out: not readable"] += 1
            continue
        if box is None:
            counts["region left out: no area on the image"] += 1
        elif number in seen:
            counts["region left out: id twice"] += 1
        else:
            seen.add(number)
            texts = {name: clean_text(region.get(name)) for name in ("category", "caption", "long_caption")}
            regions.append(
                {
                    "id": number,
                    "box": box,
                    "mask": None if mask is None else encode_rle(mask),
                    **texts,
                    "score": score,
                    "source": region.get("source") or kind,
                }
            )
    counts["regions"] = len(regions)
    return regions, counts


def _read_region_mask(mask: Any, size: tuple[int, int], counts: Counter) -> np.ndarray | None:
    if mask is None:
        return None
    try:
        return np.asarray(read_mask(mask, size, "mask")) != 0
    except (KeyError, TypeError, ValueError):
        counts["mask left out: empty or not readable"] += 1
        return None


def _read_region_box(
    box: Sequence[float] | None, mask: np.ndarray | None, size: tuple[int, int]
) -> list[float] | None:
    width, height = size
    if box is not None:
        values = np.asarray(box, dtype=np.float64)
        if values.shape != (4,):
            raise ValueError(f"`box` must have 4 numbers [x0, y0, x1, y1], got {box}.")
        # float32 is what the schema stores: a sliver that vanishes in it is no box.
        x0, y0, x1, y1 = clip_boxes(values, (height, width)).astype(np.float32).tolist()
        if x1 > x0 and y1 > y0:
            return [x0, y0, x1, y1]
    return None if mask is None else [float(edge) for edge in mask_box(mask)]


def clean_text(text: Any) -> str | None:
    """A text without white space around it; None where nothing is left, or where it is no text."""
    return text.strip() or None if isinstance(text, str) else None


def clean_texts(texts: Sequence[Any]) -> list[str]:
    """The texts of which something is left."""
    return [text for given in texts if (text := clean_text(given))]


def read_bytes(item: AnnotatedImage) -> bytes:
    """The encoded image.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    return item.image if isinstance(item.image, bytes) else item.image.read_bytes()


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image as it is meant to be seen; its pixels are not decoded."""
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


class RecordRows:
    """The items of a source as rows of the record schema, read one by one.

    Only what the asked fields need is read: captions alone open no image where the source says its size.
    """

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def make(self, positions: Iterable[int], names: Sequence[str]) -> "pa.Table":
        """The fields of these names of the records at these positions.

        Raises:
            ValueError: the annotations or the image of the item cannot be read, or don't belong together; the message
                names the source and the item.
        """
        import pyarrow as pa

        records = [self._read(position, set(names)) for position in positions]
        schema = record_features().arrow_schema
        columns = (pa.array([record[name] for record in records], schema.field(name).type) for name in names)
        return pa.table(dict(zip(names, columns, strict=True)))

    def _read(self, position: int, names: set[str]) -> dict[str, Any]:
        try:
            return self._fields(self.source.read(position), names)
        except BROKEN_ANNOTATION as error:
            raise ValueError(
                f"Item {position} of {self.source} cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _fields(self, item: AnnotatedImage, names: set[str]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        size: Any = item.size
        data = None
        if "image" in names or (size is None and names & {"width", "height", "regions"}):
            data = read_bytes(item)
            found = upright_size(data)
            if size is not None and tuple(size) != found:
                raise ValueError(f"the image is {found} (width, height), its annotations speak of {tuple(size)}")
            size = found
        if "image" in names:
            # The bytes travel with the record, to Parquet and to the Hub; no path of this machine does.
            name = item.image.name if isinstance(item.image, Path) else None
            record["image"] = {"bytes": data, "path": None if name is None else readable(name)}
        if names & {"width", "height"}:
            record["width"], record["height"] = size
        if "regions" in names:
            record["regions"], _ = read_regions(item, size, self.source.kind)
        record["captions"] = clean_texts(item.captions)
        record["alt_text"] = clean_text(item.alt_text)
        return {name: record[name] for name in names}
