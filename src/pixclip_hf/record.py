"""The one record schema of every data source, an image and its regions, and what an item that is no record costs."""

import errno
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from .processing.processing_numbers import LEAST_INT64, MOST, MOST_INT64, read_number, read_whole, shown
from .processing.processing_runs import read_rle

if TYPE_CHECKING:
    import datasets


NOT_READABLE = "region left out: not readable"

_RECORD_FIELDS = ("image", "width", "height", "captions", "alt_text", "regions")
_REGION_FIELDS = ("id", "box", "mask", "category", "caption", "long_caption", "score", "source")
_ORIENTATION = ExifTags.Base.Orientation
_BOX_SLACK = 1e-3  # pixels; boxes are stored as float32
_SURROGATE = re.compile("[\ud800-\udfff]")
# Faults of this machine, which no item is to blame for: too many open files, memory or disk that has run out.
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT}


class LeftOut(ValueError):
    """An item that can't become a record; the message is the reason, which is counted."""


@contextmanager
def foreign(reason: str, detail: bool = False) -> Iterator[None]:
    """Reads what others wrote: whatever a decoder, a parser or an archive raises costs this one item.

        with foreign("annotation not readable"):
            box = xywh_to_xyxy(json.loads(text)["bbox"])

    Every reader of data uses it, so that the same fault costs the same everywhere: the item is rejected, skipped or
    counted by its name, and the run goes on. Faults of the machine and of the installation end the run.

    Args:
        reason: why the item is left out.
        detail: adds the type and the words of what was raised.

    Raises:
        LeftOut: anything was raised that bytes of an item can cause.
    """
    try:
        yield
    except LeftOut:
        raise
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        raise LeftOut(f"{reason}: {type(error).__name__}: {str(error):.500}" if detail else reason) from error


def _is_of_the_machine(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
            return True
        error = error.__cause__
    return False


def stated_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, upright, where it has none, or one that can't be read."""
    # As `processing.processing_images` reads it, which knows nothing of records.
    try:
        with foreign("EXIF not readable"):
            found = image.getexif().get(_ORIENTATION, 1)
    except LeftOut:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def record_features() -> "datasets.Features":
    """The `datasets.Features` of a record.

    - image: an image of (height, width), upright: without an EXIF orientation;
    - width, height: pixels;
    - captions: texts of the whole image, alt_text: what a web page said about it (None where unknown);
    - regions: a list of
        - id: int64, unique in its source and split,
        - box: float32 [x0, y0, x1, y1] in pixels, x1 and y1 exclusive,
        - mask: compressed COCO RLE {"size": [height, width], "counts": str}, or None for a region with a box alone,
        - category, caption (short), long_caption: texts, None where unknown,
        - score: float32, confidence of the annotation, 1 for ground truth, None where unknown,
        - source: which data source or annotator the region comes from, None where unknown.
    """
    from datasets import Features, Image, List, Value

    mask = {"size": List(Value("int32"), length=2), "counts": Value("string")}
    region = {
        "id": Value("int64"),
        "box": List(Value("float32"), length=4),
        "mask": mask,
        "category": Value("string"),
        "caption": Value("string"),
        "long_caption": Value("string"),
        "score": Value("float32"),
        "source": Value("string"),
    }
    return Features(
        {
            "image": Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "captions": List(Value("string")),
            "alt_text": Value("string"),
            "regions": List(region),
        }
    )


def _check_fields(value: Any, fields: tuple[str, ...], name: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict, got {type(value).__name__}")
    missing = [field for field in fields if field not in value]
    unknown = [field for field in value if field not in fields]
    if missing or unknown:
        raise ValueError(f"`{name}` must have exactly the fields {fields}; missing {missing}, unknown {unknown}")


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a str, got {value!r}")
    if not value.strip():
        raise ValueError(f"`{name}` must not be empty, got {value!r}")


def _check_list(value: Any, name: str) -> None:
    is_list = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)
    if isinstance(value, (str, bytes, Mapping)) or not is_list:
        raise TypeError(f"`{name}` must be a list, got {type(value).__name__}")


def _check_image(image: Any, width: int, height: int) -> None:
    """A PIL image of the stated size, or the encoded form of `datasets` (read only once it is decoded)."""
    if isinstance(image, Image.Image):
        if image.size != (width, height):
            raise ValueError(f"`image` is {image.size} (width, height) but the record says {(width, height)}")
        if (orientation := stated_orientation(image)) != 1:
            raise ValueError(
                f"`image` must be upright, got EXIF orientation {orientation}: `datasets` would turn it and not "
                "its boxes and masks. Pass `PIL.ImageOps.exif_transpose(image)`, with regions of that image."
            )
        return
    if isinstance(image, Mapping) and set(image) <= {"bytes", "path"} and (image.get("bytes") or image.get("path")):
        return
    raise TypeError(
        f"`image` must be a PIL image or a dict with `bytes` or `path`, as in `datasets`, got {type(image).__name__}"
    )


def _check_box(box: Any, width: int, height: int, name: str) -> None:
    _check_list(box, name)
    if len(box) != 4:
        raise ValueError(f"`{name}` must have 4 numbers [x0, y0, x1, y1], got {len(box)}")
    x0, y0, x1, y1 = (read_number(box[edge], f"`{name}[{edge}]`") for edge in range(4))
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"`{name}` must have x1 > x0 and y1 > y0, got {[x0, y0, x1, y1]}")
    if x0 < -_BOX_SLACK or y0 < -_BOX_SLACK or x1 > width + _BOX_SLACK or y1 > height + _BOX_SLACK:
        raise ValueError(f"`{name}` must lie in the image of {width} x {height} pixels, got {[x0, y0, x1, y1]}")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise ValueError(f"`{name}` must have area on the image of {width} x {height}, got {[x0, y0, x1, y1]}")


