"""`regions.jsonl` in a folder: a line per image, with its regions and their expressions."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, named_row, read_each, split_lists, stated_size


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
            yield named_row(lambda text: json.loads(text)["image"], line, line)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        entry, left_out = json.loads(row.content), Counter()

        def region(_: int, found: dict[str, Any]) -> dict[str, Any]:
            expressions = split_lists(found.get("expressions") or [None])
            left_out["expression left out: beyond the first of its region"] += len(expressions) - 1
            return {
                "id": found["id"],
                "box": found.get("box"),
                "mask": found.get("segmentation"),
                "category": found.get("category"),
                "caption": expressions[0],
                "iscrowd": bool(found.get("iscrowd")),
            }

        path = self.image_path(entry["image"])
        regions = read_each(entry.get("regions"), region, left_out)
        captions, size = entry.get("captions"), stated_size(entry)
        return AnnotatedImage(row.name, path, regions, captions, size=size, left_out=left_out)
