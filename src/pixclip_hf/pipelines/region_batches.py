"""Batches of images for the region pipelines: read ahead, and joined with images of about as many regions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

# What has one row per image, and no regions.
IMAGE_KEYS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
# Batches that are read ahead and sorted by their images' number of regions.
_BUCKET_BATCHES = 4
# What a bad input raises, and what is raised again with its number.
_NAMED_ERRORS = (FileNotFoundError, OSError, TypeError, ValueError)


def collate_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins batches of one image each into one batch with one row per image.

    Args:
        items: preprocessed images; every tensor is (1, R, ...) with its own R, but those of the image itself.

    Returns:
        The same keys: tensors (B, max R, ...), padded at the end with zeros, so that `region_attention_mask` is 0
        there, and with labels of -1 for points that are none; anything else as a list of B.

    Raises:
        ValueError: the processed images have different sizes.
    """
    shapes = {tuple(item["pixel_values"].shape[1:]) for item in items}
    if len(shapes) > 1:
        raise ValueError(
            f"The processed images of a batch must have one size, got {sorted(shapes)}: use `batch_size=1`."
        )
    batch: dict[str, Any] = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if not isinstance(values[0], torch.Tensor):
            batch[key] = [value for rows in values for value in rows]
            continue
        if key not in IMAGE_KEYS:
            values = _padded(values, -1 if key == "region_point_labels" else 0)
        batch[key] = torch.cat(values)
    return batch


def _padded(values: list[torch.Tensor], fill: int) -> list[torch.Tensor]:
    """Tensors (1, ...) at the size of the largest: regions, their points, and masks where images keep their aspect."""
    largest = [max(sides) for sides in zip(*(value.shape for value in values), strict=True)]
    padding = [
        [side for axis in range(value.ndim - 1, 0, -1) for side in (0, largest[axis] - value.shape[axis])]
        for value in values
    ]
    return [F.pad(value, sides, value=fill) for value, sides in zip(values, padding, strict=True)]


class BucketedOutputs:
    """What `forward` gives for each image of a loader, in order, from batches of images with about as many regions.

    Holds `_BUCKET_BATCHES` batches at a time, however many images there are; one image at `batch_size` 1.

    Args:
        loader: yields preprocessed images, one by one.
        forward: a batch of `collate_images` to `{"per_region": (B, R, ...), "regions": list of B}`.
    """

    def __init__(self, loader: DataLoader, forward: Callable[[dict[str, Any]], dict[str, Any]], batch_size: int):
        self.loader, self.forward, self.batch_size = loader, forward, batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        images = iter(self.loader)
        size = self.batch_size
        while window := list(map(self._owned, islice(images, 1 if size == 1 else _BUCKET_BATCHES * size))):
            outputs: list[dict[str, Any]] = [{}] * len(window)
            for rows in _rows_of_batches(window, size):
                batch = self.forward(collate_images([window[i] for i in rows]))
                for row, i in enumerate(rows):
                    outputs[i] = {
                        "per_region": batch["per_region"][row : row + 1],
                        "regions": batch["regions"][row : row + 1],
                    }
            yield from outputs

    def _owned(self, item: dict[str, Any]) -> dict[str, Any]:
        # A tensor that came from a worker holds a file of shared memory open: kept, they would run out.
        if not self.loader.num_workers:
            return item
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in item.items()}


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Names the item in what a bad input raises."""
    try:
        yield
    except _NAMED_ERRORS as error:
        kind = next(kind for kind in _NAMED_ERRORS if isinstance(error, kind))
        raise kind(f"image {number}: {error}") from error


class PreparedItems(Dataset):
    """What `prepare` makes of each item; errors name the item by its index."""

    def __init__(self, items: Any, prepare: Callable[[Any], dict[str, Any]]):
        self.items, self.prepare = items, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with numbered(index):
            return self.prepare(self.items[index])


class PreparedStream(IterableDataset):
    """As [`PreparedItems`], of items that come one by one."""

    def __init__(self, items: Iterable[Any], prepare: Callable[[Any], dict[str, Any]]):
        self.items, self.prepare = items, prepare

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, item in enumerate(self.items):
            with numbered(number):
                prepared = self.prepare(item)
            yield prepared


def _rows_of_batches(window: list[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Which images share a batch: of one kind of prompt, with about as many regions."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(window):
        kinds.setdefault(tuple(sorted(item)), []).append(i)
    for rows in kinds.values():
        rows.sort(key=lambda i: window[i]["region_attention_mask"].shape[1])
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
