"""What search asks of a store of embeddings, whatever holds them, and the filters that every store understands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ..embedding.folder import KINDS, embedding_schema

Condition = tuple[str, str, Any]
"""(column, operator, value): `"in"` with a list of values, `">="` or `"<="` with a number. A row whose column is null
meets none."""

OPERATORS = ("in", ">=", "<=")


@dataclass(frozen=True)
class StoreOptions:
    """How a store holds and searches its rows.

    Args:
        url: where the rows are, for a store that can keep them elsewhere: object storage for LanceDB (`s3://…`), a
            server for Qdrant (`http://…`). The store's own folder when None.
        index: `"auto"`, `"none"` for an exact search, or an index type of the store: see its `INDEXES`. When None, a
            store that exists keeps its index, with its partitions and bytes per vector, and a new one is `"auto"`.
        partitions: parts that an inverted file has; about the square root of the number of rows when None.
        sub_vectors: bytes per vector of a product quantization; one per 8 dimensions when None.
        probes: what a query looks at: partitions of LanceDB's index, candidates (`hnsw_ef`) of Qdrant's. More find
            more and take longer. When None, a fifth of the partitions (20 at least), and Qdrant's own default.

    Raises:
        ValueError: a number below 1.
    """

    url: str | None = field(default=None, repr=False)  # may hold a password
    index: str | None = None
    partitions: int | None = None
    sub_vectors: int | None = None
    probes: int | None = None

    def __post_init__(self) -> None:
        for name in ("partitions", "sub_vectors", "probes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


class Store(Protocol):
    """Rows with an embedding each, found by their cosine with a vector.

    The columns are those of [`store_schema`]. A store is made as `Kind(place, name, width, dtype, options)`: its
    folder, a name for what it holds (unique among the collections of a server), length and type of an embedding, and
    [`StoreOptions`].

    Raises:
        ValueError: on creation, as `check`.
    """

    @classmethod
    def check(cls, width: int, options: StoreOptions) -> None:
        """
        Raises:
            ValueError: an index that the store does not have, or that does not fit embeddings of this length.
        """
        ...

    def __len__(self) -> int: ...

    def add(self, shard: int, rows: pa.Table, again: bool) -> None:
        """Adds the rows of a shard; `again` in place of those that an interrupted run may have added of it."""
        ...

    def build(self) -> None:
        """Indexes what was added."""
        ...

    def search(self, vectors: np.ndarray, limit: int, where: Sequence[Condition] = ()) -> list[pa.Table]:
        """The rows nearest to each of `(Q, D)` vectors that meet all conditions, nearest first, at most `limit`."""
        ...

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        """The rows with some ids, in any order."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


STORES = {"lance": "LanceStore", "qdrant": "QdrantStore", "exact": "ExactStore"}
"""Stores by name; `NAME_store.py` holds the class."""


def store_class(name: str) -> Any:
    """The class of a store.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: its library is not installed.
    """
    if name not in STORES:
        raise ValueError(f"`store` must be one of {', '.join(STORES)}, got {name!r}.")
    try:
        return getattr(import_module(f".{name}_store", __package__), STORES[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'The store {name!r} needs {error.name}: pip install "pixclip-hf[search]"', name=error.name
        ) from error


def store_schema(width: int, dtype: str) -> pa.Schema:
    """The columns of a store: those of [`embedding_schema`], and

    - shard: number of the shard that the row is from;
    - side: shorter side of the box in pixels; share: area of the box divided by that of the image; an image or a
      caption counts as the whole image.

    Args:
        width, dtype: of the embeddings.
    """
    sizes = [pa.field("shard", pa.int32()), pa.field("side", pa.float32()), pa.field("share", pa.float32())]
    return pa.schema([*embedding_schema(width, dtype), *sizes])


def store_rows(rows: pa.Table, shard: int) -> pa.Table:
    """The rows of a shard with the columns that a store adds."""
    boxes = [
        (0, 0, width, height) if box is None else box
        for box, width, height in zip(*(rows[name].to_pylist() for name in ("box", "width", "height")), strict=True)
    ]
    edges = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    sides = edges[:, 2:] - edges[:, :2]
    areas = rows["width"].to_numpy().astype(np.float32) * rows["height"].to_numpy()
    columns = {
        "shard": pa.array(np.full(len(rows), shard, dtype=np.int32)),
        "side": pa.array(sides.min(-1, initial=np.inf).astype(np.float32)),
        "share": pa.array((sides.prod(-1) / areas).astype(np.float32)),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows.replace_schema_metadata(None)


@dataclass(frozen=True)
class Filter:
    """Which rows may be hits.

    Args:
        kinds: some of [`KINDS`].
        categories: one of them must be the row's category; any where empty.
        min_score: least confidence of the region; regions without one are left out where it is given.
        min_side: least shorter side of the box, in pixels.
        min_share, max_share: least and greatest area of the box, as a share of the image.
        conditions: further ones, on any column of [`store_schema`] but `embedding` and `box`.

    Raises:
        ValueError: an unknown kind, column or operator.
    """

    kinds: tuple[str, ...] = ("region",)
    categories: tuple[str, ...] = ()
    min_score: float | None = None
    min_side: float | None = None
    min_share: float | None = None
    max_share: float | None = None
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"`kinds` must be some of {', '.join(KINDS)}, got {', '.join(self.kinds) or 'none'}.")
        columns = set(store_schema(1, "float32").names) - {"embedding", "box"}
        for i, (column, operator, _) in enumerate(self.conditions):
            if column not in columns:
                raise ValueError(f"`conditions[{i}]` must name one of {', '.join(sorted(columns))}, got {column!r}.")
            if operator not in OPERATORS:
                raise ValueError(f"`conditions[{i}]` must use one of {', '.join(OPERATORS)}, got {operator!r}.")

    def all_conditions(self) -> list[Condition]:
        """All of it as conditions."""
        found: list[Condition] = [("kind", "in", list(self.kinds))]
        if self.categories:
            found.append(("category", "in", list(self.categories)))
        for column, operator, value in (
            ("score", ">=", self.min_score),
            ("side", ">=", self.min_side),
            ("share", ">=", self.min_share),
            ("share", "<=", self.max_share),
        ):
            if value is not None:
                found.append((column, operator, float(value)))
        return [*found, *self.conditions]


def place_of(folder: Path, store: str) -> Path:
    """Where a store of a folder of embeddings is unless it is told otherwise."""
    return folder / "stores" / store
