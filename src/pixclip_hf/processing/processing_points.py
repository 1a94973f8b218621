"""Points of a processor call: read, chosen among boxes and masks, placed on the canvas and padded."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .processing_geometry import Geometry
from .processing_numbers import as_float64, shown
from .processing_regions import is_list, split_per_image

# Labels of points: on the region, beside it, and padding.
POSITIVE, NEGATIVE, PADDING = 1, 0, -1
# How far beyond the canvas rounding may take a point, in pixels.
_TOLERANCE = 1e-6


@dataclass
class Points:
    """
    The points of one image in its own pixels.

    names: how errors call the regions. rows: for each region its points (P, 2) float64 and labels (P,) int64, or None
    for a region without points.
    """

    names: list[str]
    rows: list[tuple[np.ndarray, np.ndarray] | None]

    @property
    def given(self) -> np.ndarray:
        """(R,) bool: which regions have points."""
        return np.array([row is not None for row in self.rows], dtype=bool)

    def describe(self, region: int) -> dict[str, Any]:
        """The points and labels of a region, as they were given."""
        points, labels = self.rows[region]  # type: ignore[misc]
        return {"points": points.tolist(), "point_labels": labels.tolist()}

    def place(self, geometry: Geometry) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """
        The points of each region, xy in [0, 1] of the canvas, and their labels.

        Raises:
            ValueError: a point lies outside the canvas.
        """
        placed: list[tuple[np.ndarray, np.ndarray] | None] = []
        height, width = geometry.output_size
        for name, row in zip(self.names, self.rows, strict=True):
            if row is None:
                placed.append(None)
                continue
            points, labels = geometry.to_output(row[0]), row[1]
            outside = ((points < -_TOLERANCE) | (points > np.array([width, height]) + _TOLERANCE)).any(axis=1)
            if outside.any():
                raise ValueError(
                    f"{name}[{int(outside.argmax())}] lies in the part of its image that the center crop removes"
                )
            placed.append((np.clip(points / [width, height], 0, 1), labels))
        return placed


def read_points(
    points: Any, labels: Any, sizes: list[tuple[int, int]], batched: bool, normalized: bool | None = None
) -> list[Points]:
    """
    Read the points of a batch, nested as SAM takes them.

    Args:
        points: for one bare image R regions of P points [x, y] each, where P may differ; for a list of images a list
            of those. A region without points is None.
        labels: nested alike, 1 for a point on the region and 0 for a point beside it; None for positive points alone.
        sizes: (height, width) of each image.
        batched: the images came as a list.
        normalized: coordinates are fractions of the width and height (True) or pixels (False); None is for pixels that
            do not look like fractions.

    Raises:
        TypeError, ValueError: another nesting, points that are not finite or outside their image, labels other than 0
            and 1 or not one for each point, or a region without a positive point.
    """
    per_image = split_per_image(points, "points", len(sizes), batched)
    labels_per_image = [None] * len(sizes)
    if labels is not None:
        labels_per_image = split_per_image(labels, "point_labels", len(sizes), batched)
    found = []
    for i, (regions, marks, size) in enumerate(zip(per_image, labels_per_image, sizes, strict=True)):
        name, label_name = (f"{key}[{i}]" if batched else key for key in ("points", "point_labels"))
        _check_list(regions, name)
        if marks is not None:
            _check_list(marks, label_name)
            if len(marks) != len(regions):
                raise ValueError(
                    f"{label_name} must hold labels for each of the {len(regions)} regions of {name}, got {len(marks)}"
                )
        rows: list[tuple[np.ndarray, np.ndarray] | None] = []
        for j, region in enumerate(regions):
            own_marks = None if marks is None else marks[j]
            if region is None:
                if own_marks is not None:
                    raise ValueError(f"{label_name}[{j}] must be None as {name}[{j}] is, got {shown(own_marks)}")
                rows.append(None)
                continue
            read = _read_region(region, size, f"{name}[{j}]", normalized)
            rows.append((read, _read_labels(own_marks, len(read), f"{label_name}[{j}]")))
        found.append(Points([f"{name}[{j}]" for j in range(len(rows))], rows))
    return found


def _check_list(values: Any, name: str) -> None:
    if not is_list(values):
        raise TypeError(f"{name} must be a list with the points of each region, got {type(values).__name__}")


def _read_region(region: Any, size: tuple[int, int], name: str, normalized: bool | None) -> np.ndarray:
    points = as_float64(region, name, "a list of points [x, y]")
    if points.ndim != 2 or points.shape[1:] != (2,) or not len(points):
        raise ValueError(
            f"{name} must hold the points of a region, shape (P, 2) with at least one, got {points.shape}: points are "
            "nested as images, regions, points, [x, y]"
        )
    height, width = size
    most = np.array([1, 1] if normalized else [width, height])
    outside = ~((points >= 0) & (points <= most)).all(axis=1)
    if outside.any():
        i = int(outside.argmax())
        where = "[0, 1] with normalized=True" if normalized else f"its image of width {width} and height {height}"
        raise ValueError(f"{name}[{i}] must lie in {where}, got {points[i].tolist()}")
    if normalized is None and (points <= 1).all() and (points % 1).any():
        raise ValueError(
            f"{name} holds no value above 1, so it looks like fractions of the image: pass normalized=True, or "
            f"normalized=False where it is pixels, got {points[0].tolist()}"
        )
    return points * [width, height] if normalized else points


def _read_labels(labels: Any, count: int, name: str) -> np.ndarray:
    if labels is None:
        return np.full(count, POSITIVE)
    read = as_float64(labels, name, "a list of labels")
    if read.shape != (count,):
        raise ValueError(f"{name} must hold one label for each of {count} points, got shape {read.shape}")
    other = (read != POSITIVE) & (read != NEGATIVE)
    if other.any():
        i = int(other.argmax())
        raise ValueError(f"{name}[{i}] must be 1 (on the region) or 0 (beside it), got {read[i].item():g}")
    if not (read == POSITIVE).any():
        raise ValueError(f"{name} must hold a positive point (1), got {read.astype(int).tolist()}")
    return read.astype(np.int64)


@dataclass
class MixedRegions:
    """
    The regions of a batch some of which points prompt.

    points: the points of each image. by_point: (R,) bool for each image, which regions points prompt. boxes, masks: as
    given, with fillers in the place of missing ones; None where none are used. has_other: (R,) bool for each image,
    which regions have a box or a mask of their own among these.
    """

    points: list[Points]
    by_point: list[np.ndarray]
    boxes: Any
    masks: Any
    has_other: list[np.ndarray]

    def place(self, geometries: list[Geometry]) -> tuple[np.ndarray, np.ndarray]:
        """`pad_points` of the regions that points prompt."""
        return pad_points(
            [
                [row if prompts else None for row, prompts in zip(entry.place(geometry), chosen, strict=True)]
                for entry, geometry, chosen in zip(self.points, geometries, self.by_point, strict=True)
            ]
        )


def read_mixed(
    points: Any,
    labels: Any,
    boxes: Any,
    masks: Any,
    sizes: list[tuple[int, int]],
    batched: bool,
    prompt: str | None,
    box_format: str,
    normalized: bool | None,
) -> MixedRegions:
    """
    Read points, and see which regions they prompt among boxes and masks.

    Args:
        points, labels, sizes, batched, normalized: as in `read_points`.
        boxes, masks: nested as in `read_regions`; None for a region without, or for all regions of an image.
        prompt: what the caller says. "box" and "mask" prefer a box or mask to points, "point" the other way around;
            None is for regions that have one or the other.
        box_format: of the boxes.

    Raises:
        TypeError, ValueError: as `read_points`; no region at all, another number of boxes or masks, a region that has
            nothing, or both without a `prompt`, or no points where points are to prompt.
    """
    read = read_points(points, labels, sizes, batched, normalized)
    others = {}
    for name, values in (("boxes", boxes), ("masks", masks)):
        if values is not None:
            others[name] = split_per_image(values, name, len(sizes), batched)
            for values_of_image in others[name]:
                _check_list(values_of_image, name)
    counts = [max(len(row) for row in rows) for rows in zip([e.rows for e in read], *others.values(), strict=True)]
    if not any(counts):
        raise ValueError("points holds no region for any image; leave it out to process images alone")
    for i, (entry, count) in enumerate(zip(read, counts, strict=True)):
        if not entry.rows:
            name = f"points[{i}]" if batched else "points"
            read[i] = Points([f"{name}[{j}]" for j in range(count)], [None] * count)
    filled: dict[str, Any] = {}
    has_other = [np.zeros(len(entry.rows), dtype=bool) for entry in read]
    complete = {}
    for name, per_image in others.items():
        fillers = [
            _whole_box(size, box_format, normalized) if name == "boxes" else _whole_mask(size) for size in sizes
        ]
        filled[name], given = _fill_missing(per_image, counts, fillers)
        if [len(row) for row in given] != [len(entry.rows) for entry in read]:
            raise ValueError(
                f"points and {name} must match: got {[len(entry.rows) for entry in read]} regions with points and "
                f"{list(map(len, given))} with {name}; a region that lacks one of them has None there"
            )
        has_other = [other | row for other, row in zip(has_other, given, strict=True)]
        complete[name] = all(row.all() for row in given)
    by_point = [_choose(entry, other, prompt) for entry, other in zip(read, has_other, strict=True)]
    if prompt == "point":
        # What does not prompt goes along, for a loss, where it is whole: boxes before masks.
        names = [name for name in ("boxes", "masks") if complete.get(name)]
        filled = {name: filled[name] for name in names[:1]}
    if not batched:
        filled = {name: values[0] for name, values in filled.items()}
    return MixedRegions(read, by_point, filled.get("boxes"), filled.get("masks"), has_other)


def _choose(points: Points, has_other: np.ndarray, prompt: str | None) -> np.ndarray:
    for name, given, other in zip(points.names, points.given, has_other, strict=True):
        if not given and (prompt == "point" or not other):
            needed = "" if prompt == "point" else ", or a box or a mask must be given for that region"
            raise ValueError(f"{name} must hold points{needed}, got None")
        if prompt is None and given and other:
            raise ValueError(
                f"{name} has a box or a mask too: prompt must say which prompts the region, 'box', 'mask' or 'point', "
                "got None"
            )
    return ~has_other if prompt in ("box", "mask") else points.given


def _whole_box(size: tuple[int, int], box_format: str, normalized: bool | None) -> list[float]:
    height, width = (1, 1) if normalized else size
    return [width / 2, height / 2, width, height] if box_format == "cxcywh" else [0, 0, width, height]


def _whole_mask(size: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size), "counts": [0, size[0] * size[1]]}


def _fill_missing(
    per_image: list[Any], counts: list[int], fillers: list[Any]
) -> tuple[list[list[Any]], list[np.ndarray]]:
    """The values of each image with fillers for missing ones, and (R,) bool for each: which are given."""
    filled, given = [], []
    for values, count, filler in zip(per_image, counts, fillers, strict=True):
        values = list(values) if len(values) else [None] * count
        # One of its own, where there is one, so that no check of the image's values takes the filler for one of them.
        own = next((value for value in values if value is not None), filler)
        filled.append([own if value is None else value for value in values])
        given.append(np.array([value is not None for value in values], dtype=bool))
    return filled, given


def pad_points(placed: list[list[tuple[np.ndarray, np.ndarray] | None]]) -> tuple[np.ndarray, np.ndarray]:
    """
    Points of the regions of each image as one array, and their labels as another.

    Args:
        placed: points (P, 2) and labels (P,) of each region; None for a region that points do not prompt.

    Returns:
        (B, R, P, 2) float32 and (B, R, P) int64; zeros and -1 where there is no point.
    """
    slots = max(map(len, placed))
    most = max((len(row[1]) for rows in placed for row in rows if row is not None), default=1)
    points = np.zeros((len(placed), slots, most, 2), dtype=np.float32)
    labels = np.full((len(placed), slots, most), PADDING, dtype=np.int64)
    for i, rows in enumerate(placed):
        for j, row in enumerate(rows):
            if row is not None:
                count = len(row[1])
                points[i, j, :count], labels[i, j, :count] = row
    return points, labels
