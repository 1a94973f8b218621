"""Exact search without an index: every row is compared with every query, in numpy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.whole_files import whole_file
from ..embedding.folder import embedding_matrix
from .store import Condition, StoreOptions, store_schema

# Rows that are converted to float32 at a time: 64 MB at a width of 512.
BLOCK = 32_768


class ExactStore:
    """A file of Arrow per shard, mapped into memory: what a search reads is in the page cache, not in the process.

    What the other stores are measured by, and enough up to some hundred thousand rows.

    Args:
        place, name, width, dtype, options: as in [`Store`].

    Raises:
        ValueError: an index or a URL, which it has not.
    """

    INDEXES = ("auto", "none")

    def __init__(self, place: Path, name: str, width: int, dtype: str, options: StoreOptions):
        self.check(width, options)
        self.place, self.schema = place, store_schema(width, dtype)
        place.mkdir(parents=True, exist_ok=True)
        self._tables: list[pa.Table] | None = None

    @classmethod
    def check(cls, width: int, options: StoreOptions) -> None:
        if options.index not in cls.INDEXES:
            raise ValueError(f"`index` of the store 'exact' must be one of {cls.INDEXES}, got {options.index!r}.")
        if options.url is not None:
            raise ValueError("`url` must be None for the store 'exact', which is a folder.")

    def __len__(self) -> int:
        return sum(len(table) for table in self._opened())

    def add(self, shard: int, rows: pa.Table, again: bool) -> None:
        with whole_file(self.place / f"{shard:05d}.arrow") as unfinished:
            with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
                writer.write_table(rows.cast(self.schema), max_chunksize=BLOCK)
        self._tables = None

    def build(self) -> None:
        """Nothing: there is no index."""

    def search(self, vectors: np.ndarray, limit: int, where: Sequence[Condition] = ()) -> list[pa.Table]:
        vectors = np.asarray(vectors, dtype=np.float32)
        scores: np.ndarray = np.empty((len(vectors), 0), dtype=np.float32)
        rows: np.ndarray = np.empty((len(vectors), 0), dtype=np.int64)
        tables, start = self._opened(), 0
        for batch in (batch for table in tables for batch in table.to_batches()):
            chosen = np.flatnonzero(_meets(batch, where))
            block = embedding_matrix(batch)[chosen].astype(np.float32)
            norms = np.maximum(np.linalg.norm(block, axis=1), np.finfo(np.float32).tiny)
            scores = np.concatenate([scores, vectors @ block.T / norms], axis=1)
            rows = np.concatenate([rows, np.broadcast_to(start + chosen, (len(vectors), len(chosen)))], axis=1)
            if scores.shape[1] > limit:
                # A stable order: of equal rows the first one in the collection wins.
                best = np.argsort(-scores, axis=1, kind="stable")[:, :limit]
                scores = np.take_along_axis(scores, best, axis=1)
                rows = np.take_along_axis(rows, best, axis=1)
            start += len(batch)
        order = np.argsort(-scores, axis=1, kind="stable")
        everything = pa.concat_tables(tables) if tables else self.schema.empty_table()
        return [everything.take(pa.array(own)) for own in np.take_along_axis(rows, order, axis=1)]

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        wanted = pa.array(list(ids), pa.string())
        found = [table.filter(pc.is_in(table["id"], value_set=wanted)) for table in self._opened()]
        return pa.concat_tables([self.schema.empty_table(), *found])

    def close(self) -> None:
        self._tables = None

    def _opened(self) -> list[pa.Table]:
        if self._tables is None:
            paths = sorted(self.place.glob("[0-9]*.arrow"), key=lambda path: int(path.stem))
            self._tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        return self._tables


def _meets(batch: pa.RecordBatch, where: Sequence[Condition]) -> np.ndarray:
    mask = np.ones(len(batch), dtype=bool)
    for name, operator, value in where:
        column = batch[name]
        if operator == "in":
            met = pc.is_in(column, value_set=pa.array(value, column.type))
        else:
            compare = pc.greater_equal if operator == ">=" else pc.less_equal
            met = compare(column, pa.scalar(value, column.type))
        mask &= pc.fill_null(met, False).to_numpy(zero_copy_only=False)
    return mask
