"""Visual Genome: regions with captions or objects with names, and `image_data.json` beside them."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...images import inside
from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import (
    AnnotatedImage,
    IndexedSource,
    first_file,
    read_each,
    readable,
    split_lists,
    stated_size,
    xywh_to_xyxy,
)


@dataclass
class VisualGenome(IndexedSource, kind="vg"):
    """Visual Genome.

    Args:
        annotations: `region_descriptions.json` (captions) or `objects.json` (categories), with `image_data.json`
            beside it.
        images: the folder of the images, or the one above `VG_100K` and `VG_100K_2`.
    """

    annotations: str
    images: str

    def annotation_files(self) -> Sequence[str | Path]:
        return [self.annotations, Path(self.annotations).with_name("image_data.json")]

    def paths(self) -> Sequence[str]:
        return [self.annotations, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        with Groups() as sizes:
            for _, value, _ in read_entries(self.annotation_files()[1]):
                with notes.leaving_out("image left out: not readable"):
                    sizes.add(_image_id(value), json.dumps(stated_size(value)))
            for _, value, text in read_entries(self.annotations):
                size, name = [], ""
                with notes.leaving_out("image left out: not readable"):
                    size, name = sizes.of(_image_id(value)), f"{_image_id(value)}.jpg"
                    if not size:
                        notes.left_out["region left out: of an unknown image"] += len(_listed(value))
                if size:
                    yield Row(readable(name), os.fsencode(name), f'{{"entry": {text}, "size": {size[-1]}}}')

    def image_path(self, image: bytes) -> Path:
        name = inside("", image)
        return first_file(self.images, str(name), f"VG_100K/{name}", f"VG_100K_2/{name}")

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content, left_out = json.loads(row.content), Counter()

        def region(_: int, found: dict[str, Any]) -> dict[str, Any]:
            sides: list[Any] = [found.get("width", found.get("w")), found.get("height", found.get("h"))]
            return {
                "id": found.get("region_id", found.get("object_id")),
                "box": xywh_to_xyxy([float(edge) for edge in (found["x"], found["y"], *sides)]),
                "category": split_lists(found.get("names") or [None])[0],
                "caption": found.get("phrase"),
            }

        regions = read_each(_listed(content["entry"]), region, left_out)
        size = None if content["size"] is None else (content["size"][0], content["size"][1])
        return AnnotatedImage(row.name, self.image_path(row.image), regions, size=size, left_out=left_out)


def _image_id(entry: dict[str, Any]) -> Any:
    return entry.get("image_id", entry.get("id"))


def _listed(entry: dict[str, Any]) -> Any:
    return entry.get("regions", entry.get("objects"))
