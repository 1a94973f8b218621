"""`regions.jsonl` in a folder: a line per image, with its regions and their expressions."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, readable


@dataclass
class Regions(IndexedSource, kind="regions"):
    """A folder with `regions.jsonl`.

    Args:
        folder: holds `regions.jsonl`, whose lines have `image` (path below the folder), `width`, `height`, `captions`
            and `regions` of `id`, `category`, `box` (xyxy pixels), `segmentation` and `expressions`.
    """

    folder: str

    def annotation_files(self) -> Sequence[Path]:
        return [Path(self.folder, "regions.jsonl")]

    def paths(self) -> Sequence[str]:
        return [self.folder, str(Path(self.folder, "regions.jsonl"))]

    def rows(self, notes: Notes) -> Iterator[Row]:
        for line in read_lines(self.annotation_files()[0]):
            try:
                image = json.loads(line)["image"]
                yield Row(readable(image), os.fsencode(image), line)
            except (LookupError, TypeError, ValueError, RecursionError):
                yield Row(None, None, line)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        entry = json.loads(row.content)
        regions, left_out = [], Counter()
        for region in entry["regions"]:
            expressions = region.get("expressions") or [None]
            left_out["expression left out: beyond the first of its region"] += len(expressions) - 1
            regions.append(
                {
                    "id": region["id"],
                    "box": region["box"],
                    "mask": region.get("segmentation"),
                    "category": region["category"],
                    "caption": expressions[0],
                    "iscrowd": bool(region.get("iscrowd")),
                }
            )
        path = Path(self.folder, entry["image"])
        size = entry["width"], entry["height"]
        return AnnotatedImage(row.name, path, regions, entry["captions"], size=size, left_out=left_out)
