"""DOCCI: a long description per image, in JSON lines."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from ...images import inside
from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, named_row

DESCRIPTIONS = "docci_descriptions.jsonlines"


@dataclass
class Docci(IndexedSource, kind="docci"):
    """DOCCI.

    Args:
        folder: above `docci_descriptions.jsonlines` and `images/`.
        split: `train`, `test`, `qual_dev` or `qual_test`; all of them when None.
    """

    folder: str
    split: str | None = None

    def annotation_files(self) -> Sequence[Path]:
        return [Path(self.folder, DESCRIPTIONS)]

    def paths(self) -> Sequence[Path]:
        return self.annotation_files()

    def rows(self, notes: Notes) -> Iterator[Row]:
        for line in read_lines(self.annotation_files()[0]):
            with notes.leaving_out("line left out: not readable"):
                entry = json.loads(line)
                if self.split in (None, entry["split"]):
                    yield named_row(itemgetter("image_file"), entry, line)

    def image_path(self, image: bytes) -> Path:
        return inside(Path(self.folder, "images"), image)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        description = json.loads(row.content)["description"]
        return AnnotatedImage(row.name, self.image_path(row.image), captions=[description])
