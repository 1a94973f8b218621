"""Where the regions of a collection come from: annotations, an object detector, or a grid of windows."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from ..data.sources import IMAGE_SUFFIXES, load_records
from ..data.sources.base import readable, walk_files
from ..images import open_image
from ..record import LeftOut, foreign
from ..scenes.dataset import make_scene

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Collection:
    """Images and their regions.

    Args:
        images: folder of images, read with all its subfolders.
        dataset: folder or Hub id of a dataset in the record schema, in place of `images`.
        split: the split of the dataset.
        source: words of any other source, as in [`load_records`], whose regions are taken.
        scenes: number of drawn scenes, where none of these is given.
        detector: object detector of transformers that proposes the regions of `images`, in place of a grid.
        detector_threshold: least score of its boxes.
        grid: windows per side of an image; each number is a size of window.

    Raises:
        ValueError: two of `images`, `dataset` and `source`, or `images` that is not a folder.
    """

    images: str | None = None
    dataset: str | None = None
    split: str = "train"
    source: Sequence[str] | None = None
    scenes: int = 200
    detector: str | None = None
    detector_threshold: float = 0.3
    grid: Sequence[int] = (1, 3, 7)

    def __post_init__(self) -> None:
        if self.images is not None and self.dataset is not None:
            raise ValueError(f"`images` and `dataset` exclude each other, got {self.images!r} and {self.dataset!r}.")
        if self.source is not None and (self.images or self.dataset) is not None:
            raise ValueError(
                f"`source` takes the place of `images` and `dataset`, got {list(self.source)} and "
                f"{self.images or self.dataset!r}."
            )
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"`images` must be a folder, got {self.images!r}.")

    def read(self) -> Iterator[dict[str, Any]]:
        """The images one by one. One that can't be read is logged with its name and passed over.

        Yields:
            `name`, `image` (RGB) and `regions`, each with a `box` (xyxy, pixels), a `mask` or None, and `text`, what
            it is known to show, or None.
        """
        if self.images is None:
            records = self._records()
            for index in range(len(records)):
                try:
                    with foreign("record not readable", detail=True):
                        record = records[index]
                        image = open_image(record["image"])
                except LeftOut as error:
                    logger.warning(f"Passed over record {index}: {error}")
                    continue
                regions = [{**region, "text": region["caption"] or region["category"]} for region in record["regions"]]
                yield {"name": str(index), "image": image, "regions": regions}
            return
        detect = pipeline("object-detection", model=self.detector) if self.detector else None
        for path, name in self._paths():
            try:
                with foreign("image not readable", detail=True):
                    image = open_image(path)
            except LeftOut as error:
                logger.warning(f"Passed over {name!r}: {error}")
                continue
            if detect is None:
                found = [{"box": box, "text": None} for box in grid_boxes(*image.size, self.grid)]
            else:
                corners = ("xmin", "ymin", "xmax", "ymax")
                found = [
                    {"box": [float(hit["box"][corner]) for corner in corners], "text": hit["label"]}
                    for hit in detect(image, threshold=self.detector_threshold)
                ]
            yield {"name": name, "image": image, "regions": [{**region, "mask": None} for region in found]}

    def open_images(self, names: set[str]) -> dict[str, Image.Image]:
        """The images of these names, RGB.

        Raises:
            FileNotFoundError: an image of the collection is no longer where it was.
        """
        if self.images is None:
            records = self._records()
            numbers = sorted(int(name) for name in names if int(name) < len(records))
            found = {str(index): open_image(records[index]["image"]) for index in numbers}
        else:
            found = {name: open_image(path) for path, name in self._paths() if name in names}
        if missing := sorted(names - found.keys()):
            raise FileNotFoundError(
                f"{len(missing)} images of the collection are no longer there, {missing[0]!r} among them. Relative "
                "paths begin at the folder in which the regions were embedded."
            )
        return found

    def _records(self) -> Sequence[dict[str, Any]]:
        if self.source is None and self.dataset is None:
            return _Scenes(self.scenes)
        records = load_records(self.source) if self.source is not None else load_records(self.dataset, self.split)
        return records.cast_column("image", ImageFeature(decode=False))

    def _paths(self) -> Iterator[tuple[Path, str]]:
        """Paths of images, and their names as text."""
        folder = Path(self.images or "")
        for path in walk_files(folder, IMAGE_SUFFIXES):
            found = folder / os.fsdecode(path)
            yield found, readable(str(found))


class _Scenes(Sequence):
    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return make_scene(index, "test")


def grid_boxes(width: int, height: int, counts: Sequence[int]) -> list[list[float]]:
    """Windows that overlap by half, for each of `counts` as many along either side; 1 is the whole image."""
    boxes = []
    for count in counts:
        side = 2 / (count + 1)
        steps = [side / 2 * step for step in range(count)]
        boxes += [[x * width, y * height, (x + side) * width, (y + side) * height] for y in steps for x in steps]
    return boxes
