"""Masks as runs, as RLE, polygons and boxes describe them: measured and resampled without being laid out in pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .processing_numbers import as_array, most_pixels, read_numbers, read_whole, shown

# COCO rounds the corners of a polygon to fifths of a pixel.
_STEPS = 5
# So many characters of a code are read one by one in the time that numpy's calls take for any number of them.
_FEW_CODES = 100
# A batch of training reads each mask to check its record, and again to place it: so many codes are kept in between,
# and none longer than this.
_KEPT_CODES, _LONGEST_KEPT = 1024, 4096


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
        if all(np.array_equal(axis, np.arange(side)) for axis, side in zip((rows, columns), self.size, strict=True)):
            return self.decode()
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


def read_rle(rle: dict) -> RunMask:
    """
    Read COCO's run-length encoding.

    Args:
        rle: `{"size": [H, W], "counts": ...}` with counts compressed (str or bytes) or plain (a sequence of ints).

    Raises:
        ValueError: keys are missing, the size is not two positive integers, it has more pixels than any image may
            have, a run is negative, or the runs do not add up to H x W.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise ValueError(f"an RLE must be a dict with 'size' and 'counts', got {shown(rle)}")
    size, counts = _rle_size(rle["size"]), rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")
    if isinstance(counts, bytes):
        return _read_code(counts, size) if len(counts) <= _LONGEST_KEPT else _read_code.__wrapped__(counts, size)
    runs = as_array(counts, "an RLE's counts")
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise ValueError(f"an RLE's counts must be a string or a flat list of integers, got {shown(counts)}")
    return _from_counts(runs, size)


@lru_cache(_KEPT_CODES)
def _read_code(counts: bytes, size: tuple[int, int]) -> RunMask:
    """A mask by COCO's compressed counts, whose edges several readers share."""
    mask = _from_counts(_uncompress_counts(counts, size), size)
    mask.edges.flags.writeable = False
    return mask


