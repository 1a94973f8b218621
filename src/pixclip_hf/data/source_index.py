"""What a source lists, as Arrow files on disk: rows are memory-mapped, and no Python object stands for an item.

An index lies in the cache of `datasets` (`HF_DATASETS_CACHE/pixclip_hf`), under a name that is made of the content of
what it was read from. An annotation file that was edited has another name, and is read again.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..record import LeftOut, foreign
from .whole_files import file_fault, file_record, sync

logger = logging.get_logger(__name__)

# Part of every key: raise it when rows change their meaning.
_VERSION = 2
_FILE = "file"  # entry of the notes: size and checksum of the rows
_BATCH = 1000  # rows
_BATCH_BYTES = 2**24  # in text


class Row(NamedTuple):
    """An item of a source.

    Attributes:
        name: the name of its record; None where only the content tells it.
        image: path of its image relative to the source's folder of images, as the file system encodes it; None where
            the image is no file of its own.
        content: what the source holds of the item, as JSON; None where all of it lies in other files.
    """

    # Any, since a kind knows which of them its rows have.
    name: Any
    image: Any = None
    content: Any = None


@dataclass
class Notes:
    """What a source says beside its items.

    Attributes:
        categories: names, in the source's order; category_keys: what its annotations call them by, where that is
            not the position.
        left_out: annotations that belong to no item, by reason.
    """

    categories: list[str] = field(default_factory=list)
    category_keys: list[Any] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    @contextmanager
    def leaving_out(self, reason: str) -> Iterator[None]:
        """Counts what can't be read of one entry, and goes on behind it."""
        try:
            with foreign(reason):
                yield
        except LeftOut as error:
            self.left_out[str(error)] += 1


class Index:
    """Rows on disk.

    Args:
        paths: Arrow files that [`build_index`] and [`list_index`] wrote; their rows follow each other.
    """

    def __init__(self, paths: Sequence[Path]):
        from datasets.table import MemoryMappedTable, concat_tables

        notes = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in paths]
        tables = [MemoryMappedTable.from_file(str(path)) for path in paths]
        self.table = concat_tables(tables) if len(tables) > 1 else tables[0]
        self.counts = [table.num_rows for table in tables]
        """Number of rows in each file."""
        self.categories: list[str] = [name for note in notes for name in note["categories"]]
        self.position_of_category = {key: i for i, key in enumerate(key for n in notes for key in n["category_keys"])}
        self.left_out: Counter = sum((Counter(note["left_out"]) for note in notes), Counter())
        self.digest = digest({name: note[name] for name in note if name != _FILE} for note in notes)
        """Fingerprint of all rows and notes: what is listed, and in which order."""

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, position: int) -> Row:
        columns = self.table.fast_slice(position, 1).to_pydict()
        return Row(*(columns[name][0] for name in Row._fields))

    def rows(self) -> Iterator[Row]:
        """All rows; a batch of them is in memory at a time."""
        for batch in self.table.to_reader(max_chunksize=_BATCH):
            yield from map(Row, *(batch.column(name).to_pylist() for name in Row._fields))


def build_index(key: str, rows: Callable[[Notes], Iterable[Row]]) -> Path:
    """The index of this key, made if it is not there.

    Args:
        key: [`digest`] of all that decides the rows.
        rows: yields them, and fills in the notes.
    """
    path = cache_folder() / f"{key}.arrow"
    if path.exists():
        if (fault := _fault(path)) is None:
            return path
        logger.warning(f"The index {str(path)!r} {fault}; it is made again.")
    return _write(rows, lambda _: path)


def list_index(rows: Callable[[Notes], Iterable[Row]]) -> Path:
    """The index of rows that are listed again whenever a source is opened, named by their own content."""
    return _write(rows, lambda content: cache_folder() / f"{content}.arrow")


