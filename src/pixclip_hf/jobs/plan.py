"""Which items of a source make up a shard."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shard:
    """Neighboring items of a source.

    Attributes:
        number: its place in the plan.
        start, stop: position of its first item, and behind its last.
    """

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> range:
        """Positions of its items in the source."""
        return range(self.start, self.stop)


class Plan:
    """The shards of a source, in the order of its items.

    Args:
        bounds: `(S + 1,)`; shard i holds the items from `bounds[i]` to `bounds[i + 1]`. One array, because a billion
            items are a million shards.
    """

    def __init__(self, bounds: np.ndarray):
        self.bounds = np.asarray(bounds, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> Shard:
        return Shard(number, int(self.bounds[number]), int(self.bounds[number + 1]))

    @property
    def items(self) -> int:
        """Number of all items."""
        return int(self.bounds[-1])

    @property
    def digest(self) -> str:
        """A name made of the bounds: shards that were cut otherwise have another."""
        return hashlib.sha256(self.bounds.astype("<i8").tobytes()).hexdigest()[:16]

    def shards(self, done: np.ndarray) -> Iterator[Shard]:
        """The shards that are not done; `done` is `(S,)` bool."""
        return (self[int(number)] for number in np.flatnonzero(~done))

    def items_of(self, done: np.ndarray) -> int:
        """Number of items in the shards that are done."""
        return int(np.diff(self.bounds)[done].sum())


def plan_shards(units: Iterable[tuple[int, int | None]], max_items: int, max_bytes: int | None = None) -> Plan:
    """Cuts the units of a source into shards.

    A shard never holds parts of two units: what is read together stays together. Whole units that follow each other
    share a shard as long as they fit, and a unit that does not fit is cut into shards from its start.

    Args:
        units: of each unit (a tar, a row group, the whole of a folder) the number of items and the bytes, None where
            they are unknown.
        max_items: most items of a shard.
        max_bytes: most bytes of a shard, by the mean of the items of its unit; a single item may be larger.

    Raises:
        ValueError: a limit below 1.
    """
    for name, limit in (("max_items", max_items), ("max_bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise ValueError(f"`{name}` must be at least 1, got {limit}.")
    parts, last, held, held_bytes = [np.zeros(1, np.int64)], 0, 0, 0.0
    for items, size in units:
        if not items:
            continue
        size = 0 if size is None else size
        fits = held + items <= max_items and (max_bytes is None or held_bytes + size <= max_bytes)
        if held and not fits:
            parts.append(np.array([last]))
            held, held_bytes = 0, 0.0
        step = max_items
        if max_bytes is not None and size:
            step = min(max_items, max(1, max_bytes * items // size))
        if items > step:
            inner = np.arange(step, items, step, dtype=np.int64)
            parts.append(last + inner)
            held = max_items  # what is left of a unit that was cut stays alone
        else:
            held, held_bytes = held + items, held_bytes + size
        last += items
    if last:
        parts.append(np.array([last]))
    return Plan(np.concatenate(parts))
