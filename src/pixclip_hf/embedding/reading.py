"""From positions in a source to the inputs of an encoder, in reader processes or not."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.sources import AnnotatedImage, cached_source
from ..data.sources.base import readable
from ..data.sources.records import clean_texts, read_image
from ..encoders.joint import Preparation, PreparedBatch
from ..jobs import Shard
from ..processing.processing_geometry import Geometry, sample_masks
from ..processing.processing_regions import encode_rle, read_rle
from ..record import LeftOut, foreign

Size = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Some items of a shard, which are read and embedded together; `last` of its shard."""

    shard: Shard
    positions: range
    last: bool


def parts_of(shards: Iterable[Shard], size: int) -> Iterator[Part]:
    """The parts of each shard, of at most `size` items; no part reaches into the next shard, so that a shard comes out
    the same whatever was done before it."""
    for shard in shards:
        for start in range(shard.start, shard.stop, size):
            stop = min(start + size, shard.stop)
            yield Part(shard, range(start, stop), stop == shard.stop)


@dataclass
class ReadItem:
    """An image that was read.

    Attributes:
        position: in its source; image_id: its name there; path: of its file in the
            source's folder of images, None where there is no such file.
        size: (width, height) of the upright image.
        regions: in the record schema; areas: pixels of the mask of each, None where it has none.
        captions: its captions.
    """

    position: int
    image_id: str
    path: str | None
    size: Size
    regions: list[dict[str, Any]]
    areas: list[int | None]
    captions: list[str]


@dataclass
class ReadPart:
    """What became of a part: the images that were read, their inputs, and how many were left out, by reason."""

    part: Part
    items: list[ReadItem] = field(default_factory=list)
    inputs: PreparedBatch | None = None
    left_out: Counter = field(default_factory=Counter)

    def pin_memory(self) -> "ReadPart":
        """As [`PreparedBatch.pin_memory`]."""
        if self.inputs is not None:
            self.inputs.pin_memory()
        return self


@dataclass
class Reader:
    """Reads parts; picklable.

    Args:
        source: the words of the source.
        regions: where regions come from; None where only images and captions are embedded.
        preparation: makes the inputs of the encoder; None where only captions are embedded.
        captions: whether captions are embedded.
        at_least: sides of JPEGs that are decoded at a reduced scale, as in [`open_image`].
    """

    source: str | tuple[str, ...]
    regions: Any
    preparation: Preparation | None
    captions: bool
    at_least: int | None = None

    def __call__(self, part: Part) -> ReadPart:
        read, images, shown = ReadPart(part), [], []
        source = cached_source(self.source)
        for position in part.positions:
            try:
                with foreign("annotation not readable"):
                    item, image, counts = self._read(part.shard.number, position, source)
            except LeftOut as error:
                read.left_out[f"image left out: {str(error).removeprefix('image ')}"] += 1
                continue
            read.left_out += counts
            read.items.append(item)
            images.append(image)
            same = self.at_least is None or image.size == item.size
            shown.append(item.regions if same else reduced_regions(item.regions, item.size, image.size))
        if images and self.preparation is not None:
            self._prepare(read, images, shown)
        return read

    def _prepare(self, read: ReadPart, images: list[Image.Image], shown: list[list[dict[str, Any]]]) -> None:
        """Makes the inputs. An image that the processor refuses, such as one of whose regions a center crop leaves
        nothing, is left out."""
        assert self.preparation is not None
        try:
            read.inputs = self.preparation(images, shown)
            return
        except (TypeError, ValueError):
            good = [i for i in range(len(images)) if self._is_prepared([images[i]], [shown[i]])]
            if len(good) == len(images):
                raise  # it is not one image that is wrong
        read.left_out["image left out: refused by the processor"] += len(images) - len(good)
        read.items = [read.items[i] for i in good]
        if good:
            read.inputs = self.preparation([images[i] for i in good], [shown[i] for i in good])

    def _is_prepared(self, images: list[Image.Image], shown: list[list[dict[str, Any]]]) -> bool:
        assert self.preparation is not None
        try:
            self.preparation(images, shown)
        except (TypeError, ValueError):
            return False
        return True

    def _read(self, shard: int, position: int, source: Any) -> tuple[ReadItem, Image.Image, Counter]:
        item: AnnotatedImage = source.read(position)
        _, image, size = read_image(item, self.at_least)
        regions, counts = [], Counter()
        if self.regions is not None:
            regions, counts = self.regions.read(shard, position, item, source.kind, size)
        path = _path_in_source(item, source)
        areas = [None if region["mask"] is None else int(read_rle(region["mask"]).area) for region in regions]
        captions = clean_texts(item.captions, counts) if self.captions else []
        return ReadItem(position, item.name, path, size, regions, areas, captions), image, counts


def _path_in_source(item: AnnotatedImage, source: Any) -> str | None:
    # Relative: a published dataset says nothing of where this machine keeps its files.
    folder = getattr(source, "images", None) or getattr(source, "folder", None)
    if not isinstance(item.image, Path) or not isinstance(folder, str) or not item.image.is_relative_to(folder):
        return None
    return readable(str(item.image.relative_to(folder)))


def reduced_regions(regions: Sequence[dict[str, Any]], size: Size, reduced: Size) -> list[dict[str, Any]]:
    """Regions of an image in the pixels of the same image at another size.

    Args:
        regions: in the record schema.
        size, reduced: (width, height) of the image, and of what was decoded of it.
    """
    (width, height), (new_width, new_height) = size, reduced
    box = (0.0, 0.0, float(width), float(height))
    geometry = Geometry((height, width), (new_height, new_width), box, (0.0, 0.0, float(new_width), float(new_height)))
    scaled = []
    for region in regions:
        edges = geometry.to_output(np.asarray(region["box"])).tolist()
        mask = region["mask"]
        if mask is not None:
            mask = encode_rle(sample_masks([read_rle(mask)], geometry, ["mask"])[0])
        scaled.append({**region, "box": edges, "mask": mask})
    return scaled
