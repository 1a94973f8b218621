"""Pascal VOC: an XML file per image, with masks of its objects where they were drawn."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ...images import inside
from ...processing.processing_regions import encode_rle
from ...record import LeftOut, foreign
from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import IDS_PER_IMAGE, AnnotatedImage, IndexedSource, read_each, readable, walk_files, xml_size


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
        return inside(Path(self.folder, folder), os.fsdecode(row.image) + suffix)

    def item_files(self, row: Row) -> Iterable[Path]:
        annotations, masks = self._file("Annotations", row, ".xml"), self._file("SegmentationObject", row, ".png")
        return self._file("JPEGImages", row, ".jpg"), annotations, masks

    def build(self, position: int, row: Row) -> AnnotatedImage:
        image, annotations, masks = self.item_files(row)
        root = ElementTree.parse(annotations).getroot()
        if not image.is_file() and (name := root.findtext("filename")):
            image = image.with_name(Path(name.strip()).name)
        labels, left_out = None, Counter()
        if masks.is_file():
            try:
                with foreign("mask left out: empty or not readable"), Image.open(masks) as drawn:
                    labels = np.asarray(drawn)
            except LeftOut as error:
                left_out[str(error)] += len(list(root.iter("object")))

        def region(number: int, found: ElementTree.Element) -> dict[str, Any]:
            mask = None if labels is None or not (labels == number + 1).any() else encode_rle(labels == number + 1)
            box = None
            if mask is None or found.find("bndbox") is not None:
                # Pixels are counted from one, and the last one belongs to the box.
                corners = [float(found.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
                box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
            category = found.findtext("name")
            return {"id": position * IDS_PER_IMAGE + number, "box": box, "mask": mask, "category": category}

        regions = read_each(list(root.iter("object")), region, left_out)
        return AnnotatedImage(row.name, image, regions, size=xml_size(root), left_out=left_out)
