"""Urban1k and sets of its layout: a long text per image, in files of the same name."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..source_index import Notes, Row
from .base import IMAGE_SUFFIXES, AnnotatedImage, IndexedSource, readable


@dataclass
class Urban1k(IndexedSource, kind="urban1k"):
    """Texts in files.

    Args:
        folder: above `image/NAME.jpg` and `caption/NAME.txt`.
    """

    folder: str

    def paths(self) -> Sequence[str | Path]:
        return [Path(self.folder, "image"), Path(self.folder, "caption")]

    def rows(self, notes: Notes) -> Iterator[Row]:
        for name in sorted(os.listdir(os.fsencode(Path(self.folder, "image")))):
            if not name.startswith(b".") and os.fsdecode(os.path.splitext(name)[1]).lower() in IMAGE_SUFFIXES:
                yield Row(readable(name), name)

    def image_path(self, image: bytes) -> Path:
        return Path(self.folder, "image", os.fsdecode(image))

    def _text_path(self, image: bytes) -> Path:
        return Path(self.folder, "caption", os.fsdecode(os.path.splitext(image)[0]) + ".txt")

    def item_files(self, row: Row) -> Iterable[Path]:
        return self.image_path(row.image), self._text_path(row.image)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        path = self._text_path(row.image)
        if not path.is_file():
            raise FileNotFoundError(f"The text of an image is missing: {path}.")
        text = path.read_text(encoding="utf-8-sig").strip()
        return AnnotatedImage(row.name, self.image_path(row.image), captions=[text])