def _from_counts(runs: np.ndarray, size: tuple[int, int]) -> RunMask:
    """A mask by its run lengths, the first of background.

    Raises:
        ValueError: a run is negative, or they do not add up to the pixels of `size`.
    """
    pixels = size[0] * size[1]
    # No run is longer than the mask: sums of such ones wrap around, and may come out right.
    if not runs.size or runs.min() < 0 or runs.max() > pixels or runs.astype(np.int64).sum() != pixels:
        raise _no_sum(size, runs)
    edges = np.cumsum(runs.astype(np.int64))[: runs.size // 2 * 2]
    return RunMask.from_edges(size, edges, by_columns=True)


def _rle_size(size: Any) -> tuple[int, int]:
    try:
        height, width = (
            read_whole(int(side) if isinstance(side, float) and side.is_integer() else side, "a side") for side in size
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"an RLE's size must be [height, width], got {shown(size)}: {error}") from error
    if height < 1 or width < 1:
        raise ValueError(f"an RLE's size must be positive, got {shown(size)}")
    if height * width > most_pixels():
        raise ValueError(f"an RLE's size must be of at most {most_pixels()} pixels, got {shown(size)}")
    return height, width


def _no_sum(size: tuple[int, int], runs: Sequence[int] | np.ndarray) -> ValueError:
    total = sum(int(run) for run in runs)  # of any size
    return ValueError(f"an RLE's runs must be >= 0 and add up to {size[0]} x {size[1]}, got a sum of {total}")


def _uncompress_counts(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """
    Run lengths of COCO's compressed `counts` (cocoapi `maskApi.c`, `rleFrString`).

    Raises:
        ValueError: they are not a whole number of codes, or one of them is beyond any run of a mask of this size.
    """
    if not counts or min(counts) < 48 or max(counts) > 48 + 63 or (counts[-1] - 48) & 0x20:
        raise ValueError("counts are not a COCO compressed run-length string")
    if len(counts) <= _FEW_CODES:
        return _exact_runs(counts, size)
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 12:
        return _exact_runs(counts, size)
    position = np.arange(codes.size) - np.repeat(first, lengths)
    values = np.add.reduceat((codes & 0x1F) << (5 * position), first)
    values -= np.where(codes[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    if np.abs(values).max() > size[0] * size[1]:  # sums of such ones may wrap around
        return _exact_runs(counts, size)
    # From the fourth on, a run is stored as the difference to the run two before.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _exact_runs(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """
    Run lengths of whole codes, one by one in integers of any size, which no sum wraps.

    Raises:
        ValueError: a code has more groups than 64 bits take, or the runs do not add up.
    """
    runs: list[int] = []
    value = shift = 0
    for code in counts:
        if shift > 60:
            raise ValueError("counts hold a run too long for 64 bits")
        code -= 48
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if min(runs) < 0 or sum(runs) != size[0] * size[1]:
        raise _no_sum(size, runs)
    return np.array(runs, dtype=np.int64)


def polygon_runs(rings: Sequence[Sequence[float]], size: tuple[int, int]) -> RunMask:
    """
    Fill a polygon as COCO does (cocoapi `maskApi.c`, `rleFrPoly`), pixel by pixel: corners are rounded to fifths of a
    pixel, and a pixel is region when its center lies inside a ring (even-odd rule); rings are united.

    Args:
        rings: flat rings `[x0, y0, x1, y1, ...]` in pixels, at least three points each.
        size: (height, width) of the mask.

    Returns:
        The mask; a polygon on the image that covers no pixel center, for which COCO has an empty mask, keeps the pixel
        at the mean of its corners.

    Raises:
        ValueError: a ring is not a flat list of at least three points, finite and less than 2**31 pixels away.
    """
    height, width = size
    points = [_ring_points(ring) for ring in rings]
    parts = [_crossings(ring, size) for ring in points]
    mask = RunMask.from_edges(size, parts[0] if len(parts) == 1 else _union(parts), by_columns=True)
    if points and not mask.edges.size:
        x, y = np.concatenate(points).mean(axis=0)
        if 0 <= x < width and 0 <= y < height:
            place = int(x) * height + int(y)
            return RunMask(size, np.array([place, place + 1]), by_columns=True)
    return mask


def _crossings(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the columns of a mask enter and leave a ring (N, 2), as ascending places column by column.

    COCO walks every edge in steps of a fifth of a pixel along its longer axis, and notes where a step passes the
    middle of a column. Here those steps are found without walking: what is far outside costs nothing.
    """
    height, width = size
    corners = np.trunc(_STEPS * ring + 0.5)
    following = np.roll(corners, -1, axis=0)
    along_x = np.abs(following - corners)[:, 0] >= np.abs(following - corners)[:, 1]
    axis = np.where(along_x, 0, 1)
    edges = np.arange(len(ring))
    turned = (corners[edges, axis] > following[edges, axis])[:, None]
    start, end = np.where(turned, following, corners), np.where(turned, corners, following)
    # The middle of column i lies between the steps 5 i + 2 and 5 i + 3.
    low, high = np.minimum(corners, following)[:, 0], np.maximum(corners, following)[:, 0]
    first = np.clip(np.ceil((low - 2) / _STEPS), 0, width).astype(np.int64)
    stop = np.clip(np.floor((high - 3) / _STEPS) + 1, 0, width).astype(np.int64)
    crossed = np.maximum(stop - first, 0)
    edge = np.repeat(edges, crossed)
    column = np.arange(len(edge)) + np.repeat(first - (np.cumsum(crossed) - crossed), crossed)
    before = _STEPS * column + 2.0
    (x, y), (dx, dy) = start[edge].T, (end - start)[edge].T
    # An edge that crosses columns has a length along its axis.
    slope = np.where(along_x[edge], dy / np.where(along_x[edge], dx, 1), dx / np.where(along_x[edge], 1, dy))
    # Along x a step is a column of fifths, and the row is rounded.
    rows = [np.trunc(y + slope * (before - x + step) + 0.5) for step in (0, 1)]
    # Along y a step is a row of fifths: the last one before the rounded column passes the middle.
    steep = np.where(slope == 0, 1, slope)
    last = np.floor((before + 0.5 - x) / steep) - 1
    for _ in range(2):  # by the very arithmetic of COCO, which the division may miss by one
        place = np.trunc(x + steep * (last + 1) + 0.5)
        last += np.where(steep > 0, place <= before, place > before)
    row = np.where(along_x[edge], np.minimum(*rows), y + last)
    row = np.ceil(np.clip((row + 0.5) / _STEPS - 0.5, 0, height)).astype(np.int64)
    # Every column is crossed an even number of times: in order, the crossings start and end runs of region.
    return np.sort(column * height + row)


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
        points = read_numbers(ring, "a ring")
    except ValueError as error:
        raise ValueError(
            f"a polygon is a list of flat rings [x0, y0, x1, y1, ...] of at least three finite points: {error}"
        ) from error
    if points.ndim != 1 or points.size < 6 or points.size % 2:
        raise ValueError(
            "a polygon is a list of flat rings [x0, y0, x1, y1, ...] of at least three finite points, "
            f"got a ring {shown(ring)}"
        )
    return points.reshape(-1, 2)
