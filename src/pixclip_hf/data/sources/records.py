"""From what a source says of an image to a record of the schema, and what is left out of it, by reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...images import open_image, store_image, upright_size
from ...processing.processing_geometry import clip_boxes
from ...processing.processing_numbers import LEAST_INT64, MOST_INT64, as_float64, read_number, read_numbers, read_whole
from ...processing.processing_regions import encode_rle, mask_box, read_mask
from ...record import LeftOut, foreign, readable_regions, record_features
from .base import AnnotatedImage, Source, in_pixels, readable, split_lists

if TYPE_CHECKING:
    import pyarrow as pa

CROWD = "region left out: a crowd"
_BATCH_BYTES = 2**28  # in images: Arrow counts the bytes of a column's chunk in 32 bits


def read_regions(item: AnnotatedImage, size: tuple[int, int], kind: str) -> tuple[list[dict[str, Any]], Counter]:
    """The regions of an item in the record schema, and how much of the item was left out, by reason.

    Boxes are clipped to the image. A region keeps its box when its mask is empty or can't be read; a region without a
    box takes that of its mask. A region whose other fields can't be read is left out, and so is a crowd: what is said
    of it is said of none of its parts.

    Args:
        item: an item of a source.
        size: (width, height) of its image.
        kind: the kind of the source, which a region without a `source` of its own comes from.
    """
    counts = Counter(item.left_out)

    def read(region: dict[str, Any]) -> dict[str, Any]:
        if region.get("iscrowd"):
            raise LeftOut(CROWD)
        return _read_region(in_pixels(region, size) if item.normalized else region, size, kind, counts)

    regions = readable_regions(item.regions, read, counts)
    counts["regions"] = len(regions)
    return regions, counts


def _read_region(region: Mapping[str, Any], size: tuple[int, int], kind: str, counts: Counter) -> dict[str, Any]:
    mask = _read_region_mask(region.get("mask"), size[::-1], counts)
    box = _read_region_box(region.get("box"), mask, size)
    if box is None:
        raise LeftOut("region left out: no area on the image")
    identity = region["id"]
    if isinstance(identity, str):  # a table has nothing but texts
        identity = int(identity)
    elif isinstance(identity, float) and identity.is_integer():
        identity = int(identity)
    return {
        "id": read_whole(identity, "`id`", LEAST_INT64, MOST_INT64),
        "box": box,
        "mask": None if mask is None else encode_rle(mask),
        **{name: clean_text(region.get(name)) for name in ("category", "caption", "long_caption")},
        "score": 1.0 if region.get("score") is None else read_number(float(region["score"]), "`score`"),
        "source": clean_text(region.get("source")) or kind,
    }


def _read_region_mask(mask: Any, size: tuple[int, int], counts: Counter) -> np.ndarray | None:
    if mask is None:
        return None
    try:
        with foreign("mask left out: empty or not readable"):
            return np.asarray(read_mask(mask, size, "mask")) != 0
    except LeftOut as error:
        counts[str(error)] += 1
        return None


def _read_region_box(
    box: Sequence[float] | None, mask: np.ndarray | None, size: tuple[int, int]
) -> list[float] | None:
    width, height = size
    if box is not None:
        values = as_float64(box, "`box`")
        if not np.isnan(values).any():  # which encloses nothing
            read_numbers(values, "`box`")
        if values.shape != (4,):
            raise ValueError(f"`box` must have 4 numbers [x0, y0, x1, y1], got {box}.")
        # float32 is what the schema stores: a sliver that vanishes in it is no box.
        x0, y0, x1, y1 = clip_boxes(values, (height, width)).astype(np.float32).tolist()
        if x1 > x0 and y1 > y0:
            return [x0, y0, x1, y1]
    return None if mask is None else [float(edge) for edge in mask_box(mask)]


def clean_text(text: Any) -> str | None:
    """A text without white space around it; None where nothing is left, or where it is no text.

    Raises:
        UnicodeEncodeError: half of a pair of surrogates, which no file can hold.
    """
    if not isinstance(text, str) or not text.strip():
        return None
    text.encode("utf-8")
    return text.strip()


def clean_texts(texts: Any, counts: Counter | None = None) -> list[str]:
    """The texts of which something is left.

    Args:
        texts: the captions of an image, as others wrote them: a list; one text, or None, where there is none.
        counts: takes up how many cannot be read.
    """
    kept = []
    for given in split_lists(texts or []):
        try:
            with foreign("caption left out: not readable"):
                kept.append(clean_text(given))
        except LeftOut as error:
            if counts is not None:
                counts[str(error)] += 1
    return [text for text in kept if text]


def read_image(item: AnnotatedImage, at_least: int | None = None) -> tuple[bytes, Image.Image, tuple[int, int]]:
    """The image of an item: as its file has it, decoded as [`open_image`] does it, and its upright size (width,
    height).

    Args:
        item: an item of a source.
        at_least: as in [`open_image`]; the decoded image may then be smaller than the size.

    Raises:
        LeftOut: an image that is missing, can't be decoded, or has another size than its annotations speak of.
    """
    data = _file_content(item)
    with foreign("image not readable"):
        image = open_image({"bytes": data}, at_least)
        size = image.size if at_least is None else upright_size(data)
    _check_size(item, size)
    return data, image, size


def read_stored_image(item: AnnotatedImage) -> tuple[bytes, tuple[int, int]]:
    """What is stored of an item's image (`store_image`), and its (width, height); its pixels are not decoded where
    they are upright.

    Raises:
        LeftOut: the image is missing, is no image, or has another size than its annotations speak of.
    """
    data = _file_content(item)
    with foreign("image not readable"):
        data, size = store_image(data)
    _check_size(item, size)
    return data, size


def _check_size(item: AnnotatedImage, size: tuple[int, int]) -> None:
    if item.size is not None and tuple(item.size) != size:
        found = ValueError(f"the image is {size} (width, height), its annotations speak of {tuple(item.size)}")
        raise LeftOut("image of another size than its annotations") from found


def _file_content(item: AnnotatedImage) -> bytes:
    if isinstance(item.image, bytes):
        return item.image
    with foreign("image missing"):
        return item.image.read_bytes()


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

        schema = record_features().arrow_schema
        schema = pa.schema([schema.field(name) for name in names])
        tables, records, held = [], [], 0

        def add() -> None:
            columns = [pa.array([record[name] for record in records], schema.field(name).type) for name in names]
            tables.append(pa.table(columns, schema=schema))

        for position in positions:
            records.append(self._read(position, set(names)))
            held += len(records[-1]["image"]["bytes"]) if "image" in names else 0
            if held > _BATCH_BYTES:
                add()
                records, held = [], 0
        if records or not tables:
            add()
        return pa.concat_tables(tables)

    def _read(self, position: int, names: set[str]) -> dict[str, Any]:
        try:
            with foreign("annotation not readable", detail=True):
                item = self.source.read(position)
                return self._fields(item, names)
        except LeftOut as error:
            cause = error.__cause__
            why = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
            raise ValueError(f"Item {position} of {self.source} cannot be read: {why}") from error

    def _fields(self, item: AnnotatedImage, names: set[str]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        size: Any = item.size
        data = None
        if "image" in names or (size is None and names & {"width", "height", "regions"}):
            data, size = read_stored_image(item)
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
