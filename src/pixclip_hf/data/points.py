"""Points drawn inside and beside the regions of records, for training and evaluation by points."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..processing.processing_regions import read_rle
from ..processing.processing_runs import RunMask, polygon_runs

# Regions that train with one point, and those without a point beside them; the others have two or three, one or two.
ONE_POSITIVE_SHARE = 0.6
NO_NEGATIVE_SHARE = 0.6
# How far beyond the box a negative point may lie, in sides of the box, and how often one is looked for.
_MARGIN, _TRIES = 0.5, 16


def point_of(region: Mapping[str, Any]) -> list[float]:
    """A point `[x, y]` in pixels that is drawn uniformly from the mask of a region (its box where it has none), the
    same one in every call.

    Args:
        region: with `box` and `mask`, in the record schema.
    """
    content = repr((list(map(float, region["box"])), region.get("mask")))
    return _inside(region, np.random.default_rng(zlib.crc32(content.encode())))


def training_points(
    region: Mapping[str, Any], size: tuple[int, int], rng: np.random.Generator
) -> tuple[list[list[float]], list[int]]:
    """One to three points inside a region and up to two beside it, and their labels, 1 and 0.

    Args:
        region: with `box` and `mask`, in the record schema.
        size: (width, height) of its image.
        rng: decides the draws.
    """
    positive = 1 if rng.random() < ONE_POSITIVE_SHARE else int(rng.integers(2, 4))
    negative = 0 if rng.random() < NO_NEGATIVE_SHARE else int(rng.integers(1, 3))
    points = [_inside(region, rng) for _ in range(positive)]
    labels = [1] * positive
    for _ in range(negative):
        if (point := _beside(region, size, rng)) is not None:
            points.append(point)
            labels.append(0)
    return points, labels


def _inside(region: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
    if not region.get("mask"):
        x0, y0, x1, y1 = region["box"]
        return [float(rng.uniform(x0, x1)), float(rng.uniform(y0, y1))]
    mask = _runs(region["mask"])
    starts, ends = mask.edges[::2], mask.edges[1::2]
    passed = np.cumsum(ends - starts)
    chosen = rng.integers(passed[-1])
    run = int(np.searchsorted(passed, chosen, side="right"))
    place = int(ends[run] - (passed[run] - chosen))
    column, row = divmod(place, mask.size[0]) if mask.by_columns else divmod(place, mask.size[1])[::-1]
    return [column + float(rng.random()), row + float(rng.random())]


def _runs(mask: Any) -> RunMask:
    """A mask of a record: an RLE, or the rings of a polygon, which reach as far as their corners do."""
    if isinstance(mask, Mapping):
        return read_rle(dict(mask))
    width, height = (int(np.ceil(max(max(ring[axis::2]) for ring in mask))) for axis in (0, 1))
    return polygon_runs(mask, (max(height, 1), max(width, 1)))


def _beside(region: Mapping[str, Any], size: tuple[int, int], rng: np.random.Generator) -> list[float] | None:
    """A point near a region and not inside it; None where none was found."""
    x0, y0, x1, y1 = region["box"]
    width, height = size
    wide, high = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    pixels = _runs(region["mask"]).decode() if region.get("mask") else None
    for _ in range(_TRIES):
        x = float(rng.uniform(max(x0 - wide, 0), min(x1 + wide, width)))
        y = float(rng.uniform(max(y0 - high, 0), min(y1 + high, height)))
        # Beyond the corners of a polygon there is no mask.
        row, column = min(int(y), height - 1), min(int(x), width - 1)
        in_mask = pixels is None or (row < pixels.shape[0] and column < pixels.shape[1] and pixels[row, column])
        if not (in_mask and x0 <= x <= x1 and y0 <= y <= y1):
            return [x, y]
    return None


__all__ = ["point_of", "training_points"]
