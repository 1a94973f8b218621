"""Images to annotate: every source gives records of the one schema, and says what it left out and why."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ..data.readers import load_records
from ..data.scenes import make_scene
from ..images import open_image
from ..processing.processing_geometry import clip_boxes
from ..processing.processing_regions import encode_rle, mask_box, read_mask
from . import source_formats
from .source_formats import AnnotatedImage, Source
from .stages import Batch, add_counts, open_batch, reject

# Kind -> (the rest of its name, what it opens).
_FORMS = {
    "scenes": "scenes:NUMBER[:SEED]",
    "regions": "regions:FOLDER",
    "images": "images:FOLDER",
    "dataset": "dataset:NAME_OR_FOLDER[:SPLIT]",
    "coco": "coco:ANNOTATIONS.json[,CAPTIONS.json]:IMAGES",
    "refcoco": "refcoco:REFS.p:INSTANCES.json:IMAGES",
    "vg": "vg:REGION_DESCRIPTIONS_OR_OBJECTS.json:IMAGES",
    "flickr30k": "flickr30k:ENTITIES:IMAGES",
    "grit": "grit:FOLDER",
}
# One bad file of millions must not end a run. XML errors are SyntaxErrors.
_BROKEN_ANNOTATION = (OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError)
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files


class LeftOut(Exception):
    """An image that can't become a record; the message is the reason."""


@lru_cache(maxsize=2)
def open_source(name: str) -> Source:
    """Opens a source by its name.

    Args:
        name: one of
            - `scenes:NUMBER[:SEED]`: drawn scenes, split train;
            - `regions:FOLDER`: `regions.jsonl`, a line an image, and the images that it names;
            - `images:FOLDER`: images without regions, below the folder; `x.txt` beside `x.jpg` is its alt text;
            - `dataset:NAME_OR_FOLDER[:SPLIT]`: a dataset in the record schema;
            - `coco:ANNOTATIONS.json[,CAPTIONS.json]:IMAGES`: COCO or LVIS instances;
            - `refcoco:REFS.p:INSTANCES.json:IMAGES`: RefCOCO, RefCOCO+ or RefCOCOg, a region a sentence;
            - `vg:REGION_DESCRIPTIONS_OR_OBJECTS.json:IMAGES`: Visual Genome, with `image_data.json` beside the file;
            - `flickr30k:ENTITIES:IMAGES`: Flickr30k Entities (`Annotations/`, `Sentences/`), a region a
              box and wording;
            - `grit:FOLDER`: GRIT as img2dataset leaves it, tars or folders of images with a JSON file each.

    Raises:
        ValueError: an unknown kind, a missing part, or a folder or file that does not hold what it should.
        FileNotFoundError: a file or folder that does not exist.
    """
    kind, _, rest = name.partition(":")
    if kind not in _FORMS:
        raise ValueError(f"`source` must be one of {', '.join(_FORMS.values())}, got {name!r}.")
    parts = rest.split(":")
    least = _FORMS[kind].split("[:")[0].count(":")
    most = _FORMS[kind].count(":")
    if not least <= len(parts) <= most or not all(parts):
        raise ValueError(f"`source` must have the form {_FORMS[kind]}, got {name!r}.")
    if kind == "scenes":
        return _scenes(parts)
    if kind == "dataset":
        return _dataset(*parts)
    for part in ",".join(parts).split(","):
        if not Path(part).exists():
            raise FileNotFoundError(f"`source` {name!r} names {part!r}, which does not exist.")
    opened = {
        "regions": source_formats.regions_folder,
        "images": source_formats.image_folder,
        "coco": source_formats.coco,
        "refcoco": source_formats.refcoco,
        "vg": source_formats.visual_genome,
        "flickr30k": source_formats.flickr30k_entities,
        "grit": source_formats.grit,
    }[kind](*parts)
    if not opened.items:
        raise ValueError(f"`source` {name!r} holds no image.")
    return opened


def _scenes(parts: Sequence[str]) -> Source:
    try:
        count, seed = int(parts[0]), int(parts[1]) if len(parts) > 1 else 0
    except ValueError as error:
        raise ValueError(f"`source` must have the form {_FORMS['scenes']} in whole numbers: {error}.") from error
    if count < 1:
        raise ValueError(f"`source` must have at least one scene, got {count}.")

    def build(index: int) -> AnnotatedImage:
        scene = make_scene(index, "train", seed)
        buffer = io.BytesIO()
        scene["image"].save(buffer, format="PNG", compress_level=1)
        return AnnotatedImage(
            f"scene-{seed}-{index:08d}", buffer.getvalue(), scene["regions"], scene["captions"], scene["alt_text"]
        )

    return Source("scenes", range(count), build)


