"""Records that a run goes past: named, counted, and not too many of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from ..images import open_image
from ..record import LeftOut, foreign, without_faults

logger = logging.get_logger(__name__)

FEWEST = 1000
"""A share is measured over so many records at least: one bad record among the first ten is no tenth of a dataset."""
_TRIES = 100
_ROWS_AT_A_TIME = 1000


def report_skipped(
    name: str,
    error: Exception,
    corrupt: int,
    seen: int,
    most: float,
    reader: str,
    warn: Callable[[str], object],
) -> None:
    """Says that a record was skipped, by its name and the reason.

    Args:
        name: what the record is found by.
        error: why it can't be read.
        corrupt, seen: records of either kind that the reader has met so far, this one included.
        most: the share of corrupt records that a run goes past, out of at least 1,000.
        reader: who counts, for messages.
        warn: where the message goes.

    Raises:
        ValueError: too many of them: something is wrong with all of the data.
    """
    warn(f"Skipped a corrupt record ({corrupt} of {seen}), {name}: {error}")
    if corrupt > most * max(seen, FEWEST):
        raise ValueError(
            f"{corrupt} of the {seen} records that {reader} read are corrupt, more than `max_corrupt_share` = {most} "
            f"(of {FEWEST} at least). The last one is {name}: {error}"
        )


def report_left_out(name: str, left_out: Counter, warn: Callable[[str], object]) -> None:
    """Says what was left out of a record that is used.

    Args:
        name: what the record is found by.
        left_out: how much, by reason.
        warn: where the message goes.
    """
    reasons = "; ".join(f"{reason} ({number})" for reason, number in sorted(left_out.items()))
    warn(f"Left out of {name}: {reasons}")


class ReadableRecords(Dataset):
    """Records by their index, their images decoded; in the place of one that can't be read comes another.

    Batches keep their size that way, on every rank. Which one comes is drawn from the index alone: a run that resumes
    sees it again. Every record that is skipped is counted and logged with its index; so is a region, a mask or a text
    that cannot be used, which costs itself alone.

    Args:
        records: anything indexable that yields records of [`record_features`], such as a `datasets.Dataset`.
        max_corrupt_share: the share of corrupt records that is skipped, out of those seen and at least 1,000.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], max_corrupt_share: float = 0.01):
        self.records = records
        self.max_corrupt_share = max_corrupt_share
        self._encoded = _with_encoded_images(records)
        # Of all workers: records seen and corrupt; parts that were left out.
        self._counts = torch.zeros(3, dtype=torch.long).share_memory_()

    @property
    def corrupt(self) -> int:
        """Records that were skipped so far, each time that they came."""
        return int(self._counts[1])

    @property
    def left_out(self) -> int:
        """Regions, masks and texts that were left out of records so far, each time that they came."""
        return int(self._counts[2])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Any, int]:
        """The record at an index, or the one in its place, and the index where it stands.

        Raises:
            ValueError: more corrupt records than `max_corrupt_share`, or none that can be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} records")
        for at in islice(self._places(index % len(self)), _TRIES):
            self._counts[0] += 1
            try:
                with foreign("record not readable", detail=True):
                    return self._usable(_opened(self._encoded[at]), at), at
            except LeftOut as error:
                self._counts[1] += 1
                seen, corrupt, _ = self._counts.tolist()
                who = "the workers of this process"
                report_skipped(f"record {at}", error, corrupt, seen, self.max_corrupt_share, who, logger.warning)
        raise ValueError(f"{_TRIES} records in a row can't be read, the last of them record {at}.")

    def _places(self, index: int) -> Iterator[int]:
        """An index, and without end those that come in its place."""
        yield index
        # Made here, because nearly every record can be read and needs none.
        rng = np.random.default_rng((len(self), index))
        while True:
            yield int(rng.integers(len(self)))

    def _usable(self, record: Any, index: int) -> Any:
        if not (isinstance(record, Mapping) and {"image", "captions", "regions"} <= set(record)):
            return record  # of another schema, for a collator of its own
        if record["image"] is None:
            raise LeftOut("image missing")
        size = tuple(record["image"].size)
        stated = record.get("width", size[0]), record.get("height", size[1])
        if stated != size:
            raise LeftOut(f"the image is {size} (width, height), its record says {stated}")
        usable, left_out = without_faults({**record, "width": size[0], "height": size[1]})
        if left_out:
            self._counts[2] += left_out.total()
            report_left_out(f"record {index}", left_out, logger.warning)
        return {**record, "captions": usable["captions"], "regions": usable["regions"]}


def _opened(record: Any) -> Any:
    """A record whose image is RGB and in memory, and the name of its file, if it is known."""
    image = record.get("image") if isinstance(record, Mapping) else None
    if not isinstance(image, Mapping | Image.Image):
        return record
    path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)
    return {**record, "image": open_image(image), **({"file": path} if path else {})}


def _with_encoded_images(records: Any) -> Any:
    """A `datasets.Dataset` whose images are decoded here, as those of every other program, and not by `datasets`."""
    if not hasattr(records, "cast_column") or records.format["type"] is not None:
        return records
    from datasets import Image

    if not isinstance(records.features.get("image"), Image):
        return records
    return records.cast_column("image", Image(decode=False))


def readable_rows(records: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all records of a dataset, in their order; of a record that can't be read, empty lists.

    Args:
        records: the dataset.
        names: columns that hold lists.
    """
    columns = records.select_columns(list(names))
    for start in range(0, len(columns), _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, len(columns))
        try:
            with foreign("record not readable"):
                found = columns[start:stop]
                rows = [dict(zip(names, values, strict=True)) for values in zip(*map(found.get, names), strict=True)]
        except LeftOut:
            rows = []
            for index in range(start, stop):
                row: dict[str, Any] = {name: [] for name in names}
                with suppress(LeftOut), foreign("record not readable"):
                    row = columns[index]
                rows.append(row)
        yield from rows
