"""Karpathy's splits of COCO and Flickr30k, and Flickr30k's test captions: images with five captions each."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..json_stream import read_entries
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, named_row


@dataclass
class Karpathy(IndexedSource, kind="karpathy"):
    """Captions for retrieval.

    Args:
        annotations: `dataset_coco.json`, `dataset_flickr30k.json` (`images` with `filename`, `split`, `sentences`), or
            a list of `filename` and `captions` (`test_caption.json`), which has no splits.
        images: folder of the images, by `filepath` and `filename`.
        split: `train`, `restval`, `val` or `test`; all of them when None.
    """

    annotations: str
    images: str
    split: str | None = None

    def annotation_files(self) -> Sequence[str]:
        return [self.annotations]

    def paths(self) -> Sequence[str]:
        return [self.annotations, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        for key, entry, text in read_entries(self.annotations):
            if key not in (None, "images") or not isinstance(entry, dict):
                notes.left_out["image left out: not readable"] += key in (None, "images")
            elif self.split in (None, entry.get("split")):
                yield named_row(_file_name, entry, text)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        entry = json.loads(row.content)
        captions = entry.get("captions") or [sentence["raw"] for sentence in entry["sentences"]]
        return AnnotatedImage(row.name, self.image_path(row.image), captions=captions)


def _file_name(entry: dict[str, Any]) -> str:
    return os.path.join(entry.get("filepath") or "", entry["filename"])
