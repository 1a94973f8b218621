"""Records in Parquet files: read by their footers, and written with their images in shards of bounded size.

Parquet is made for reading a row group at a time, and training asks for any row. When the first record of a file is
asked for, the file is therefore copied, some rows at a time, into a memory-mapped Arrow file in the cache of
`datasets`. Files that nobody reads are left alone.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import MemoryMappedTable, table_cast
from filelock import FileLock
from transformers.utils import logging

from ..images import store_image, stored_bytes
from ..record import LeftOut, foreign, record_features
from .own_images import own_images
from .source_index import cache_folder, digest, file_state
from .whole_files import UNFINISHED, whole_file

if TYPE_CHECKING:
    from datasets import Features

logger = logging.get_logger(__name__)

# Of a row group, and of what is held while one is read or written. Arrow counts the bytes of a column's chunk in 32
# bits: nothing may hand it a whole shard.
_GROUP_BYTES = 2**26
_GROUP_ROWS = 100


class ParquetShards:
    """Rows of the record schema for a lazy table.

    Args:
        paths: the paths of the files, whose records follow each other.
        name: the name of the dataset, for messages.
        folders: where images may lie that a record names by their path alone.

    Raises:
        ValueError: a file lacks a column of the record schema, or has one of another type.
    """

    def __init__(self, paths: Sequence[str], name: str, folders: Sequence[str] = ()):
        self.paths, self.folders = list(paths), list(folders)
        self.states = [file_state(path) for path in self.paths]
        rows = []
        for path in self.paths:
            try:
                metadata = pq.read_metadata(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path!r} cannot be read as Parquet: {error}") from error
            rows.append(metadata.num_rows)
            in_record_schema(metadata.schema.to_arrow_schema().empty_table(), name)
        self.ends = np.cumsum(rows)
        self._tables: dict[int, MemoryMappedTable] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprint(self) -> str:
        """Fingerprint of the files and their state."""
        return digest([*self.paths, *self.states])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def make(self, positions: Iterable[int], names: Sequence[str]) -> pa.Table:
        """The fields of these names of the records at these positions."""
        positions = np.fromiter(positions, np.int64)
        pieces = []
        # Neighbors are cut out together.
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
            start, stop = (int(run[0]), int(run[-1]) + 1) if len(run) else (0, 0)
            while start < stop:
                shard = int(np.searchsorted(self.ends, start, "right"))
                first = int(self.ends[shard - 1]) if shard else 0
                end = min(stop, int(self.ends[shard]))
                piece = self._table(shard).fast_slice(start - first, end - start).select(list(names))
                pieces.append(own_images(piece, self.folders, self.paths[shard]))
                start = end
        schema = record_features().arrow_schema
        return pa.concat_tables(pieces or [schema.empty_table().select(list(names))])

    def _table(self, shard: int) -> MemoryMappedTable:
        if shard not in self._tables:
            path = self._as_arrow(shard)
            table = _whole_table(path, self._rows(shard))
            if table is None:
                logger.warning(f"The cache {str(path)!r} of {self.paths[shard]!r} is damaged and is made again.")
                path.unlink(missing_ok=True)
                table = MemoryMappedTable.from_file(str(self._as_arrow(shard)))
            self._tables[shard] = table
        return self._tables[shard]

    def _rows(self, shard: int) -> int:
        return int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))

    def _as_arrow(self, shard: int) -> Path:
        path = cache_folder() / f"{digest([self.paths[shard], self.states[shard]])}.parquet.arrow"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                for leftover in path.parent.glob(f".{path.name}.*{UNFINISHED}"):  # of a process that was killed
                    leftover.unlink()
                try:
                    with whole_file(path) as part:
                        self._write_arrow(shard, part)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"{self.paths[shard]!r} cannot be read as Parquet: {error}") from error
        return path

    def _write_arrow(self, shard: int, part: Path) -> None:
        path = self.paths[shard]
        with (
            pq.ParquetFile(path, page_checksum_verification=True) as file,
            pa.ipc.new_stream(str(part), record_features().arrow_schema) as writer,
        ):
            for batch in small_batches(file):
                writer.write_table(in_record_schema(pa.Table.from_batches([batch]), path))


def _whole_table(path: Path, rows: int) -> MemoryMappedTable | None:
    try:
        table = MemoryMappedTable.from_file(str(path))
    except (pa.ArrowException, OSError):
        return None
    return table if table.num_rows == rows else None


def in_record_schema(table: pa.Table, name: str) -> pa.Table:
    """The columns of the record schema, cast where their types differ.

    Raises:
        ValueError: a column is missing or has another type; the message says which, and names the data by `name`.
    """
    schema = record_features().arrow_schema
    if missing := sorted(set(schema.names) - set(table.column_names)):
        raise ValueError(f"{name!r} is not in the record schema: it lacks the columns {', '.join(missing)}.")
    try:
        return table_cast(table.select(schema.names), schema)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name!r} is not in the record schema: {error}") from error


def small_batches(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, groups: Iterable[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, of which at most 100, and 64 MiB by their mean, are in memory at a time.

    The mean is what the file says. It counts a value that many rows share once, and the rows that are made of it hold
    it each: a file of a few kilobytes may be more than any memory holds.

    Args:
        file: the file.
        columns: names of those that are read; all when None.
        groups: numbers of the row groups that are read; all when None.
    """
    for group in range(file.num_row_groups) if groups is None else groups:
        metadata = file.metadata.row_group(group)
        rows = min(
            metadata.num_rows, _GROUP_ROWS, _GROUP_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
        )
        yield from file.iter_batches(max(rows, 1), row_groups=[group], columns=columns)