def _dataset(name: str, split: str = "train") -> Source:
    from datasets import Image as ImageFeature

    records = load_records(name, split).cast_column("image", ImageFeature(decode=False))

    def build(index: int) -> AnnotatedImage:
        record = records[index]
        image = record["image"]["bytes"] or Path(record["image"]["path"])
        size = record["width"], record["height"]
        texts = record["captions"], record["alt_text"]
        return AnnotatedImage(f"{split}-{index:08d}", image, record["regions"], *texts, size=size)

    return Source("dataset", range(len(records)), build)


def read_record(item: AnnotatedImage, source: str) -> tuple[dict[str, Any], Counter]:
    """An item of a source as a record with its encoded image, and how much of the item was left out, by reason.

    Boxes are clipped to the image. A region keeps its box when its mask is empty or can't be read; a region without a
    box takes that of its mask. A region whose other fields can't be read is left out.

    Raises:
        LeftOut: an image that is missing, can't be decoded, or has another size than its annotations speak of.
    """
    data, (width, height) = _read_image(item)
    counts = Counter(item.left_out)
    regions, seen = [], set()
    for region in item.regions:
        mask = _read_region_mask(region.get("mask"), (height, width), counts)
        try:
            number = int(np.int64(region["id"]))  # what the schema stores
            box = _read_region_box(region.get("box"), mask, (width, height), item.normalized)
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
            texts = {name: _text(region.get(name)) for name in ("category", "caption", "long_caption")}
            regions.append(
                {
                    "id": number,
                    "box": box,
                    "mask": None if mask is None else encode_rle(mask),
                    **texts,
                    "score": score,
                    "source": region.get("source") or source,
                }
            )
    counts["regions"] = len(regions)
    record = {
        "image": {"bytes": data, "path": None},
        "width": width,
        "height": height,
        "captions": [text for caption in item.captions if (text := _text(caption))],
        "alt_text": _text(item.alt_text),
        "regions": regions,
    }
    return record, counts


def _read_image(item: AnnotatedImage) -> tuple[bytes, tuple[int, int]]:
    """The encoded image and its upright size (width, height); decoded once, so that no later stage meets a bad one."""
    try:
        data = item.image if isinstance(item.image, bytes) else item.image.read_bytes()
    except OSError as error:
        raise LeftOut("image missing") from error
    try:
        size = open_image({"bytes": data}).size
    except _BROKEN_IMAGE as error:
        raise LeftOut("image not readable") from error
    if item.size is not None and tuple(item.size) != size:
        raise LeftOut("image of another size than its annotations")
    return data, size


def _read_region_mask(mask: Any, size: tuple[int, int], counts: Counter) -> np.ndarray | None:
    if mask is None:
        return None
    try:
        return np.asarray(read_mask(mask, size, "mask")) != 0
    except (KeyError, TypeError, ValueError):
        counts["mask left out: empty or not readable"] += 1
        return None


def _read_region_box(
    box: Sequence[float] | None, mask: np.ndarray | None, size: tuple[int, int], normalized: bool
) -> list[float] | None:
    width, height = size
    if box is not None:
        values = np.asarray(box, dtype=np.float64)
        if values.shape != (4,):
            raise ValueError(f"`box` must have 4 numbers [x0, y0, x1, y1], got {box}.")
        if normalized:
            values = values * [width, height, width, height]
        # float32 is what the schema stores: a sliver that vanishes in it is no box.
        x0, y0, x1, y1 = clip_boxes(values, (height, width)).astype(np.float32).tolist()
        if x1 > x0 and y1 > y0:
            return [x0, y0, x1, y1]
    return None if mask is None else [float(edge) for edge in mask_box(mask)]


def _text(text: str | None) -> str | None:
    return text.strip() or None if isinstance(text, str) else None


@dataclass
class ReadRecords:
    """First stage of every pipeline: fills the rows, of which only `position` is known, from the source.

    Args:
        source: name of the source.
        batch_size: images read a call.
    """

    source: str
    batch_size: int = field(default=16, repr=False)

    name: ClassVar[str] = "source"
    columns: ClassVar[Mapping[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        source = open_source(self.source)
        for row, position in enumerate(batch["position"]):
            batch["record_id"][row] = f"item-{position:08d}"
            try:
                item = source.build(source.items[position])
                batch["record_id"][row] = item.name
                record, counts = read_record(item, source.kind)
            except LeftOut as error:
                reject(batch, row, self.name, str(error))
            except _BROKEN_ANNOTATION as error:
                reject(batch, row, self.name, f"annotation not readable: {type(error).__name__}: {error}")
            else:
                for name, value in record.items():
                    batch[name][row] = value
                add_counts(batch, row, self.name, counts)
        return batch
