"""GRIT as img2dataset leaves it: tars or folders with `KEY.json` beside `KEY.jpg`."""

import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...record import LeftOut, foreign
from ..source_index import Index, Notes, Row, build_index, digest, file_state, list_index
from .base import (
    IDS_PER_IMAGE,
    IMAGE_SUFFIXES,
    NOT_READABLE,
    AnnotatedImage,
    IndexedSource,
    read_each,
    readable,
    walk_files,
)

logger = logging.get_logger(__name__)


@dataclass
class Grit(IndexedSource, kind="grit"):
    """GRIT.

    The metadata have `caption`, and `noun_chunks` and `ref_exps` as [start, end, x0, y0, x1, y1, score]: characters of
    the caption and shares of the image's sides. A noun chunk whose box a referring expression has is left out: the
    expression holds it.

    Args:
        folder: a folder of tars, or of folders of files; searched with all its subfolders.
    """

    folder: str

    def paths(self) -> Sequence[str]:
        return [self.folder]

    def open_index(self) -> Index:
        # The index of a tar is kept until the tar changes: reading all its headers takes as long as reading its files.
        paths = [self._tar_index(path) for path in walk_files(self.folder, (".tar",))]
        return Index([*paths, list_index(self.rows)])

    def units(self) -> Sequence[tuple[int, int | None]]:
        sizes = [file_state(self._tar(path)) for path in walk_files(self.folder, (".tar",))]
        return list(zip(self.index.counts, [*(size and size[0] for size in sizes), None], strict=True))

    def _tar_index(self, path: bytes) -> Path:
        key = digest([self.kind, path, file_state(self._tar(path))])
        return build_index(key, lambda notes: self._tar_rows(path, notes))

    def _tar(self, path: bytes) -> Path:
        return Path(self.folder, os.fsdecode(path))

    def _tar_rows(self, path: bytes, notes: Notes) -> Iterator[Row]:
        """Where the files of each pair of a tar lie in it; their content is not read."""
        pairs: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            # Uncompressed: files of a compressed one do not lie where their headers say.
            with foreign("tar left out: not readable"), tarfile.open(self._tar(path), "r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    if member.isreg() and not os.path.basename(key).startswith("."):
                        pairs[key][f".{suffix.lower()}"] = member.offset_data, member.size
        except LeftOut as error:
            logger.warning(f"The tar {str(self._tar(path))!r} is left out from here on: {error.__cause__}")
            notes.left_out[str(error)] += 1
        shard = readable(os.path.splitext(path)[0])
        for key, files in pairs.items():
            image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
            if image is not None and ".json" in files:
                place = [os.fsencode(path).hex(), *files[".json"], *image]
                yield Row(f"{shard}/{readable(key)}", None, json.dumps(place))

    def rows(self, notes: Notes) -> Iterator[Row]:
        """The pairs that lie in folders."""
        for path in walk_files(self.folder, (".json",)):
            stem = os.path.splitext(path)[0]
            names = (stem + suffix.encode() for suffix in IMAGE_SUFFIXES)
            image = next((name for name in names if self.image_path(name).is_file()), None)
            if image is not None:
                yield Row(readable(stem), image)

    def fingerprint(self) -> str:
        tars = [(path, file_state(self._tar(path))) for path in walk_files(self.folder, (".tar",))]
        return digest([super().fingerprint(), *tars])

    def item_files(self, row: Row) -> Iterable[Path]:
        if row.image is None:
            return ()
        path = self.image_path(row.image)
        return path, path.with_suffix(".json")

    def build(self, position: int, row: Row) -> AnnotatedImage:
        image: bytes | Path
        if row.image is not None:
            image = self.image_path(row.image)
            text = image.with_suffix(".json").read_bytes()
        else:
            path, *places = json.loads(row.content)
            with open(self._tar(bytes.fromhex(path)), "rb") as file:
                text, image = (_read_at(file, *places[at : at + 2]) for at in (0, 2))
        entry, left_out = json.loads(text), Counter()
        caption = entry.get("caption")
        expressions = _listed(entry.get("ref_exps"), left_out)
        chunks = _listed(entry.get("noun_chunks"), left_out)
        taken = {repr(expression[2:6]) for expression in expressions if isinstance(expression, list)}
        beyond = [chunk for chunk in chunks if not (isinstance(chunk, list) and repr(chunk[2:6]) in taken)]
        left_out["noun chunk left out: part of a referring expression"] += len(chunks) - len(beyond)

        def region(number: int, found: list[Any]) -> dict[str, Any]:
            start, end, x0, y0, x1, y1, score = found
            said = caption[int(start) : int(end)]
            number += position * IDS_PER_IMAGE
            return {"id": number, "box": [x0, y0, x1, y1], "caption": said, "score": score}

        regions = read_each([*expressions, *beyond], region, left_out)
        return AnnotatedImage(row.name, image, regions, alt_text=caption, normalized=True, left_out=left_out)


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _listed(value: Any, left_out: Counter) -> list:
    """A list, which img2dataset may have written as JSON text."""
    try:
        with foreign(NOT_READABLE):
            found = json.loads(value) if isinstance(value, str) else value
            return list(found or ())
    except LeftOut as error:
        left_out[str(error)] += 1
        return []
