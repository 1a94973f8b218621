"""Pascal VOC: an XML file per image, with masks of its objects where they were drawn."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ...processing.processing_regions import encode_rle
from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import IDS_PER_IMAGE, AnnotatedImage, IndexedSource, readable, walk_files


@dataclass
class PascalVoc(IndexedSource, kind="voc"):
    """Pascal VOC, and tools that write its XML.

    Args:
        folder: above `Annotations/NAME.xml` and `JPEGImages/`; where `SegmentationObject/NAME.png` is there, an object
            has the mask of its place in the XML file.
        split: name of a list in `ImageSets/Main`, such as `train`, `val` or `trainval`; all annotations when None.
    """

    folder: str
    split: str | None = None

    def paths(self) -> Sequence[Path]:
        folders = [Path(self.folder, name) for name in ("Annotations", "JPEGImages")]
        return folders if self.split is None else [*folders, self._list()]

    def _list(self) -> Path:
        return Path(self.folder, "ImageSets", "Main", f"{self.split}.txt")

    def rows(self, notes: Notes) -> Iterator[Row]:
        if self.split is None:
            stems = (os.path.splitext(path)[0] for path in walk_files(Path(self.folder, "Annotations"), (".xml",)))
        else:
            # A list of a class says 1 or -1 behind the name.
            stems = (os.fsencode(line.split()[0]) for line in read_lines(self._list()))
        for stem in stems:
            yield Row(readable(stem), stem)

    def _file(self, folder: str, row: Row, suffix: str) -> Path:
        return Path(self.folder, folder, os.fsdecode(row.image) + suffix)

    def item_files(self, row: Row) -> Iterable[Path]:
        annotations, masks = self._file("Annotations", row, ".xml"), self._file("SegmentationObject", row, ".png")
        return self._file("JPEGImages", row, ".jpg"), annotations, masks

    def build(self, position: int, row: Row) -> AnnotatedImage:
        image, annotations, masks = self.item_files(row)
        root = ElementTree.parse(annotations).getroot()
        if not image.is_file() and (name := root.findtext("filename")):
            image = image.with_name(Path(name.strip()).name)
        labels = None
        if masks.is_file():
            with Image.open(masks) as drawn:
                labels = np.asarray(drawn)
        regions = []
        for number, found in enumerate(root.iter("object")):
            # Pixels are counted from one, and the last one belongs to the box.
            corners = [float(found.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
            mask = None if labels is None or not (labels == number + 1).any() else encode_rle(labels == number + 1)
            regions.append(
                {
                    "id": position * IDS_PER_IMAGE + number,
                    "box": [corners[0] - 1, corners[1] - 1, corners[2], corners[3]],
                    "mask": mask,
                    "category": found.findtext("name"),
                }
            )
        width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        size = (width, height) if width > 0 and height > 0 else None
        return AnnotatedImage(row.name, image, regions, size=size)