def write_parquet(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], features: "Features") -> None:
    """Writes rows to a Parquet file, in row groups of at most 64 MiB of images or 100 rows, of any size together.

    Args:
        path: the file.
        rows: as `features` describes them; a field that a row lacks is None.
        features: the types of the columns.
    """
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for group in _groups(rows, _GROUP_ROWS, _GROUP_BYTES):
            columns = {name: [row.get(name) for row in group] for name in features}
            writer.write_table(pa.Table.from_pydict(features.encode_batch(columns), schema=schema))


def _groups(rows: Iterable[Mapping[str, Any]], most_rows: int, most_bytes: int) -> Iterator[list[Mapping[str, Any]]]:
    """Neighboring rows, as many as fit."""
    group, held = [], 0
    for row in rows:
        image = row.get("image")
        size = len(image["bytes"] or b"") if isinstance(image, Mapping) else 0
        if group and (held + size > most_bytes or len(group) == most_rows):
            yield group
            group, held = [], 0
        group.append(row)
        held += size
    if group:
        yield group


def check_images(path: str | os.PathLike) -> None:
    """Checks that a Parquet file holds its images, as others will need them.

    Args:
        path: a file of records; one without a column `image` has nothing to check.

    Raises:
        ValueError: images that are missing or only named, or that are named by a path of this machine.
    """
    with pq.ParquetFile(path) as file:
        if "image" not in file.schema_arrow.names:
            return
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            chunks = [metadata.column(number) for number in range(metadata.num_columns)]
            counts = [chunk.statistics for chunk in chunks if chunk.path_in_schema == "image.bytes"]
            if not counts or counts[0] is None or not counts[0].has_null_count:
                empty = sum(_null_images(batch.column(0)) for batch in small_batches(file, ["image"], [group]))
            else:
                empty = counts[0].null_count
            if empty:
                raise ValueError(
                    f"{str(path)!r} holds no bytes of {empty} of its images: `pixclip_hf.save_records` writes shards "
                    "with their images."
                )
            for name in _image_names(file, group):
                if name and (name.startswith(("/", "~", "\\", "file:")) or name[1:3] in (":/", ":\\")):
                    raise ValueError(f"{str(path)!r} names an image by a path of this machine: {name!r}.")


def _null_images(images: pa.Array) -> int:
    if not pa.types.is_struct(images.type) or images.type.get_field_index("bytes") < 0:
        return images.null_count
    # A null struct counts, whatever its fields hold.
    return pc.struct_field(images, "bytes").null_count


def _image_names(file: pq.ParquetFile, group: int) -> Iterator[str | None]:
    field = file.schema_arrow.field("image").type
    if pa.types.is_struct(field) and field.get_field_index("path") >= 0:
        for batch in file.iter_batches(10_000, row_groups=[group], columns=["image.path"]):
            yield from (image and image["path"] for image in batch.column(0).to_pylist())


def save_records(
    records: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike,
    split: str = "train",
    *,
    max_shard_rows: int = 10_000,
    max_shard_bytes: int = 500 * 2**20,
) -> list[Path]:
    """Writes records as Parquet shards that hold their images: `folder/train-00000.parquet`, …

    Images are stored upright and without metadata, as they are encoded where that is so already. No path of this
    machine is written, and one row group is in memory at a time.

    Args:
        records: in the record schema: a `datasets.Dataset`, or any iterable of records.
        folder: where to, made if it does not exist; it must hold no shard of this split.
        split: the name of the split.
        max_shard_rows, max_shard_bytes: most records of a shard, and most bytes of their images.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: a limit below 1, a folder that holds shards of this split, or a record whose image cannot be read;
            the message names its position.
    """
    for name, limit in (("max_shard_rows", max_shard_rows), ("max_shard_bytes", max_shard_bytes)):
        if limit < 1:
            raise ValueError(f"`{name}` must be at least 1, got {limit}.")
    folder = Path(folder)
    if present := sorted(folder.glob(f"{split}-*.parquet")):
        raise ValueError(f"`folder` must hold no shard of the split {split!r}, got {str(present[0])!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    features, paths = record_features(), []
    rows = _Ahead(_with_images(records))
    while rows.next is not None:
        paths.append(folder / f"{split}-{len(paths):05d}.parquet")
        with whole_file(paths[-1]) as unfinished:
            write_parquet(unfinished, rows.take(max_shard_rows, max_shard_bytes), features)
    return paths


class _Ahead:
    """Rows, of which the next one is known."""

    def __init__(self, rows: Iterator[dict[str, Any]]):
        self._rows = rows
        self.next = next(rows, None)

    def take(self, most_rows: int, most_bytes: int) -> Iterator[dict[str, Any]]:
        """The next row, and those behind it as long as they fit."""
        taken = held = 0
        while self.next is not None:
            held += len(self.next["image"]["bytes"])
            if taken and (taken == most_rows or held > most_bytes):
                return
            row, self.next = self.next, next(self._rows, None)
            taken += 1
            yield row


def _with_images(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Records whose images are bytes, upright, under a name without a folder."""
    if hasattr(records, "cast_column"):
        from datasets import Image

        records = records.cast_column("image", Image(decode=False))
    encode = record_features()["image"].encode_example
    for position, record in enumerate(records):
        cell = record["image"]
        try:
            with foreign("image not readable", detail=True):
                if isinstance(cell, Mapping):
                    # The user's own records: a path without bytes may lie anywhere.
                    data = stored_bytes(cell, os.path.dirname(cell.get("path") or ""))
                    name = os.path.basename(cell.get("path") or "") or None
                else:
                    data, name = encode(cell)["bytes"], None
                data, _ = store_image(data)
        except LeftOut as error:
            raise ValueError(f"`records[{position}]` must have an image that can be read: {error}") from error
        yield {**record, "image": {"bytes": data, "path": name}}