def _check_mask(mask: Any, width: int, height: int, name: str) -> None:
    _check_fields(mask, ("size", "counts"), name)
    if not isinstance(mask["counts"], str):
        raise TypeError(f"`{name}['counts']` must be a compressed str, got {type(mask['counts']).__name__}")
    _check_list(mask["size"], f"{name}['size']")
    if list(mask["size"]) != [height, width]:
        raise ValueError(f"`{name}['size']` must be [height, width] = {[height, width]}, got {shown(mask['size'])}")
    try:
        runs = read_rle(dict(mask))
    except ValueError as error:
        raise ValueError(f"`{name}` is not a valid run-length code: {error}") from error
    if not runs.edges.size:
        raise ValueError(f"`{name}` must hold at least one pixel, got an empty mask")


def without_faults(record: Mapping[str, Any]) -> tuple[dict[str, Any], Counter]:
    """A record without the regions, masks and texts that can't be used, and how many of them there were, by reason.

    Boxes are clipped to the image, as where sources are read. A region whose box has no area there, or that has no id
    of its own, is left out; one whose mask can't be read keeps its box.

    Args:
        record: `width`, `height`, `captions` and `regions` in the schema, as far as they can be used.
    """
    left_out: Counter = Counter()
    size = record["width"], record["height"]
    captions = [text for text in record["captions"] or () if is_text(text)]
    left_out["caption left out: empty or no text"] = len(record["captions"] or ()) - len(captions)
    record = dict(record)
    if record.get("alt_text") is not None and not is_text(record["alt_text"]):
        record["alt_text"] = None
        left_out["text left out: empty or no text"] += 1
    regions = readable_regions(record["regions"] or (), lambda given: _usable_region(given, *size, left_out), left_out)
    return {**record, "captions": captions, "regions": regions}, +left_out


def readable_regions(
    given: Iterable[Any], read: Callable[[Any], dict[str, Any]], left_out: Counter
) -> list[dict[str, Any]]:
    """What `read` makes of each region, without those that it cannot read and those whose id came before.

    Args:
        given: the regions of an image, as others wrote them.
        read: from one of them to a region of the schema.
        left_out: takes up how many are left out, by reason.
    """
    regions: list[dict[str, Any]] = []
    seen: set[int] = set()
    for region in given:
        try:
            with foreign(NOT_READABLE):
                found = read(region)
                if found["id"] in seen:
                    raise LeftOut("region left out: id twice")
        except LeftOut as error:
            left_out[str(error)] += 1
        else:
            seen.add(found["id"])
            regions.append(found)
    return regions


def _usable_region(region: Mapping[str, Any], width: int, height: int, left_out: Counter) -> dict[str, Any]:
    read_whole(region["id"], "`id`", LEAST_INT64, MOST_INT64)
    usable = dict(region)
    for field in ("category", "caption", "long_caption", "source"):
        if usable.get(field) is not None and not is_text(usable[field]):
            usable[field] = None
            left_out["text left out: empty or no text"] += 1
    if usable.get("score") is not None:
        read_number(usable["score"], "`score`")
    edges = np.asarray(region["box"], dtype=np.float64)
    if edges.shape != (4,) or not all(map(math.isfinite, box := edges.tolist())):
        raise LeftOut("region left out: no box")
    clipped = [min(max(edge, 0.0), float(side)) for edge, side in zip(box, (width, height) * 2, strict=True)]
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise LeftOut("region left out: no area on the image")
    if clipped != box:
        usable["box"] = clipped
    if usable.get("mask") is not None:
        try:
            with foreign("mask left out: empty or not readable"):
                _check_mask(usable["mask"], width, height, "mask")
        except LeftOut as error:
            usable["mask"] = None
            left_out[str(error)] += 1
    return usable


def is_text(value: Any) -> bool:
    """Whether a value is a text that says something and that a file can hold."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def validate_record(record: Mapping[str, Any]) -> None:
    """Check that a record keeps to the schema: fields, types, boxes and masks inside the image, no empty text.

    Args:
        record: a record as `record_features` describes it, with `image` decoded or in the encoded form of `datasets`.

    Raises:
        TypeError: a value of the wrong type; ValueError: a value out of its range. Both name the field
            (`regions[2]['box']`), the value and what was expected.
    """
    _check_fields(record, _RECORD_FIELDS, "record")
    width, height = record["width"], record["height"]
    for name in ("width", "height"):
        read_whole(record[name], f"`{name}`", 1, MOST)
    _check_image(record["image"], width, height)
    _check_list(record["captions"], "captions")
    for i, caption in enumerate(record["captions"]):
        _check_text(caption, f"captions[{i}]")
    if record["alt_text"] is not None:
        _check_text(record["alt_text"], "alt_text")
    _check_list(record["regions"], "regions")
    seen = set()
    for i, region in enumerate(record["regions"]):
        name = f"regions[{i}]"
        _check_fields(region, _REGION_FIELDS, name)
        read_whole(region["id"], f"`{name}['id']`", LEAST_INT64, MOST_INT64)
        if region["id"] in seen:
            raise ValueError(f"`{name}['id']` must be unique in its image, got {region['id']} again")
        seen.add(region["id"])
        _check_box(region["box"], width, height, f"{name}['box']")
        if region["mask"] is not None:
            _check_mask(region["mask"], width, height, f"{name}['mask']")
        for field in ("category", "caption", "long_caption"):
            if region[field] is not None:
                _check_text(region[field], f"{name}['{field}']")
        if region["score"] is not None:
            read_number(region["score"], f"`{name}['score']`")
        if region["source"] is not None:
            _check_text(region["source"], f"{name}['source']")
