"""Datasets in the record schema: saved to disk, Parquet shards, or on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from ...images import stored_bytes
from ...record import foreign, record_features
from ..source_index import digest, file_state
from .base import AnnotatedImage, Source, stated_size

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
        from datasets import Image

        self._records = _load(self.path, self.split)
        self._encoded = self._records.cast_column("image", Image(decode=False))

    def __len__(self) -> int:
        return len(self._records)

    def read(self, position: int) -> AnnotatedImage:
        with foreign("record not readable", detail=True):
            record = self._encoded[position]
            # A path without bytes is that of a file beside the records, or of none.
            image = stored_bytes(record["image"], self.path if Path(self.path).is_dir() else None)
            texts = record["captions"] or (), record["alt_text"]
            regions = record["regions"] or ()
            return AnnotatedImage(self.item_name(position), image, regions, *texts, size=stated_size(record))

    def item_name(self, position: int) -> str:
        return f"{self.split}-{position:08d}"

    @property
    def items_digest(self) -> str:
        return str(len(self))

    def fingerprint(self) -> str:
        return self._records._fingerprint

    def units(self) -> Sequence[tuple[int, int | None]]:
        import pyarrow.parquet as pq

        files = _parquet_files(Path(self.path), self.split)
        if files is None:
            return super().units()
        footers = map(pq.read_metadata, files)
        groups = (footer.row_group(number) for footer in footers for number in range(footer.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]

    def dataset(self) -> "datasets.Dataset":
        return self._records


def _load(path: str, split: str) -> "datasets.Dataset":
    from datasets import DatasetDict, config, load_dataset, load_from_disk

    from ..own_images import with_own_images

    folder = Path(path)
    if (shards := _parquet_files(folder, split)) is not None:
        from ..lazy_table import lazy_dataset
        from ..parquet_shards import ParquetShards

        rows = ParquetShards(shards, path, [path])
        return lazy_dataset(rows, rows.fingerprint(), split)
    if _is_saved(folder):
        loaded = load_from_disk(path)
        if not isinstance(loaded, DatasetDict):
            loaded = {str(loaded.split or "train"): loaded}
        if split not in loaded:
            raise ValueError(f"`split` must be one of {sorted(loaded)} of {path!r}, got {split!r}.")
        records = in_schema(loaded[split], path)
        # What `datasets` writes there names the records, and not the state of the files.
        states = ((str(file), file_state(file)) for file in sorted(folder.rglob("*.arrow")))
        records._fingerprint = digest([records._fingerprint, *states])
        return with_own_images(records, [path], path)
    # What `datasets` downloads and unpacks lies in its caches.
    folders = [path] if folder.is_dir() else [str(config.HF_DATASETS_CACHE), constants.HF_HUB_CACHE]
    return with_own_images(in_schema(load_dataset(path, split=split), path), folders, path)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _parquet_files(folder: Path, split: str) -> list[str] | None:
    """The files of a split of a folder of Parquet shards, as `load_dataset` tells them; None for anything else.

    Raises:
        ValueError: no such split.
    """
    from datasets import load_dataset_builder

    if not folder.is_dir() or _is_saved(folder):
        return None
    config = load_dataset_builder(str(folder)).config
    files = config.data_files or {}
    all_files = [str(path) for paths in files.values() for path in paths]
    if config.name != "default" or not all_files or not all(path.endswith(".parquet") for path in all_files):
        return None
    if split not in files:
        raise ValueError(f"Unknown split {split!r} of {str(folder)!r}. Should be one of {sorted(files)}.")
    return list(files[split])


def in_schema(
    loaded: "datasets.Dataset | datasets.IterableDataset", name: str
) -> "datasets.Dataset | datasets.IterableDataset":
    """The columns of the record schema, cast where their types differ.

    Args:
        loaded: a dataset whose features are known.
        name: the name of the dataset, for messages.

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
