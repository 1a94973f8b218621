"""RefCOCO, RefCOCO+ and RefCOCOg: `refs(….).p` with the `instances.json` beside it; a region per sentence."""

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import AnnotatedImage, IndexedSource, readable, xywh_to_xyxy


@dataclass
class RefCoco(IndexedSource, kind="refcoco"):
    """RefCOCO, RefCOCO+ or RefCOCOg.

    Args:
        refs: `refs(unc).p` and the like.
        instances: the `instances.json` beside it.
        images: COCO's `train2014`.
        split: `train`, `val`, `testA`, …; all of them when None.
    """

    refs: str
    instances: str
    images: str
    split: str | None = None

    def annotation_files(self) -> Sequence[str]:
        return [self.refs, self.instances]

    def paths(self) -> Sequence[str]:
        return [self.refs, self.instances, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        categories: dict[Any, str] = {}
        with Groups() as entries, Groups() as objects, Groups() as found:
            for key, value, text in read_entries(self.instances):
                if key == "categories":
                    categories[value["id"]] = value["name"]
                elif key == "images":
                    entries.add(value["id"], text)
                elif key == "annotations":
                    objects.add(value["id"], text)
            for ref in _plain_pickle(self.refs):
                if self.split not in (None, ref.get("split")):
                    continue
                annotation = objects.of(ref["ann_id"])
                if not annotation or not entries.of(ref["image_id"]):
                    notes.left_out["expression left out: of an unknown annotation"] += len(ref["sentences"])
                else:
                    said = {"image_id": ref["image_id"], "sentences": ref["sentences"]}
                    found.add(ref["image_id"], f'{{"annotation": {annotation[-1]}, "ref": {json.dumps(said)}}}')
            for refs in found.each():
                (*_, entry) = entries.of(json.loads(refs[0])["ref"]["image_id"])
                name = json.loads(entry)["file_name"]
                yield Row(readable(name), os.fsencode(name), f'{{"entry": {entry}, "refs": [{",".join(refs)}]}}')
        notes.category_keys, notes.categories = list(categories), list(categories.values())

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content, regions = json.loads(row.content), []
        for found in content["refs"]:
            annotation = found["annotation"]
            for sentence in found["ref"]["sentences"]:
                regions.append(
                    {
                        "id": sentence["sent_id"],
                        "box": xywh_to_xyxy(annotation["bbox"]),
                        "mask": annotation.get("segmentation") or None,
                        "category": self.categories[self.index.position_of_category[annotation["category_id"]]],
                        "caption": sentence["sent"],
                    }
                )
        size = content["entry"]["width"], content["entry"]["height"]
        return AnnotatedImage(row.name, self.image_path(row.image), regions, size=size)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers and texts; a pickle that asks for anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a refs file holds plain values, not {module}.{name}")


def _plain_pickle(path: str) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()
