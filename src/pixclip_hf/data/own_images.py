"""Images that a dataset stores by their path alone: only those that lie in its own folder are read.

Whoever wrote a table decides what its cells name, and must not decide which files of this machine are read, embedded
and published.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..images import inside
from ..processing.processing_addresses import ALLOW_LOCAL
from ..record import LeftOut, record_features

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)


def own_images(table: pa.Table, folders: Sequence[str], name: str) -> pa.Table:
    """A table of records whose images without bytes are files of its own folders, by their full paths. Other paths get
    a character that no file has in its name, and a warning: whoever opens them is refused.

    Args:
        table: with a column `image` or without.
        folders: where its images may lie; a relative path is one below the first.
        name: the name of the dataset, for messages.
    """
    at = table.schema.get_field_index("image")
    if at < 0 or not _without_bytes(table.column(at)):
        return table
    cells = table.column(at).to_pylist()
    for cell in cells:
        if cell is not None and cell["bytes"] is None and cell["path"] is not None:
            cell["path"] = _own_path(cell["path"], folders, name)
    kind = record_features().arrow_schema.field("image").type
    return table.set_column(at, table.schema.field(at), pa.array(cells, kind))


def _without_bytes(column: pa.ChunkedArray) -> bool:
    """Whether a cell has a path and no bytes."""
    parts = ((chunk.field("bytes"), chunk.field("path")) for chunk in column.chunks)
    return any(
        data.null_count and pc.any(pc.and_(pc.is_null(data), pc.is_valid(path))).as_py() for data, path in parts
    )


def _own_path(path: str, folders: Sequence[str], name: str) -> str:
    for folder in folders:
        try:
            return str(inside(folder, path))
        except LeftOut:
            continue
    logger.warning(
        f"{name!r} names the image {path!r}, which lies outside of its folder and is not read. {ALLOW_LOCAL}=1 allows "
        "it."
    )
    return path + "\0"


class OwnRows:
    """The rows of a `datasets.Dataset` in the record schema, for a lazy table, with images of its own alone.

    Args:
        records: the dataset.
        folders, name: as in [`own_images`].
    """

    def __init__(self, records: "datasets.Dataset", folders: Sequence[str], name: str):
        self.records: Any = records.with_format("arrow")
        self.folders, self.name = folders, name

    def __len__(self) -> int:
        return len(self.records)

    def make(self, positions: Iterable[int], names: Sequence[str]) -> pa.Table:
        schema = record_features().arrow_schema
        positions = list(positions)
        if not positions:
            return pa.schema([schema.field(name) for name in names]).empty_table()
        table = self.records.select_columns(list(names))[positions].select(list(names))
        return own_images(table, self.folders, self.name)


def with_own_images(records: "datasets.Dataset", folders: Sequence[str], name: str) -> "datasets.Dataset":
    """A dataset in the record schema without images that lie elsewhere; itself where it stores the bytes of all.

    Args:
        records: the dataset.
        folders, name: as in [`own_images`].
    """
    from .lazy_table import lazy_dataset

    if not _without_bytes(records.data.column("image")):
        return records
    return lazy_dataset(OwnRows(records, folders, name), records._fingerprint, str(records.split or "train"))
