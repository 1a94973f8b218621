"""A folder of images without annotations."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..source_index import Notes, Row
from .base import IMAGE_SUFFIXES, AnnotatedImage, IndexedSource, readable, walk_files


@dataclass
class Images(IndexedSource, kind="images"):
    """Images below a folder, in the order of their names; `x.txt` beside `x.jpg` is its alt text.

    Args:
        folder: searched with all its subfolders.
    """

    folder: str

    def paths(self) -> Sequence[str]:
        return [self.folder]

    def rows(self, notes: Notes) -> Iterator[Row]:
        return (Row(readable(path), path) for path in walk_files(self.folder, IMAGE_SUFFIXES))

    def item_files(self, row: Row) -> Iterable[Path]:
        path = self.image_path(row.image)
        return path, path.with_suffix(".txt")

    def build(self, position: int, row: Row) -> AnnotatedImage:
        path = self.image_path(row.image)
        text = path.with_suffix(".txt")
        alt_text = text.read_text(encoding="utf-8-sig", errors="replace") if text.is_file() else None
        return AnnotatedImage(row.name, path, alt_text=alt_text)