def _fault(path: Path) -> str | None:
    """What is wrong with an index, in words that follow its name, or None."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "lacks its notes"
    # Versions before 0.2 kept no checksum.
    return file_fault(path, notes[_FILE]) if _FILE in notes else None


def _write(rows: Callable[[Notes], Iterable[Row]], name: Callable[[str], Path]) -> Path:
    """Writes the notes and then the rows, each whole or not at all; `name` makes the path of the rows' digest."""
    # Not at the top: model cards, which need no Arrow, import the sources for what they are called.
    import pyarrow as pa

    schema = pa.schema({"name": pa.string(), "image": pa.binary(), "content": pa.large_string()})
    notes, sha, parts = Notes(), hashlib.sha256(), []
    try:
        for _ in range(2):
            with tempfile.NamedTemporaryFile(dir=cache_folder(), suffix=".tmp", delete=False) as file:
                parts.append(Path(file.name))
        with pa.ipc.new_stream(str(parts[0]), schema) as writer:
            for batch in _batches(rows(notes), lambda row: len(row.content or "")):
                for row in batch:
                    sha.update(repr(tuple(row)).encode("utf-8", "surrogatepass"))
                writer.write_table(pa.table([list(column) for column in zip(*batch, strict=True)], schema=schema))
        said = {
            "categories": notes.categories,
            "category_keys": notes.category_keys,
            "left_out": dict(+notes.left_out),
            "digest": sha.hexdigest(),
        }
        parts[1].write_text(json.dumps({**said, _FILE: file_record(parts[0])}), encoding="utf-8")
        for part in parts:
            sync(part)
        path = name(digest([said]))
        os.replace(parts[1], path.with_suffix(".json"))
        os.replace(parts[0], path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return path


def _batches(rows: Iterable[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    batch, held = [], 0
    for row in rows:
        batch.append(row)
        held += size(row)
        if len(batch) == _BATCH or held > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def cache_folder() -> Path:
    """Where indexes lie."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE, "pixclip_hf")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(parts: Iterable[Any]) -> str:
    """A name made of plain values."""
    sha = hashlib.sha256(str(_VERSION).encode())
    for part in parts:
        sha.update(f"{part!r}\n".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()[:32]


def content_digest(path: str | Path) -> str:
    """A name made of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_state(path: str | bytes | Path) -> tuple[int, int, int, int] | None:
    """What tells an edited file from the one before, without reading it: size, times of change, and number on its
    disk. None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class Groups:
    """Texts by a key, on disk: the annotations of an image, which a file has in any order.

    Use it as a context manager: `add` all texts, then ask for those of each key with `of`.
    """

    def __init__(self) -> None:
        import pyarrow as pa

        self._folder = tempfile.TemporaryDirectory(dir=cache_folder())
        self._path = Path(self._folder.name, "texts.arrow")
        self._schema = pa.schema({"text": pa.large_string()})
        self._writer = pa.ipc.new_stream(str(self._path), self._schema)
        self._keys, self._held = array("Q"), 0
        self._waiting: list[str] = []
        self._order: Any = None
        self._table: Any = None

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: Any) -> None:
        self._writer.close()
        self._table = None
        self._folder.cleanup()

    def add(self, key: Any, text: str) -> None:
        self._keys.append(_number(key))
        self._waiting.append(text)
        self._held += len(text)
        if len(self._waiting) == _BATCH or self._held > _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.table([self._waiting], schema=self._schema))
        self._waiting, self._held = [], 0

    def _close(self) -> None:
        from datasets.table import MemoryMappedTable

        self._flush()
        self._writer.close()
        keys = np.frombuffer(self._keys, dtype=np.uint64)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        self._asked = np.zeros(len(keys), dtype=bool)
        self._table = MemoryMappedTable.from_file(str(self._path)) if len(keys) else None

    def of(self, key: Any) -> list[str]:
        """The texts of a key, in the order that they were added in."""
        if self._order is None:
            self._close()
        number = np.uint64(_number(key))
        first, last = (np.searchsorted(self._sorted, number, side) for side in ("left", "right"))
        if first == last:
            return []
        self._asked[first:last] = True
        return self._table.fast_gather(self._order[first:last]).column("text").to_pylist()

    def each(self) -> Iterator[list[str]]:
        """The texts of every key, in the order in which the keys came first."""
        if self._order is None:
            self._close()
        firsts = np.unique(self._sorted, return_index=True)[1]
        ends = np.append(firsts[1:], len(self._sorted))
        for group in np.argsort(self._order[firsts]):
            yield self._table.fast_gather(self._order[firsts[group] : ends[group]]).column("text").to_pylist()

    def never_asked(self) -> int:
        """Texts of keys that `of` was not called with."""
        if self._order is None:
            self._close()
        return int((~self._asked).sum())


def _number(key: Any) -> int:
    """64 bits of a key of any plain type."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
