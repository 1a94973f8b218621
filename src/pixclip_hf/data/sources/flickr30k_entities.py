"""Flickr30k Entities: sentences with marked phrases, and boxes by entity; a region per box and wording."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import IDS_PER_IMAGE, AnnotatedImage, IndexedSource, read_each, readable, walk_files, xml_size

_PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")


@dataclass
class Flickr30kEntities(IndexedSource, kind="flickr30k"):
    """Flickr30k Entities.

    Args:
        folder: above `Sentences/ID.txt` and `Annotations/ID.xml`.
        images: folder of `ID.jpg`.
    """

    folder: str
    images: str

    def paths(self) -> Sequence[str]:
        return [self.folder, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        for path in walk_files(Path(self.folder, "Annotations"), (".xml",)):
            name = os.path.splitext(path)[0]
            yield Row(readable(name), name + b".jpg")

    def item_files(self, row: Row) -> Iterable[Path]:
        stem = os.fsdecode(row.image)[: -len(".jpg")]
        return self.image_path(row.image), self._sentences(stem), self._annotations(stem)

    def _sentences(self, stem: str) -> Path:
        return Path(self.folder, "Sentences", f"{stem}.txt")

    def _annotations(self, stem: str) -> Path:
        return Path(self.folder, "Annotations", f"{stem}.xml")

    def image_path(self, image: bytes) -> Path:
        return Path(self.images, os.fsdecode(image))

    def build(self, position: int, row: Row) -> AnnotatedImage:
        stem = os.fsdecode(row.image)[: -len(".jpg")]
        lines = list(read_lines(self._sentences(stem)))
        phrases, left_out = defaultdict(list), Counter()
        for entity, phrase in (match for line in lines for match in _PHRASE.findall(line)):
            if phrase not in phrases[entity]:
                phrases[entity].append(phrase)
        root = ElementTree.parse(self._annotations(stem)).getroot()
        boxed: set[Any] = set()
        said = []
        for item in root.iter("object"):
            corners = item.find("bndbox")
            for entity in (node.text for node in item.iter("name")):
                if corners is not None:
                    boxed.add(entity)
                    said += [(corners, phrase) for phrase in phrases[entity]]

        def region(number: int, found: tuple[ElementTree.Element, str]) -> dict[str, Any]:
            # Pixels are counted from one there, and the last one belongs to the box.
            x0, y0, x1, y1 = (float(found[0].findtext(edge, "")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            return {"id": position * IDS_PER_IMAGE + number, "box": (x0 - 1, y0 - 1, x1, y1), "caption": found[1]}

        regions = read_each(said, region, left_out)
        left_out["phrase left out: without a box"] = sum(len(phrases[key]) for key in phrases if key not in boxed)
        captions = [_PHRASE.sub(r"\2", line) for line in lines]
        size = xml_size(root)
        image = self.image_path(row.image)
        return AnnotatedImage(row.name, image, regions, captions, size=size, left_out=left_out)
