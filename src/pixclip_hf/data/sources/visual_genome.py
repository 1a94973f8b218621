"""Visual Genome: regions with captions or objects with names, and `image_data.json` beside them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import AnnotatedImage, IndexedSource, first_file, xywh_to_xyxy


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
                sizes.add(_image_id(value), json.dumps([value["width"], value["height"]]))
            for _, value, text in read_entries(self.annotations):
                image_id = _image_id(value)
                if size := sizes.of(image_id):
                    name = f"{image_id}.jpg"
                    yield Row(name, name.encode(), f'{{"entry": {text}, "size": {size[-1]}}}')
                else:
                    notes.left_out["region left out: of an unknown image"] += len(_listed(value))

    def image_path(self, image: bytes) -> Path:
        name = image.decode()
        return first_file(self.images, name, f"VG_100K/{name}", f"VG_100K_2/{name}")

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content, regions = json.loads(row.content), []
        for found in _listed(content["entry"]):
            width: Any = found.get("width", found.get("w"))
            height: Any = found.get("height", found.get("h"))
            regions.append(
                {
                    "id": found.get("region_id", found.get("object_id")),
                    "box": xywh_to_xyxy((found["x"], found["y"], width, height)),
                    "category": (found.get("names") or [None])[0],
                    "caption": found.get("phrase"),
                }
            )
        size = content["size"][0], content["size"][1]
        return AnnotatedImage(row.name, self.image_path(row.image), regions, size=size)


def _image_id(entry: dict[str, Any]) -> Any:
    return entry.get("image_id", entry.get("id"))


def _listed(entry: dict[str, Any]) -> Any:
    return entry.get("regions", entry.get("objects"))
