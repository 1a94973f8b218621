"""Datasets in the record schema: saved to disk, Parquet shards, or on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...record import record_features
from .base import AnnotatedImage, Source

if TYPE_CHECKING:
    import datasets


@dataclass
class RecordDataset(Source, kind="dataset"):
    """A dataset in the record schema.

    Args:
        path: folder or Hub id.
        split: name of the split.
    """

    path: str
    split: str = "train"

    def open(self) -> None:
        self._records = in_schema(_load(self.path, self.split), self.path)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, position: int) -> AnnotatedImage:
        from datasets import Image

        record = self._records.cast_column("image", Image(decode=False))[position]
        image = record["image"]["bytes"] or Path(record["image"]["path"])
        size = record["width"], record["height"]
        texts = record["captions"], record["alt_text"]
        return AnnotatedImage(f"{self.split}-{position:08d}", image, record["regions"], *texts, size=size)

    @property
    def items_digest(self) -> str:
        return str(len(self))

    def fingerprint(self) -> str:
        return self._records._fingerprint

    def dataset(self) -> "datasets.Dataset":
        return self._records


def _load(path: str, split: str) -> "datasets.Dataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(path)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        loaded = load_from_disk(path)
        if not isinstance(loaded, DatasetDict):
            loaded = {str(loaded.split or "train"): loaded}
        if split not in loaded:
            raise ValueError(f"`split` must be one of {sorted(loaded)} of {path!r}, got {split!r}.")
        return loaded[split]
    return load_dataset(path, split=split)


def in_schema(
    loaded: "datasets.Dataset | datasets.IterableDataset", name: str
) -> "datasets.Dataset | datasets.IterableDataset":
    """The columns of the record schema, cast where their types differ.

    Args:
        loaded: a dataset whose features are known.
        name: of the dataset, for messages.

    Raises:
        ValueError: a column is missing or has another type.
    """
    features = record_features()
    if missing := sorted(set(features) - set(loaded.features or {})):
        raise ValueError(f"{name!r} is not in the record schema: it lacks the columns {', '.join(missing)}.")
    columns = loaded.select_columns(list(features))
    if columns.features == features:
        return columns
    try:
        return columns.cast(features)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name!r} is not in the record schema: {error}") from error
