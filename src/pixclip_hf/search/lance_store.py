"""The default store: LanceDB, embedded in this process, on disk or object storage."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb import index as configs

from .store import Condition, StoreOptions, store_schema

TABLE = "embeddings"
# An exact search of fewer rows is as fast as one by an index.
AUTO_ROWS = 10_000
# What product quantization needs to learn its 256 codes.
LEAST_ROWS = 256
# Dimensions per byte of a product quantization, where nothing else is said.
SUB_VECTOR = 8
# Hits are chosen among so many times as many candidates by their full vectors: the codes of an index only preselect.
REFINE = 20
# Share of an index's partitions that a query looks at, and the fewest: neighbors lie in as large a part of the space
# however many partitions cut it.
PROBED, LEAST_PROBED = 0.2, 20
# Rounds of k-means, and rows per partition (or code) that it sees: a fifth and a quarter of LanceDB's own.
TRAINING = {"max_iterations": 10, "sample_rate": 64}
# Files of the table are joined after so many shards: a version of the table lists all of them.
COMPACTED = 64
# An index is trained anew when there are so many times the rows that it was trained on.
GROWTH = 4


class LanceStore:
    """A LanceDB table.

    Args:
        place, name, width, dtype, options: as in [`Store`].

    Raises:
        ValueError: an unknown index, or one that does not fit the width.
    """

    INDEXES = ("auto", "none", "IVF_PQ", "IVF_SQ", "IVF_FLAT", "IVF_RQ", "IVF_HNSW_SQ")

    def __init__(self, place: Path, name: str, width: int, dtype: str, options: StoreOptions):
        self.check(width, options)
        self.width, self.options, self.schema = width, options, store_schema(width, dtype)
        self._added, self._default_probes = 0, 0
        self._connection = lancedb.connect(options.url or str(place))
        if TABLE in _table_names(self._connection):
            self.table = self._connection.open_table(TABLE)
        else:
            self.table = self._connection.create_table(TABLE, schema=self.schema)

    @classmethod
    def check(cls, width: int, options: StoreOptions) -> None:
        index, sub_vectors = options.index, options.sub_vectors
        if index not in cls.INDEXES:
            raise ValueError(f"`index` of the store 'lance' must be one of {cls.INDEXES}, got {index!r}.")
        if index == "IVF_PQ" and sub_vectors is None and width % SUB_VECTOR:
            raise ValueError(
                f"`index` 'IVF_PQ' does not fit a width of {width}, which {SUB_VECTOR} does not divide: give "
                "`sub_vectors`, or take IVF_SQ or IVF_FLAT."
            )
        if index == "IVF_PQ" and sub_vectors is not None and width % sub_vectors:
            raise ValueError(f"`sub_vectors` must divide the width of {width}, got {sub_vectors}.")
        if index == "IVF_RQ" and width % 8:
            raise ValueError(f"`index` 'IVF_RQ' does not fit a width of {width}, which 8 does not divide.")

    def __len__(self) -> int:
        return self.table.count_rows()

    def add(self, shard: int, rows: pa.Table, again: bool) -> None:
        if again:
            self.table.delete(f"shard = {shard}")
        self.table.add(rows.cast(self.schema))
        self._added += 1
        if self._added % COMPACTED == 0:
            self.table.optimize()

    def build(self) -> None:
        """Makes the index, or takes new rows into the one that there is; none where there are too few rows."""
        rows = len(self)
        present = [index for index in self.table.list_indices() if index.columns == ["embedding"]]
        index = self.options.index or "auto"
        if index == "auto":
            # One bit per dimension: as small as product quantization, whose code books take longer to train.
            index = "none" if rows < AUTO_ROWS else "IVF_RQ" if self.width % 8 == 0 else "IVF_FLAT"
        made = f"{index}-{self.options.partitions}-{self.options.sub_vectors}-"
        wanted = index != "none" and rows >= LEAST_ROWS
        kept = [
            found.name
            for found in present
            if wanted and found.name.startswith(made) and rows < GROWTH * int(found.name.removeprefix(made))
        ]
        if wanted and not kept:
            # Its name says how it was made and of how many rows: what decides whether a later run keeps it.
            self.table.create_index("embedding", config=self._config(index, rows), name=f"{made}{rows}")
            self.table.create_index("id", config=configs.BTree())
        for found in present:
            if found.name not in kept:
                self.table.drop_index(found.name)
        # Few files in place of one per shard, and new rows in the indexes.
        self.table.optimize()
        self._default_probes = 0

    def search(self, vectors: np.ndarray, limit: int, where: Sequence[Condition] = ()) -> list[pa.Table]:
        sql = " AND ".join(_sql(*condition) for condition in where)
        probes = self.options.probes or self._probes()
        found = []
        for vector in np.asarray(vectors, dtype=np.float32):
            query: Any = self.table.search(vector, vector_column_name="embedding").distance_type("cosine")
            query = query.limit(limit).refine_factor(REFINE)
            if self.options.index == "none":
                query = query.bypass_vector_index()
            else:
                query = query.nprobes(probes)
            if sql:
                query = query.where(sql, prefilter=True)
            found.append(query.to_arrow().select(self.schema.names))
        return found

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        query: Any = self.table.search().where(_sql("id", "in", ids))
        return query.limit(len(ids)).to_arrow().select(self.schema.names)

    def close(self) -> None:
        """Nothing: a table holds no lock."""

    def _probes(self) -> int:
        """Partitions that a query looks at where `probes` does not say."""
        if not self._default_probes:
            names = [index.name for index in self.table.list_indices() if index.columns == ["embedding"]]
            most = max((self._partitions(name.split("-")[0], int(name.split("-")[-1])) for name in names), default=0)
            self._default_probes = max(LEAST_PROBED, math.ceil(PROBED * most))
        return self._default_probes

    def _partitions(self, index: str, rows: int) -> int:
        if self.options.partitions is None and index == "IVF_HNSW_SQ":
            return 1 + rows // 1_000_000
        return min(self.options.partitions or max(1, round(rows**0.5)), rows)

    def _config(self, index: str, rows: int) -> Any:
        classes = {
            "IVF_PQ": configs.IvfPq,
            "IVF_SQ": configs.IvfSq,
            "IVF_FLAT": configs.IvfFlat,
            "IVF_RQ": configs.IvfRq,
            "IVF_HNSW_SQ": configs.HnswSq,
        }
        partitions = self._partitions(index, rows)
        settings: dict[str, Any] = {"distance_type": "cosine", "num_partitions": partitions, **TRAINING}
        if index == "IVF_PQ":
            settings["num_sub_vectors"] = self.options.sub_vectors or self.width // SUB_VECTOR
        return classes[index](**settings)


def _table_names(connection: Any) -> list[str]:
    return list(connection.list_tables().tables)


def _sql(column: str, operator: str, value: Any) -> str:
    if operator == "in":
        values = ", ".join(_literal(item) for item in value)
        return f"{column} IN ({values})"
    return f"{column} {operator} {_literal(value)}"


def _literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
