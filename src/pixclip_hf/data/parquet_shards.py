"""Records in Parquet files, opened by their footers.

Parquet is made for reading a row group at a time, and training asks for any row. When the first record of a file is
asked for, the file is therefore copied, row group by row group, into a memory-mapped Arrow file in the cache of
`datasets`. Files that nobody reads are left alone.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import MemoryMappedTable, table_cast
from filelock import FileLock

from ..record import record_features
from .source_index import cache_folder, digest, file_state


class ParquetShards:
    """Rows of the record schema for a lazy table.

    Args:
        paths: the paths of the files, whose records follow each other.
        name: the name of the dataset, for messages.

    Raises:
        ValueError: a file lacks a column of the record schema, or has one of another type.
    """

    def __init__(self, paths: Sequence[str], name: str):
        self.paths = list(paths)
        self.states = [file_state(path) for path in self.paths]
        rows = []
        for path in self.paths:
            try:
                metadata = pq.read_metadata(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path!r} cannot be read as Parquet: {error}") from error
            rows.append(metadata.num_rows)
            _in_schema(metadata.schema.to_arrow_schema().empty_table(), name)
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
                pieces.append(self._table(shard).fast_slice(start - first, end - start).select(list(names)))
                start = end
        schema = record_features().arrow_schema
        return pa.concat_tables(pieces or [schema.empty_table().select(list(names))])

    def _table(self, shard: int) -> MemoryMappedTable:
        if shard not in self._tables:
            self._tables[shard] = MemoryMappedTable.from_file(str(self._as_arrow(shard)))
        return self._tables[shard]

    def _as_arrow(self, shard: int) -> Path:
        path = cache_folder() / f"{digest([self.paths[shard], self.states[shard]])}.parquet.arrow"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                part = path.with_suffix(".tmp")
                with (
                    pq.ParquetFile(self.paths[shard]) as file,
                    pa.ipc.new_stream(str(part), record_features().arrow_schema) as writer,
                ):
                    for group in range(file.num_row_groups):
                        writer.write_table(_in_schema(file.read_row_group(group), self.paths[shard]))
                os.replace(part, path)
        return path


def _in_schema(table: pa.Table, name: str) -> pa.Table:
    """The columns of the record schema, cast where their types differ."""
    schema = record_features().arrow_schema
    if missing := sorted(set(schema.names) - set(table.column_names)):
        raise ValueError(f"{name!r} is not in the record schema: it lacks the columns {', '.join(missing)}.")
    try:
        return table_cast(table.select(schema.names), schema)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name!r} is not in the record schema: {error}") from error
