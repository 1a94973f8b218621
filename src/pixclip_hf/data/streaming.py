"""Records that are read during training, from Parquet shards or WebDataset tars: any number of them, from disk or Hub.

`datasets` reads and splits the shards. What it leaves open is done here: an order that is shuffled and still resumes
where it stopped, records that cannot be read, and a share of the stream for every rank that never runs dry.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..images import encoded_orientation, open_image, stored_bytes
from ..record import LeftOut, foreign, validate_record, without_faults
from .collator import RegionCollator, UnusableRecord, content_key, record_name
from .skipping import report_left_out, report_skipped
from .sources import in_schema
from .stream_shards import BROKEN_SHARD, shard_reader, tar_record

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)


def stream_records(name_or_path: str, split: str) -> "datasets.IterableDataset":
    """A split of a dataset in the record schema, read while it is iterated; images stay encoded.

    Args:
        name_or_path: a folder that `load_dataset` reads, or a Hub id: Parquet shards with the columns of the schema,
            or WebDataset tars with an image and a JSON of the other fields (`key.jpg`, `key.json`) a record.
        split: name of the split.

    Raises:
        ValueError: no such split, or columns that are not those of the schema.
    """
    from datasets import IterableDataset as Stream
    from datasets import load_dataset, load_dataset_builder

    found = load_dataset_builder(name_or_path).config.data_files or {}
    files = {str(name): [str(path) for path in paths] for name, paths in found.items()}
    if files and split not in files:
        raise ValueError(f"Unknown split {split!r} of {name_or_path!r}. Should be one of {sorted(files)}.")
    reader = shard_reader(files[split], name_or_path) if files else None
    if reader is None:
        return in_schema(load_dataset(name_or_path, split=split, streaming=True), name_or_path).decode(False)
    # Read here and not by `datasets`, whose streams end at the first file that is broken.
    return Stream.from_generator(reader, gen_kwargs={"files": files[split]}, split=split)


class RecordStream(IterableDataset):
    """A streamed dataset as an endless source of training records, for [`RegionTrainer`].

    Every pass goes through the shards in another order, and through a shard in blocks of `shuffle_buffer` records in
    random order. A block's order is drawn from seed, pass and place: a position in the stream is a few numbers, and
    continuing from it reads at most one block again.

    A record that cannot be decoded, or that breaks the schema, is skipped, counted and logged with its id, and so is
    one that no batch can be made of ([`StreamLoader`]). A region, a mask or a text that cannot be used costs itself
    alone, and is counted and logged too.

    Args:
        records: what [`stream_records`] returns.
        seed: the seed of the order.
        shuffle_buffer: records, encoded, that a worker holds at a time.
        max_corrupt_share: the share of corrupt records, out of those that a worker has seen and at least 1,000.
        folder: where images may lie that a record names by their path alone; without it, such records are corrupt.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        records: "datasets.IterableDataset",
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_corrupt_share: float = 0.01,
        folder: str | os.PathLike | None = None,
    ):
        if shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1, got {shuffle_buffer}.")
        if not 0 <= max_corrupt_share < 1:
            raise ValueError(f"`max_corrupt_share` must lie in [0, 1), got {max_corrupt_share}.")
        self.records = records
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.max_corrupt_share = max_corrupt_share
        self.folder = folder

    def share(self, rank: int, world_size: int) -> "datasets.IterableDataset":
        """The part of a rank: whole shards if their number is a multiple of the ranks', else every n-th record."""
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.records, rank, world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (record for record, _ in self.read())

    def read(
        self, rank: int = 0, world_size: int = 1, position: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Records of this rank (and of this data loader worker), each with the position behind it.

        Args:
            position: where to continue; from the start when None.

        Raises:
            ValueError: more corrupt records than `max_corrupt_share`, or a pass without any record.
        """
        worker = getattr(get_worker_info(), "id", 0)
        share = self.share(rank, world_size)
        at = dict(position or {"epoch": 0, "block": 0, "start": None, "index": 0, "seen": 0, "corrupt": 0})
        while True:
            # `datasets` shuffles the shards by the epoch, from the first on.
            share.set_epoch(1 + self.seed + at["epoch"])
            if at["start"] is not None:
                share.load_state_dict(at["start"])
            rows, nothing = iter(share), at["start"] is None
            while block := list(islice(rows, self.shuffle_buffer)):
                nothing = False
                rng = np.random.default_rng((self.seed, rank, worker, at["epoch"], at["block"]))
                for index in rng.permutation(len(block))[at["index"] :]:
                    at["index"] += 1
                    at["seen"] += 1
                    try:
                        record, left_out = _decode(block[index], self.folder)
                    except LeftOut as error:
                        at["corrupt"] += 1
                        reader = f"worker {worker} of rank {rank}"
                        counts = at["corrupt"], at["seen"], self.max_corrupt_share
                        report_skipped(_name(block[index]), error, *counts, reader, logger.warning)
                        continue
                    if left_out:
                        # Not in the positions of checkpoints of earlier versions.
                        at["left_out"] = at.get("left_out", 0) + left_out.total()
                        report_left_out(_name(block[index]), left_out, logger.warning)
                    record["sample_key"] = (at["epoch"], *content_key(record))
                    # For messages.
                    record["file"] = (block[index].get("image") or {}).get("path")
                    yield record, dict(at)
                at |= {"block": at["block"] + 1, "start": share.state_dict(), "index": 0}
            if nothing:
                raise ValueError(f"The stream has no record for rank {rank} of {world_size}, worker {worker}.")
            at |= {"epoch": at["epoch"] + 1, "block": 0, "start": None}


def _decode(row: Mapping[str, Any], folder: str | os.PathLike | None) -> tuple[dict[str, Any], Counter]:
    """The record of a row, and what is left out of it, by reason.

    Raises:
        LeftOut: the row is no record.
    """
    if BROKEN_SHARD in row:
        raise LeftOut(row["reason"])
    with foreign("record not readable", detail=True):
        record = tar_record(dict(row)) if "json" in row else dict(row)
        # What a record lacks, it may lack.
        record |= {name: record.get(name) or [] for name in ("captions", "regions")}
        data = stored_bytes(record["image"], folder)
        if encoded_orientation(data) != 1:
            raise LeftOut(
                "the image is not stored upright: it has an EXIF orientation, which its regions do not follow"
            )
        record["image"] = open_image({"bytes": data})
        record, left_out = without_faults(record)
        validate_record(record)
    return record, left_out


def _name(row: Mapping[str, Any]) -> str:
    if BROKEN_SHARD in row:
        return f"the rest of {row[BROKEN_SHARD]!r}"
    image, regions = row.get("image"), row.get("regions")
    path = image.get("path") if isinstance(image, Mapping) else None
    name = f"record {row['__key__']!r} of {row['__url__']!r}" if "__key__" in row else f"image {path!r}"
    ids = [region.get("id") for region in (regions or [])[:5] if isinstance(region, Mapping)]
    return f"{name} with regions {ids}" if regions is not None else name


class StreamLoader:
    """Batches of a [`RecordStream`] for one rank, made in worker processes, and the place that training has reached.

    Nothing is prepared by accelerate: its dispatcher would send batches of one shape from the first rank, and its
    resuming would read and decode again whatever was seen.

    Args:
        stream: where records come from.
        collator: makes a batch of a list of records, in the workers.
        batch_size: records per batch.
        rank, world_size: which share of the stream to read.
        num_workers: number of workers; no more are started than the rank has shards.
        region_collator: what decides, inside of `collator`, which records have something to learn from, for
            `why_nothing`.
        options: further arguments of `DataLoader`.
    """

    def __init__(
        self,
        stream: RecordStream,
        collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        region_collator: RegionCollator | None = None,
        **options: Any,
    ):
        shards = stream.share(rank, world_size).num_shards
        if num_workers > shards:
            logger.warning(f"Reading with {shards} workers in place of {num_workers}: each needs a shard of its own.")
            num_workers = shards
        self.layout = {"world_size": world_size, "workers": max(num_workers, 1), "batch_size": batch_size}
        self.delivered = 0
        self.positions: list[dict[str, Any] | None] = [None] * max(num_workers, 1)
        self._learned, self._why_nothing = False, None
        self._first_passes = [0] * len(self.positions)
        self._batches = _Batches(stream, collator, batch_size, rank, world_size, region_collator)
        self._loader = DataLoader(self._batches, batch_size=None, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._batches.delivered, self._batches.positions = self.delivered, list(self.positions)
        self._first_passes = [0 if position is None else position["epoch"] for position in self.positions]
        for item in self._loader:
            if item is not None:
                batch, worker, position, why_nothing = item
                self.positions[worker] = position
                self.delivered += 1
                self._learned = self._learned or why_nothing is None
                self._why_nothing = self._why_nothing or why_nothing
                yield batch

    def why_nothing(self, ended: bool = False) -> str | None:
        """Why nothing was learned from a whole pass over the share of this rank, and what would help; None where
        something was, or before a pass is over.

        Args:
            ended: nothing more will be read, so that what was read counts as all.
        """
        at = [0 if position is None else position["epoch"] for position in self.positions]
        # What is left of a pass that was resumed is no whole one.
        passed = all(now > first + 1 for now, first in zip(at, self._first_passes, strict=True))
        return None if self._learned or not (passed or ended) else self._why_nothing

    @property
    def corrupt(self) -> int:
        """Records that were skipped on this rank."""
        return sum(position["corrupt"] for position in self.positions if position is not None)

    @property
    def left_out(self) -> int:
        """Regions, masks and texts that were left out of records on this rank."""
        return sum(position.get("left_out", 0) for position in self.positions if position is not None)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was taken, as plain values."""
        return {"layout": self.layout, "delivered": self.delivered, "positions": list(self.positions)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there: no record comes twice or is left out, and batches are those of an uninterrupted run.

        Raises:
            ValueError: the state comes from another number of ranks or workers, or another batch size: the records
                would be dealt out differently.
        """
        if state["layout"] != self.layout:
            raise ValueError(f"The stream was read with {state['layout']} and cannot go on with {self.layout}.")
        self.delivered, self.positions = state["delivered"], list(state["positions"])


class _Batches(IterableDataset):
    """What runs in the workers: batches, each with its worker, the position behind it, and why nothing is learned from
    it, if so."""

    def __init__(
        self,
        stream: RecordStream,
        collator: Callable,
        batch_size: int,
        rank: int,
        world_size: int,
        region_collator: RegionCollator | None,
    ):
        self.stream, self.collator, self.batch_size = stream, collator, batch_size
        self.rank, self.world_size, self.region_collator = rank, world_size, region_collator
        self.delivered = 0
        self.positions: list[dict[str, Any] | None] = [None]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, dict[str, Any], str | None] | None]:
        worker = getattr(get_worker_info(), "id", 0)
        # Workers are asked in turn, from the first on: those whose turn had come pass once.
        if worker < self.delivered % len(self.positions):
            yield None
        records = self.stream.read(self.rank, self.world_size, self.positions[worker])
        # Records that no batch could be made of, since this reading began: the stream itself took them for good ones.
        unusable = 0
        while True:
            rows = list(islice(records, self.batch_size))
            while True:
                try:
                    batch = self.collator([record for record, _ in rows])
                    break
                except UnusableRecord as error:
                    record, at = rows.pop(error.position)
                    unusable += 1
                    counts = at["corrupt"] + unusable, at["seen"], self.stream.max_corrupt_share
                    reader = f"worker {worker} of rank {self.rank}"
                    report_skipped(record_name(record), error, *counts, reader, logger.warning)
                    rows += islice(records, 1)
            position = {**rows[-1][1], "corrupt": rows[-1][1]["corrupt"] + unusable}
            yield batch, worker, position, self._why_nothing([record for record, _ in rows])

    def _why_nothing(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why nothing is learned from a batch; None where something is."""
        if self.region_collator is None or any(map(self.region_collator.can_learn, records)):
            return None
        return self.region_collator.advice(records)
