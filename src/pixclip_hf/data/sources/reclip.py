"""Referring expressions as ReCLIP keeps them: JSON lines with all objects of the image (`refcoco_val.jsonl`)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...record import LeftOut, foreign
from ..json_stream import read_entries, read_lines
from ..source_index import Groups, Notes, Row
from .base import IDS_PER_IMAGE, NOT_READABLE, AnnotatedImage, IndexedSource, readable, split_lists, xywh_to_xyxy


@dataclass
class Reclip(IndexedSource, kind="reclip"):
    """Referring expressions; as records, a region per sentence.

    Args:
        expressions: a line per referred object: `file_name`, `image_id`, `anns` (all objects of the image with `id`
            and `bbox`), `ann_id` (the one meant, or several) and `sentences` (`raw`).
        images: COCO's `train2014`.
        detections: boxes of a detector, `{image_id: [[x, y, width, height], …]}` or a list of `{"image_id", "box"}`,
            which are the candidates in place of the objects.
    """

    expressions: str
    images: str
    detections: str | None = None

    def annotation_files(self) -> Sequence[str]:
        return [self.expressions, *([] if self.detections is None else [self.detections])]

    def paths(self) -> Sequence[str]:
        return [*self.annotation_files(), self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        with Groups() as lines, Groups() as detections:
            for line in read_lines(self.expressions):
                with notes.leaving_out("line left out: not readable"):
                    name = _image_name(json.loads(line)["file_name"])
                    os.fsencode(name)
                    lines.add(name, line)
            for key, value, text in read_entries(self.detections) if self.detections is not None else ():
                with notes.leaving_out("detection left out: not readable"):
                    if key is None:
                        detections.add(str(value["image_id"]), json.dumps(value["box"]))
                    else:
                        detections.add(str(key), text)
            for found in lines.each():
                entry = json.loads(found[0])
                name = _image_name(entry["file_name"])
                boxes = "null"
                if self.detections is not None:
                    boxes = f"[{','.join(detections.of(str(entry.get('image_id'))))}]"
                yield Row(readable(name), os.fsencode(name), f'{{"lines": [{",".join(found)}], "boxes": {boxes}}}')

    def build(self, position: int, row: Row) -> AnnotatedImage:
        content = json.loads(row.content)
        expressions: list[dict[str, Any]] = []
        regions: list[dict[str, Any]] = []
        left_out: Counter = Counter()
        for entry in content["lines"]:
            try:
                with foreign(NOT_READABLE):
                    meant = split_lists(entry["ann_id"])
                    objects = [(annotation["id"], _corners(annotation["bbox"])) for annotation in entry["anns"]]
                    right = [box for number, box in objects if number in meant]
                    texts = [sentence["raw"] for sentence in entry["sentences"]]
            except LeftOut as error:
                left_out[str(error)] += 1
                continue
            for text in texts:
                expressions.append({"text": text, "boxes": right})
                regions += [
                    {"id": position * IDS_PER_IMAGE + len(regions) + offset, "box": box, "caption": text}
                    for offset, box in enumerate(right)
                ]
        candidates = content["boxes"]
        if candidates is None:
            candidates = [annotation["bbox"] for annotation in content["lines"][0]["anns"]]
        return AnnotatedImage(
            row.name,
            self.image_path(row.image),
            regions,
            candidates=[_corners(box) for box in candidates],
            expressions=expressions,
            left_out=left_out,
        )


def _corners(box: Sequence[Any]) -> list[float]:
    return xywh_to_xyxy([float(edge) for edge in box])


def _image_name(name: str) -> str:
    if "coco" not in name.lower():
        return name
    # COCO_train2014_000000581857_16.jpg: the image's name and the number of the object.
    return "_".join(name.rsplit(".", 1)[0].split("_")[:3]) + ".jpg"
