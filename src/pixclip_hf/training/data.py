"""The records that a run trains and evaluates on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.sources import has_splits, load_records, parse_source
from ..data.streaming import RecordStream, stream_records
from ..scenes.dataset import scenes_dataset
from .arguments import DataArguments

if TYPE_CHECKING:
    import datasets


def build_datasets(
    arguments: DataArguments, image_size: int, seed: int
) -> tuple["datasets.Dataset | RecordStream", "datasets.Dataset | None"]:
    """Training and evaluation records.

    Args:
        arguments: what to read.
        image_size: pixels of a side of the scenes.
        seed: the seed of the order of a stream.

    Returns:
        The records to train on, and those to evaluate on or None.

    Raises:
        ValueError: a source without splits is asked for one; or as in [`load_records`].
    """
    if arguments.dataset_name == "scenes" and arguments.source is None:
        options: dict[str, Any] = {
            "size": image_size,
            "setting": arguments.scenes_setting,
            "seed": arguments.scenes_seed,
        }
        train = scenes_dataset(arguments.scenes_train_images, split=arguments.train_split, **options)
        return train, scenes_dataset(arguments.scenes_eval_images, split=arguments.eval_split or "test", **options)
    source = arguments.source or [arguments.dataset_name]
    if arguments.streaming:
        train = RecordStream(
            stream_records(source[0], arguments.train_split),
            seed,
            arguments.shuffle_buffer,
            arguments.max_corrupt_share,
            source[0] if Path(source[0]).is_dir() else None,
        )
    else:
        train = _load(source, arguments.train_split)
    if arguments.eval_source is not None:
        return train, _load(arguments.eval_source, arguments.eval_split)
    if arguments.eval_split is None:
        return train, None
    kind, given = parse_source(source)
    if not has_splits(kind) or "split" in given:
        raise ValueError(
            f"`--eval_split` {arguments.eval_split!r} is no split of `--source` {' '.join(source)!r}, which has "
            "one part alone: name what to evaluate on with `--eval_source`."
        )
    return train, load_records(source, arguments.eval_split)


def _load(source: Sequence[str], split: str | None) -> "datasets.Dataset":
    """The split of a source that chooses among several and does not say which."""
    kind, given = parse_source(source)
    if not has_splits(kind) or "split" in given:
        return load_records(source)
    if split is None:
        raise ValueError(f"`--eval_source` {' '.join(source)!r} has several splits: choose one with `--eval_split`.")
    return load_records(source, split)
