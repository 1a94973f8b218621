"""The geometry that images, masks, boxes and crops share: from source pixels to canvas pixels and back."""

from dataclasses import dataclass

import numpy as np

from .processing_runs import RunMask

# Where rows (y) and columns (x) stand in an xyxy box or an xy point.
AXES = (slice(1, None, 2), slice(0, None, 2))


@dataclass(frozen=True)
class Geometry:
    """
    Affine map that takes `source_box` of an image to `output_box` of an output canvas.

    Coordinates are continuous: pixel (row i, column j) covers [j, j + 1] x [i, i + 1], its center is (j + .5, i + .5).
    Both boxes are xyxy and may reach beyond the image or the canvas; sizes are (height, width) in pixels.
    """

    source_size: tuple[int, int]
    output_size: tuple[int, int]
    source_box: tuple[float, float, float, float]
    output_box: tuple[float, float, float, float]

    def to_output(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (..., 4) or points (..., 2) from source pixels to canvas pixels; nothing is clipped."""
        return _map(boxes, self.source_box, self.output_box)

    def to_source(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (..., 4) or points (..., 2) from canvas pixels to source pixels; nothing is clipped."""
        return _map(boxes, self.output_box, self.source_box)

    @property
    def visible_box(self) -> np.ndarray:
        """The part of the canvas that shows the image: (4,) xyxy in canvas pixels."""
        height, width = self.source_size
        image = self.to_output(np.array([0.0, 0.0, width, height]))
        return clip_boxes(image, self.output_size)

    def source_pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Row (H,) and column (W,) of the source pixel under each canvas pixel center, -1 beyond the image."""
        rows, columns = (
            _cells(_centers(self.output_size[i]), self.output_box, self.source_box, axis, self.source_size[i], 1)
            for i, axis in enumerate(AXES)
        )
        return rows, columns

    def output_cells(self, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the cell of a `grid` (h, w) over the canvas at each source pixel center, -1 beyond it."""
        rows, columns = (
            _cells(
                _centers(self.source_size[i]),
                self.source_box,
                self.output_box,
                axis,
                grid[i],
                self.output_size[i] / grid[i],
            )
            for i, axis in enumerate(AXES)
        )
        return rows, columns


def _centers(side: int) -> np.ndarray:
    return np.arange(side) + 0.5


def _cells(
    centers: np.ndarray, start: tuple[float, ...], end: tuple[float, ...], axis: slice, cells: int, cell_size: float
) -> np.ndarray:
    index = np.floor(_map_axis(centers, start[axis], end[axis]) / cell_size).astype(np.int64)
    return np.where((index >= 0) & (index < cells), index, -1)


def _map_axis(values: np.ndarray, start: tuple[float, ...], end: tuple[float, ...]) -> np.ndarray:
    # Division last: whole-number boxes then map without rounding, so a pixel center never slips to its neighbor.
    return end[0] + (values - start[0]) * (end[1] - end[0]) / (start[1] - start[0])


def _map(values: np.ndarray, start: tuple[float, ...], end: tuple[float, ...]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    mapped = np.empty_like(values)
    for axis in AXES:
        mapped[..., axis] = _map_axis(values[..., axis], start[axis], end[axis])
    return mapped


def clip_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Clip xyxy boxes (..., 4) in pixels to a canvas of `size` (height, width)."""
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))


def crop_geometry(
    box: np.ndarray, source_size: tuple[int, int], output_size: tuple[int, int], scale: float
) -> Geometry:
    """
    Square around a region: side = `scale` x the longer side of `box` (4,) in source pixels, centered on the box.

    The square may reach beyond the image (PixCLIP, arXiv 2511.04601, branch 2; the square is reconstructed).
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    half = scale * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    height, width = output_size
    return Geometry(source_size, output_size, (x - half, y - half, x + half, y + half), (0, 0, width, height))


def sample_masks(masks: list[np.ndarray | RunMask], geometry: Geometry, names: list[str]) -> np.ndarray:
    """
    Resample masks to the canvas of `geometry`: each canvas pixel takes the source pixel under its center.

    A mask that this would empty keeps one pixel: of its pixels on the canvas, the nearest to their centroid.

    Args:
        masks: R masks, as runs or (H, W) arrays, where non-zero is region.
        names: how errors call them.

    Returns:
        (R, *geometry.output_size) bool.

    Raises:
        ValueError: a region lies wholly outside the canvas.
    """
    rows, columns = geometry.source_pixels()
    # What lies beyond the image on the canvas stays 0; in between, a stretch of rows and one of columns.
    shown = _stretch(rows), _stretch(columns)
    rows, columns = rows[shown[0]], columns[shown[1]]
    sampled = np.zeros((len(masks), *geometry.output_size), dtype=bool)
    for canvas, mask, name in zip(sampled, masks, names, strict=True):
        target = canvas[shown]
        if isinstance(mask, RunMask):
            target[:] = mask.sample(rows, columns)
        else:
            # Whole lines first, along memory: far fewer cache lines than a grid of pixels.
            lines_are_rows = mask.flags.c_contiguous
            np.not_equal(mask[rows][:, columns] if lines_are_rows else mask.T[columns][:, rows].T, 0, out=target)
        if not target.any():
            x, y = _nearest_pixel(mask.decode() if isinstance(mask, RunMask) else mask, geometry, name)
            canvas[y, x] = True
    return sampled


def _stretch(index: np.ndarray) -> slice:
    places = np.flatnonzero(index >= 0)
    return slice(places[0], places[-1] + 1) if places.size else slice(0)


def _nearest_pixel(mask: np.ndarray, geometry: Geometry, name: str) -> np.ndarray:
    y, x = np.nonzero(mask)
    height, width = geometry.output_size
    points = geometry.to_output(np.stack([x, y], axis=1) + 0.5)
    points = points[((points >= 0) & (points < [width, height])).all(axis=1)]
    if len(points) == 0:
        raise _removed(name)
    nearest = np.argmin(((points - points.mean(axis=0)) ** 2).sum(axis=1))
    return points[nearest].astype(np.int64)


def place_boxes(boxes: np.ndarray, geometry: Geometry, names: list[str]) -> np.ndarray:
    """
    Boxes (R, 4) in source pixels as (R, 4) float32 xyxy in [0, 1] of the canvas, clipped to where it shows the image.

    Raises:
        ValueError: a region lies wholly outside the canvas.
    """
    x0, y0, x1, y1 = geometry.visible_box
    placed = np.clip(geometry.to_output(boxes), [x0, y0, x0, y0], [x1, y1, x1, y1])
    for box, name in zip(placed, names, strict=True):
        if box[2] <= box[0] or box[3] <= box[1]:
            raise _removed(name)
    height, width = geometry.output_size
    shares = (placed / np.array([width, height, width, height])).astype(np.float32)
    # A sliver that float32 would close keeps the least width that it has.
    low, high = shares[:, :2], shares[:, 2:]
    closed = high <= low
    high[closed] = np.nextafter(low[closed], np.float32(2))
    low[closed & (high > 1)], high[closed & (high > 1)] = np.nextafter(np.float32(1), np.float32(0)), 1
    return shares


def _removed(name: str) -> ValueError:
    return ValueError(f"{name} lies wholly in the part of its image that the center crop removes")
