"""Datasets in the record schema, from a folder or the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from .schema import record_features

if TYPE_CHECKING:
    import datasets


def load_records(name_or_path: str, split: str) -> "datasets.Dataset":
    """A split of a dataset in the record schema.

    Args:
        name_or_path: a folder written by `save_to_disk` of a `DatasetDict` or a `Dataset` (a split without a name
            counts as `"train"`, as in `load_dataset`), a folder that `load_dataset` reads (Parquet shards),
            or a Hub id. Other columns are left out; fields that its regions lack become None.
        split: name of the split.

    Raises:
        ValueError: no such split, or a column of the schema is missing or has another type.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(name_or_path)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        loaded = load_from_disk(name_or_path)
        if not isinstance(loaded, DatasetDict):
            loaded = {str(loaded.split or "train"): loaded}
        if split not in loaded:
            raise ValueError(f"`split` must be one of {sorted(loaded)} of {name_or_path!r}, got {split!r}.")
        loaded = loaded[split]
    else:
        loaded = load_dataset(name_or_path, split=split)
    return in_schema(loaded, name_or_path)


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
