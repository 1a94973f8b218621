"""RefCOCO, RefCOCO+ and RefCOCOg: `refs(….).p` with the `instances.json` beside it; a region per sentence."""

import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..json_stream import read_entries
from ..source_index import Groups, Notes, Row
from .base import NOT_READABLE, AnnotatedImage, IndexedSource, read_each, readable, stated_size, xywh_to_xyxy


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
                    with notes.leaving_out("category left out: not readable"):
                        categories[value["id"]] = value["name"]
                elif key == "images":
                    with notes.leaving_out("image left out: not readable"):
                        os.fsencode(value["file_name"])
                        entries.add(value["id"], text)
                elif key == "annotations":
                    with notes.leaving_out("annotation left out: not readable"):
                        objects.add(value["id"], text)
            for ref in _plain_pickle(self.refs):
                with notes.leaving_out("expression left out: not readable"):
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
        content, left_out = json.loads(row.content), Counter()
        said = []
        for found in content["refs"]:
            sentences = found["ref"].get("sentences")
            if isinstance(sentences, list):
                said += [(found["annotation"], sentence) for sentence in sentences]
            else:
                left_out[NOT_READABLE] += 1

        def region(_: int, found: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
            annotation, sentence = found
            label = self.index.position_of_category.get(annotation.get("category_id"))
            box = annotation.get("bbox")
            # Whoever described a crowd meant all of it: it is no crowd here.
            return {
                "id": sentence["sent_id"],
                "box": xywh_to_xyxy([float(edge) for edge in box]) if box else None,
                "mask": annotation.get("segmentation") or None,
                "category": None if label is None else self.categories[label],
                "caption": sentence["sent"],
            }

        regions = read_each(said, region, left_out)
        size = stated_size(content["entry"])
        return AnnotatedImage(row.name, self.image_path(row.image), regions, size=size, left_out=left_out)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers and texts; a pickle that asks for anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a refs file holds plain values, not {module}.{name}")


def _plain_pickle(path: str) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()
