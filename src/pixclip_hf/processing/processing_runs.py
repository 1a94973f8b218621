"""Masks as runs, as RLE, polygons and boxes describe them: measured and resampled without being laid out in pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RunMask:
    """
    A mask by the places where its region starts and ends.

    Args:
        size: (height, width).
        edges: (2 K,) int64, ascending: start and end in turn of each run of region, as places in the flattened mask.
        by_columns: flattened column by column (COCO's RLE), not row by row.
    """

    size: tuple[int, int]
    edges: np.ndarray
    by_columns: bool

    @classmethod
    def from_edges(cls, size: tuple[int, int], edges: np.ndarray, by_columns: bool) -> "RunMask":
        """A mask without the runs of no length among `edges`."""
        runs = edges.reshape(-1, 2)
        return cls(size, runs[runs[:, 0] < runs[:, 1]].ravel(), by_columns)

    @property
    def area(self) -> int:
        """Number of region pixels."""
        return int((self.edges[1::2] - self.edges[::2]).sum())

    @property
    def box(self) -> np.ndarray:
        """Tight box (4,) int64, xyxy in pixels, around the region of a mask that has one."""
        line = self.size[0] if self.by_columns else self.size[1]
        (first, start), (last, end) = np.divmod(self.edges[::2], line), np.divmod(self.edges[1::2] - 1, line)
        # A run that goes on in the next line covers the end of one and the beginning of the other.
        low, high = np.where(first == last, start, 0).min(), np.where(first == last, end, line - 1).max()
        low_line, high_line = first[0], last[-1]
        corners = (
            [low_line, low, high_line + 1, high + 1] if self.by_columns else [low, low_line, high + 1, high_line + 1]
        )
        return np.array(corners, dtype=np.int64)

    def decode(self) -> np.ndarray:
        """The mask laid out: (H, W) bool, column-major in memory where it is coded so."""
        lines = self.size[::-1] if self.by_columns else self.size
        mask = _fill(self.edges, lines)
        return mask.T if self.by_columns else mask

    def sample(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """
        The pixels where `rows` and `columns` meet, ascending each: (len(rows), len(columns)) bool.

        The edges are moved to the places that they have among those pixels, which costs what the outline is long and
        not what the mask is large.
        """
        lines, places = (columns, rows) if self.by_columns else (rows, columns)
        # A line that is taken twice would go back in the flattened mask.
        distinct, repeats = np.unique(lines, return_inverse=True)
        line, place = np.divmod(self.edges, self.size[0] if self.by_columns else self.size[1])
        before, through = np.searchsorted(distinct, line), np.searchsorted(distinct, line, side="right")
        edges = before * len(places) + (through - before) * np.searchsorted(places, place)
        sampled = _fill(edges, (len(distinct), len(places)))
        if len(distinct) < len(lines):
            sampled = sampled[repeats]
        return sampled.T if self.by_columns else sampled


def _fill(edges: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Runs by their ascending edges, start and end in turn, as a bool array."""
    lengths = np.diff(edges, prepend=0, append=shape[0] * shape[1])
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape)


def box_runs(box: np.ndarray, size: tuple[int, int]) -> RunMask:
    """
    The pixels whose center lies in `box` (4,), xyxy in pixels within the image.

    A box that holds no pixel center keeps the pixel under its own center.
    """
    ends = []
    for low, high, side in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first, last = int(np.ceil(low - 0.5)), int(np.ceil(high - 0.5))
        if last <= first:
            first = min(int((low + high) / 2), side - 1)
            last = first + 1
        ends.append((first, last))
    (top, bottom), columns = ends
    return RunMask(size, (np.arange(top, bottom)[:, None] * size[1] + columns).ravel(), by_columns=False)


def polygon_runs(rings: Sequence[Sequence[float]], size: tuple[int, int]) -> RunMask:
    """
    Fill a polygon: a pixel is region when its center lies inside a ring (even-odd rule), rings are united.

    Args:
        rings: flat rings `[x0, y0, x1, y1, ...]` in pixels, at least three points each.
        size: (height, width) of the mask.

    Returns:
        The mask; a polygon on the image that covers no pixel center keeps the pixel at the mean of its corners.

    Raises:
        ValueError: a ring is not a flat list of at least three finite points.
    """
    height, width = size
    points = [_ring_points(ring) for ring in rings]
    parts = [_crossings(ring, size) for ring in points]
    mask = RunMask.from_edges(size, parts[0] if len(parts) == 1 else _union(parts), by_columns=False)
    if points and not mask.edges.size:
        x, y = np.concatenate(points).mean(axis=0)
        if 0 <= x < width and 0 <= y < height:
            place = int(y) * width + int(x)
            return RunMask(size, np.array([place, place + 1]), by_columns=False)
    return mask


def _crossings(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the rows of a mask enter and leave a ring (N, 2), as ascending places row by row."""
    height, width = size
    following = np.roll(ring, -1, axis=0)
    # Each edge crosses the rows whose center lies between its ends; a pixel is inside after an odd crossing.
    ends = np.sort(np.stack([ring[:, 1], following[:, 1]]), axis=0)
    first, last = np.clip(np.ceil(ends - 0.5), 0, height).astype(np.int64)
    crossed = last - first
    edge = np.repeat(np.arange(len(ring)), crossed)
    row = np.arange(len(edge)) + np.repeat(first - (np.cumsum(crossed) - crossed), crossed)
    start, step = ring[edge], following[edge] - ring[edge]
    x = start[:, 0] + (row + 0.5 - start[:, 1]) * step[:, 0] / step[:, 1]
    # Every row is crossed an even number of times: in order, the crossings start and end runs of region.
    return np.sort(row * width + np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64))


def _union(parts: list[np.ndarray]) -> np.ndarray:
    """Edges of the runs that lie in any of several masks, from the edges of each."""
    if not parts:
        return np.zeros(0, dtype=np.int64)
    edges = np.concatenate(parts)
    steps = np.concatenate([np.where(np.arange(len(part)) % 2, -1, 1) for part in parts])
    order = np.argsort(edges, kind="stable")
    covered = np.cumsum(steps[order]) > 0
    return edges[order][covered != np.concatenate([[False], covered[:-1]])]


def _ring_points(ring: Any) -> np.ndarray:
    try:
        points = np.asarray(ring, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon is a list of flat rings [x0, y0, x1, ...], got a ring {ring!r:.80}") from error
    if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
        raise ValueError(
            "a polygon is a list of flat rings [x0, y0, x1, y1, ...] of at least three finite points, "
            f"got a ring {ring!r:.80}"
        )
    return points.reshape(-1, 2)
