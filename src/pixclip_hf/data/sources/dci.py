"""DCI, densely captioned images: a JSON file per photograph."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...images import inside
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, listed, readable, walk_files


@dataclass
class Dci(IndexedSource, kind="dci"):
    """DCI; the text of an image is its short caption and its extra caption.

    Args:
        folder: above `annotations/*.json`, `photos/`, and `splits.json` where there are splits.
        split: a name in `splits.json`; all annotations when None.
    """

    folder: str
    split: str | None = None

    def paths(self) -> Sequence[Path]:
        splits = [Path(self.folder, "splits.json")] if self.split is not None else []
        return [Path(self.folder, "annotations"), Path(self.folder, "photos"), *splits]

    def rows(self, notes: Notes) -> Iterator[Row]:
        chosen = None
        if self.split is not None:
            path = Path(self.folder, "splits.json")
            chosen = set(listed(json.loads(path.read_text(encoding="utf-8-sig")), self.split, str(path)))
        for name in walk_files(Path(self.folder, "annotations"), (".json",)):
            if chosen is None or os.fsdecode(name) in chosen:
                yield Row(readable(name), content=json.dumps(os.fsencode(name).hex()))

    def _annotation(self, row: Row) -> Path:
        return Path(self.folder, "annotations", os.fsdecode(bytes.fromhex(json.loads(row.content))))

    def item_files(self, row: Row) -> Iterable[Path]:
        path = self._annotation(row)
        # The photograph is named in there.
        return path, self._photo(json.loads(path.read_text(encoding="utf-8-sig")))

    def _photo(self, entry: dict[str, Any]) -> Path:
        return inside(Path(self.folder, "photos"), os.fsencode(entry["image"]))

    def build(self, position: int, row: Row) -> AnnotatedImage:
        entry = json.loads(self._annotation(row).read_text(encoding="utf-8-sig"))
        text = f"{entry['short_caption'].strip()}\n{entry['extra_caption'].strip()}"
        return AnnotatedImage(readable(entry["image"]), self._photo(entry), captions=[text])
