"""COCO and LVIS: JSON files of `images`, `categories` and `annotations`, which are regions or captions."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...record import LeftOut
from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import AnnotatedImage, IndexedSource, named_row, read_each, split_lists, stated_size, xywh_to_xyxy

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
                        with notes.leaving_out("category left out: not readable"):
                            categories[value["id"]] = value["name"]
                    elif key == "images":
                        if not isinstance(value, dict) or value.get("id") is None:
                            yield Row(None, None, f'{{"entry": {text}}}')  # to be told when it is read
                        else:
                            entries.add(value["id"], text)
                    elif key == "annotations":
                        with notes.leaving_out("annotation left out: not readable"):
                            of_region = any(name in value for name in _OF_REGIONS) or "caption" not in value
                            (regions if of_region else captions).add(value["image_id"], text)
            for *_, entry in entries.each():
                image_id = json.loads(entry)["id"]
                parts = (",".join(texts.of(image_id)) for texts in (regions, captions))
                content = '{{"entry": {}, "annotations": [{}], "captions": [{}]}}'.format(entry, *parts)
                yield named_row(lambda text: _file_name(json.loads(text)), entry, content)
            for kind, texts in (("annotation", regions), ("caption", captions)):
                notes.left_out[f"{kind} left out: of an unknown image"] = texts.never_asked()
        notes.category_keys, notes.categories = list(categories), list(categories.values())

    def image_path(self, image: bytes) -> Path:
        path = super().image_path(image)
        # Or one folder holds them all.
        return path if path.is_file() else Path(self.images, path.name)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content, left_out = json.loads(row.content), Counter()
        entry, path = content["entry"], self.image_path(row.image)

        def region(_: int, annotation: dict[str, Any]) -> dict[str, Any]:
            label = self.index.position_of_category.get(annotation.get("category_id"))
            if label is None and annotation.get("category_id") is not None:
                raise LeftOut("region left out: of an unknown category")
            box = annotation.get("bbox")
            return {
                "id": annotation["id"],
                "box": xywh_to_xyxy([float(edge) for edge in box]) if box else None,
                "mask": annotation.get("segmentation") or None,
                "category": None if label is None else str(self.categories[label]).replace("_", " "),
                "caption": annotation.get("caption"),
                "long_caption": annotation.get("long_caption"),
                "score": annotation.get("score"),
                "label": label,
                "iscrowd": bool(annotation.get("iscrowd")),
            }

        regions = read_each(content["annotations"], region, left_out)
        captions = [*split_lists(entry.get("captions") or []), *(found["caption"] for found in content["captions"])]
        return AnnotatedImage(row.name, path, regions, captions, size=stated_size(entry), left_out=left_out)


def _file_name(entry: dict[str, Any]) -> str:
    # LVIS names its images by their address alone: http://images.cocodataset.org/val2017/000000000139.jpg
    return entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
