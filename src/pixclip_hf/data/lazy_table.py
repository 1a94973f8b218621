"""A `datasets.Dataset` whose rows are made when they are asked for.

`datasets` reads a dataset through a `datasets.table.Table`: by `fast_slice` and `fast_gather` at random, by
`to_reader` in order. A table that answers these three from a function is all that a lazy dataset needs: selecting,
shuffling, sharding, mapping, saving, worker processes and data loaders work as with any other dataset.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, TableBlock, table_cast

from ..record import record_features

_ROWS_AT_A_TIME = 100
_ROWS_MEASURED = 20


class Rows(Protocol):
    """What makes rows. It can be pickled."""

    def __len__(self) -> int: ...

    def make(self, positions: Iterable[int], names: Sequence[str]) -> pa.Table:
        """The fields of these names of the records at these positions, in the types of the record schema."""


class LazyTable(TableBlock):
    """Rows as a table of `datasets`.

    Args:
        rows: what makes them.
        columns: name of a column -> field of the record that it holds.
        schema: the types of the columns.
        start, stop: the rows that belong to the table.
    """

    def __init__(self, rows: Rows, columns: dict[str, str], schema: pa.Schema, start: int, stop: int):
        # Not the base's, which wants a table that is there.
        self.rows, self.columns_of_fields, self._schema = rows, columns, schema
        self._start, self._stop = start, stop

    def __deepcopy__(self, memo: dict) -> "LazyTable":
        return self  # nothing of it changes

    def _with(self, **changes: Any) -> "LazyTable":
        values = {
            "columns": self.columns_of_fields,
            "schema": self._schema,
            "start": self._start,
            "stop": self._stop,
        }
        return LazyTable(self.rows, **{**values, **changes})

    def _make(self, positions: Iterable[int]) -> pa.Table:
        fields = list(self.columns_of_fields.values())
        made = self.rows.make((self._start + int(position) for position in positions), fields)
        return table_cast(made.rename_columns(self.column_names), self._schema)

    def fast_slice(self, offset: int = 0, length: int | None = None) -> pa.Table:
        if offset < 0:
            raise IndexError("Offset must be non-negative")
        stop = self.num_rows if length is None else min(offset + length, self.num_rows)
        return self._make(range(offset, max(offset, stop)))

    def fast_gather(self, indices: Sequence[int]) -> pa.Table:
        if not len(indices):
            raise ValueError("Indices must be non-empty")
        return self._make(indices)

    def to_reader(self, max_chunksize: int | None = None) -> pa.RecordBatchReader:
        step = max_chunksize or _ROWS_AT_A_TIME
        # Of rows that are too large together, several batches: chunks are what fits into 32 bits.
        batches = (
            batch for start in range(0, self.num_rows, step) for batch in self.fast_slice(start, step).to_batches()
        )
        return pa.RecordBatchReader.from_batches(self._schema, batches)

    @property
    def table(self) -> pa.Table:
        """All of it, made at once."""
        return self.fast_slice()

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    @property
    def num_rows(self) -> int:
        return self._stop - self._start

    @property
    def num_columns(self) -> int:
        return len(self._schema.names)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    @property
    def column_names(self) -> list[str]:
        return self._schema.names

    @property
    def nbytes(self) -> int:
        """An estimate, from the first rows."""
        measured = self.fast_slice(0, _ROWS_MEASURED)
        return measured.nbytes * self.num_rows // max(measured.num_rows, 1)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"LazyTable({self.num_rows} rows of {', '.join(self.column_names)})"

    __str__ = __repr__

    def slice(self, offset: int = 0, length: int | None = None) -> "LazyTable":
        start = min(self._start + offset, self._stop)
        return self._with(start=start, stop=self._stop if length is None else min(start + length, self._stop))

    def select(self, columns: Sequence[str]) -> "LazyTable":
        fields = {name: self.columns_of_fields[name] for name in columns}
        schema = pa.schema([self._schema.field(name) for name in columns], metadata=self._schema.metadata)
        return self._with(columns=fields, schema=schema)

    def drop(self, columns: str | Sequence[str]) -> "LazyTable":
        dropped = [columns] if isinstance(columns, str) else list(columns)
        if unknown := sorted(set(dropped) - set(self.column_names)):
            raise KeyError(f"columns not found: {', '.join(unknown)}")
        return self.select([name for name in self.column_names if name not in dropped])

    def rename_columns(self, names: Sequence[str]) -> "LazyTable":
        fields = dict(zip(names, self.columns_of_fields.values(), strict=True))
        schema = [field.with_name(name) for field, name in zip(self._schema, names, strict=True)]
        return self._with(columns=fields, schema=pa.schema(schema, metadata=self._schema.metadata))

    def cast(self, target_schema: pa.Schema, *_: Any, **__: Any) -> "LazyTable":
        if sorted(target_schema.names) != sorted(self.column_names):
            raise ValueError(f"cannot cast the columns {self.column_names} to {target_schema.names}")
        fields = {name: self.columns_of_fields[name] for name in target_schema.names}
        return self._with(columns=fields, schema=target_schema)

    def replace_schema_metadata(self, metadata: dict | None = None) -> "LazyTable":
        return self._with(schema=self._schema.with_metadata(metadata))

    # What changes the shape of the rows themselves needs all of them.

    def to_batches(self, *args: Any, **kwargs: Any) -> list[pa.RecordBatch]:
        return self.table.to_batches(*args, **kwargs)

    def filter(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table.filter(*args, **kwargs))

    def flatten(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table).flatten(*args, **kwargs)

    def combine_chunks(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table.combine_chunks(*args, **kwargs))

    def add_column(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table.add_column(*args, **kwargs))

    def append_column(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table.append_column(*args, **kwargs))

    def remove_column(self, i: int, *_: Any, **__: Any) -> "LazyTable":
        return self.drop([self.column_names[i]])

    def set_column(self, *args: Any, **kwargs: Any) -> InMemoryTable:
        return InMemoryTable(self.table.set_column(*args, **kwargs))


def lazy_dataset(rows: Rows, fingerprint: str, split: str | None = None) -> "datasets.Dataset":
    """Rows as a dataset in the record schema.

    Args:
        rows: what makes them.
        fingerprint: a fingerprint of all that decides them; what `datasets` caches, it caches under this name.
        split: name of the split, `"train"` when None.
    """
    features = record_features()
    schema = features.arrow_schema
    table = LazyTable(rows, {name: name for name in features}, schema, 0, len(rows))
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info=info, split=datasets.Split(split or "train"), fingerprint=fingerprint)
