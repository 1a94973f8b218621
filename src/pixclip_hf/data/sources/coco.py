"""COCO and LVIS: JSON files of `images`, `categories` and `annotations`, which are regions or captions."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import AnnotatedImage, IndexedSource, first_file, readable, split_lists, xywh_to_xyxy

_OF_REGIONS = ("bbox", "segmentation", "category_id")


@dataclass
class Coco(IndexedSource, kind="coco"):
    """COCO or LVIS.

    Args:
        annotations: `instances_*.json`, `lvis_v1_*.json`, `captions_*.json`, or several of them, whose annotations of
            an image are put together.
        images: folder of the images by `file_name`; for LVIS, whose images name none, the folder above `train2017` and
            `val2017`, or one that holds them all.
        captions: another file of annotations, by custom that of the captions.
    """

    annotations: str | list[str]
    images: str
    captions: str | list[str] | None = None

    def annotation_files(self) -> Sequence[str]:
        return [*split_lists(self.annotations), *split_lists(self.captions or [])]

    def paths(self) -> Sequence[str]:
        return [*self.annotation_files(), self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        categories: dict[Any, str] = {}
        with Groups() as entries, Groups() as regions, Groups() as captions:
            for path in self.annotation_files():
                for key, value, text in read_entries(path):
                    if key == "categories":
                        categories[value["id"]] = value["name"]
                    elif key == "images":
                        entries.add(value["id"], text)
                    elif key == "annotations":
                        of_region = any(name in value for name in _OF_REGIONS)
                        (regions if of_region else captions).add(value["image_id"], text)
            for *_, entry in entries.each():
                image_id = json.loads(entry)["id"]
                parts = (",".join(texts.of(image_id)) for texts in (regions, captions))
                name = _file_name(json.loads(entry))
                content = '{{"entry": {}, "annotations": [{}], "captions": [{}]}}'.format(entry, *parts)
                yield Row(readable(name), os.fsencode(name), content)
            for kind, texts in (("annotation", regions), ("caption", captions)):
                notes.left_out[f"{kind} left out: of an unknown image"] = texts.never_asked()
        notes.category_keys, notes.categories = list(categories), list(categories.values())

    def image_path(self, image: bytes) -> Path:
        name = os.fsdecode(image)
        return first_file(self.images, name, Path(name).name)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content = json.loads(row.content)
        entry, regions, left_out = content["entry"], [], Counter()
        for annotation in content["annotations"]:
            label = self.index.position_of_category.get(annotation.get("category_id"))
            if label is None and annotation.get("category_id") is not None:
                left_out["region left out: of an unknown category"] += 1
                continue
            regions.append(
                {
                    "id": annotation["id"],
                    "box": _corners(annotation.get("bbox")),
                    "mask": annotation.get("segmentation") or None,
                    "category": None if label is None else self.categories[label].replace("_", " "),
                    "caption": annotation.get("caption"),
                    "long_caption": annotation.get("long_caption"),
                    "score": annotation.get("score"),
                    "label": label,
                    "iscrowd": bool(annotation.get("iscrowd")),
                }
            )
        captions = [*entry.get("captions", ()), *(annotation["caption"] for annotation in content["captions"])]
        size = (entry["width"], entry["height"]) if "width" in entry else None
        path = self.image_path(row.image)
        return AnnotatedImage(row.name, path, regions, captions, size=size, left_out=left_out)


def _file_name(entry: dict[str, Any]) -> str:
    # LVIS names its images by their address alone: http://images.cocodataset.org/val2017/000000000139.jpg
    return entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])


def _corners(box: Any) -> Any:
    """Two corners; what is no box stays as it is, for the reader of regions to count."""
    try:
        return xywh_to_xyxy([float(edge) for edge in box])
    except (TypeError, ValueError):
        return box
