"""Region inputs of a processor call: masks and boxes in every form read into arrays; COCO's run-length coding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .processing_geometry import clip_boxes
from .processing_numbers import MOST, as_array, as_float64
from .processing_runs import RunMask, box_runs, polygon_runs, read_rle

logger = logging.get_logger(__name__)

# Overshoot of a box, in pixels, that rounding explains and that is clipped without a warning.
BOX_TOLERANCE = 0.01


def encode_rle(mask: np.ndarray) -> dict:
    """
    Encode a mask as COCO's compressed run-length encoding (cocoapi `maskApi.c`, `rleToString`).

    Args:
        mask: (H, W) array; non-zero is region.

    Returns:
        `{"size": [H, W], "counts": str}`: runs of 0 and 1 in turn down the columns, each (from the fourth on) as the
        difference to the run two before, in 5-bit little-endian groups written as ascii from `0` (48) on.

    Raises:
        ValueError: `mask` is not 2-D or has no pixels.
    """
    mask = as_array(mask, "mask")
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask must have shape (H, W) with at least one pixel, got {mask.shape}")
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    # A mask that starts inside the region starts with an empty run of zeros.
    edges = np.concatenate([[0] * (1 + bool(flat[0])), changes, [flat.size]])
    values = np.diff(edges)
    values[3:] = values[3:] - values[1:-2]
    # k groups hold a signed number of 5 k bits; seven groups hold any 32-bit run.
    groups = np.arange(1, 8)
    limits = np.int64(1) << (5 * groups - 1)
    needed = 1 + ((values[:, None] >= limits) | (values[:, None] < -limits)).sum(axis=1)
    codes = (values[:, None] >> (5 * (groups - 1))) & 0x1F
    codes[groups < needed[:, None]] |= 0x20
    text = (codes + 48).astype(np.uint8)[groups <= needed[:, None]].tobytes().decode("ascii")
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": text}


def decode_rle(rle: dict) -> np.ndarray:
    """
    Decode COCO's run-length encoding: `read_rle` as an (H, W) bool array, column-major in memory as it is coded.
    """
    return read_rle(rle).decode()


def polygon_mask(rings: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """`polygon_runs` as an (H, W) bool array."""
    return polygon_runs(rings, size).decode()


def read_mask(mask: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """`read_runs_or_mask` as an (H, W) array, bool or uint8; non-zero is region."""
    read = read_runs_or_mask(mask, size, name)
    return read.decode() if isinstance(read, RunMask) else read


def read_runs_or_mask(mask: Any, size: tuple[int, int], name: str) -> np.ndarray | RunMask:
    """
    Read one mask in any of its forms.

    Args:
        mask: PIL image ("1", "L", or "P" with its indices as values), (H, W) array or tensor, COCO RLE dict, or
            polygon (list of flat rings). Values are bool, integers {0, 1} or {0, 255}, or floats in [0, 1], where 0.5
            and more is region.
        size: (height, width) of its image.
        name: how errors call it.

    Returns:
        The runs of an RLE or a polygon; else (H, W) bool, or the uint8 array itself. Non-zero is region, and there is
        some.

    Raises:
        TypeError: none of these forms.
        ValueError: another size than its image, other values (NaN among them), or no region pixel.
    """
    if isinstance(mask, dict | list | tuple):
        try:
            runs = read_rle(mask) if isinstance(mask, dict) else polygon_runs(mask, size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _check_size(runs.size, size, name)
        if not runs.edges.size:
            raise _empty(name)
        return runs
    if isinstance(mask, np.ndarray | torch.Tensor):
        values = as_array(mask, name)
    elif isinstance(mask, Image.Image):
        try:
            values = np.asarray(mask)
        except Exception as error:  # any: what a decoder raises on foreign bytes
            raise ValueError(f"{name} is a corrupt image: {error}") from error
    else:
        raise TypeError(
            f"{name} must be a PIL image, an array, a tensor, an RLE dict or a polygon (list of flat rings), "
            f"got {type(mask).__name__}"
        )
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape (H, W), got {values.shape}")
    _check_size(values.shape, size, name)
    values = _binary(values, name)
    if not values.any():
        raise _empty(name)
    return values


def _check_size(shape: tuple[int, ...], size: tuple[int, int], name: str) -> None:
    if tuple(shape) != tuple(size):
        raise ValueError(f"{name} has (height, width) {tuple(shape)}, but its image has {tuple(size)}")


def _empty(name: str) -> ValueError:
    return ValueError(f"{name} is empty: a mask must have at least one region pixel on its image")


def _binary(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind == "b":
        return values
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold bool, integer or float values, got {values.dtype}")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (0 <= low and high <= 1):
            raise ValueError(f"{name} holds floats, which must lie in [0, 1]; got values from {low} to {high}")
        return values >= 0.5
    if 0 <= low and high <= 1:
        return values.view(bool) if values.itemsize == 1 else values.astype(bool)
    if 0 <= low and high <= 255:
        values = values.astype(np.uint8, copy=False)
        # As signed bytes 255 is -1: two passes and no copy.
        signed = values.view(np.int8)
        if -1 <= signed.min() and signed.max() <= 0:
            return values
    other = values[(values != 0) & (values != 255)][0]
    raise ValueError(f"{name} holds integers, which must be {{0, 1}} or {{0, 255}}; got {other} among them")


def read_boxes(
    boxes: Any, size: tuple[int, int], name: str, box_format: str = "xyxy", normalized: bool | None = None
) -> tuple[np.ndarray, list[str]]:
    """
    Read the boxes of one image and clip them to it.

    Args:
        boxes: (R, 4) list, array or tensor.
        size: (height, width) of the image.
        name: how errors call the boxes of this image.
        box_format: "xyxy", "xywh" (corner and size) or "cxcywh" (center and size).
        normalized: coordinates are fractions of the width and height, not pixels. None means pixels, unless they look
            like fractions.

    Returns:
        (R, 4) float64 xyxy in pixels, and the names of the boxes that were partly outside and lost that part.

    Raises:
        ValueError: no numbers, another shape, values that are not finite or 2**31 pixels away, x1 <= x0 or y1 <= y0, a
            box wholly outside its image, an unknown format, or values that contradict `normalized`: above 1 with True,
            all within 1 with None, for boxes that small hold no more than one pixel.
    """
    if box_format not in ("xyxy", "xywh", "cxcywh"):
        raise ValueError(f"box_format must be 'xyxy', 'xywh' or 'cxcywh', got {box_format!r}")
    values = as_float64(boxes, name, "numbers of shape (R, 4)")
    if values.size == 0:
        return np.zeros((0, 4)), []
    if values.ndim != 2 or values.shape[1] != 4:
        raise ValueError(f"{name} must have shape (R, 4), one row per region, got {values.shape}")
    _raise_at(~np.isfinite(values).all(axis=1), values, name, "must be finite")
    _raise_at((np.abs(values) > MOST).any(axis=1), values, name, f"must lie between -{MOST} and {MOST}")
    if normalized:
        _raise_at((values > 1.0001).any(axis=1), values, name, "must lie in [0, 1] with normalized=True")
    elif normalized is None and np.abs(values).max() <= 1:
        raise ValueError(
            f"{name} holds no value above 1, so it looks like fractions of the image: pass normalized=True, or "
            f"normalized=False where it is pixels, got {values[0].tolist()}"
        )
    height, width = size
    xyxy = values.copy()
    if box_format == "cxcywh":
        xyxy[:, :2] -= values[:, 2:] / 2
    if box_format != "xyxy":
        xyxy[:, 2:] += xyxy[:, :2]
    if normalized:
        xyxy *= np.array([width, height, width, height])
    degenerate = (xyxy[:, 2:] <= xyxy[:, :2]).any(axis=1)
    _raise_at(degenerate, values, name, f"must have x1 > x0 and y1 > y0 (box_format={box_format!r})")
    clipped = clip_boxes(xyxy, size)
    outside = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    _raise_at(outside, values, name, f"lies outside its image of width {width} and height {height}")
    cut = np.flatnonzero(np.abs(clipped - xyxy).max(axis=1) > BOX_TOLERANCE)
    return clipped, [f"{name}[{i}]" for i in cut]


def _raise_at(wrong: np.ndarray | np.bool_, values: np.ndarray, name: str, message: str) -> None:
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"{name}[{i}] {message}, got {values[i].tolist()}")


def box_mask(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`box_runs` as an (H, W) bool array."""
    return box_runs(box, size).decode()


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Tight box (4,) int64, xyxy in pixels, around the region pixels of a non-empty mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@dataclass
class Regions:
    """
    The regions of one image in its own pixels: masks or boxes, whichever were read.

    masks: R masks as runs or (H, W) arrays, bool or uint8, non-zero is region; or None. boxes: (R, 4) float64 xyxy, or
    None.
    names: how errors call each region.
    """

    size: tuple[int, int]
    names: list[str]
    masks: list[np.ndarray | RunMask] | None
    boxes: np.ndarray | None

    def get_masks(self) -> list[np.ndarray | RunMask]:
        """The masks; rectangles where boxes were read."""
        if self.masks is not None:
            return self.masks
        return [box_runs(box, self.size) for box in self.get_boxes()]

    def get_boxes(self) -> np.ndarray:
        """(R, 4) boxes; the tight ones (whole pixels) where masks were read."""
        if self.boxes is not None:
            return self.boxes
        boxes = [mask.box if isinstance(mask, RunMask) else mask_box(mask) for mask in self.masks or ()]
        return np.array(boxes, dtype=np.int64).reshape(-1, 4)

    def describe(self) -> list[dict]:
        """One dict per region: its box in original pixels and the pixel count of its mask."""
        keys = ("xmin", "ymin", "xmax", "ymax")
        areas = [mask.area if isinstance(mask, RunMask) else int(np.count_nonzero(mask)) for mask in self.get_masks()]
        return [
            {"box": dict(zip(keys, box, strict=True)), "mask_area": area}
            for box, area in zip(self.get_boxes().tolist(), areas, strict=True)
        ]


def split_per_image(values: Any, name: str, num_images: int, batched: bool) -> list:
    """
    The entry of each image: those of a list for a list of images, the whole of `values` for one bare image.

    Raises:
        ValueError: not one entry for each image of the list.
    """
    if not batched:
        return [values]
    count = len(values) if is_list(values) else type(values).__name__
    if count != num_images:
        raise ValueError(f"{name} must be a list with one list for each of the {num_images} images, got {count}")
    return [[] if value is None else value for value in values]


def flatten_like(images: list[list], values: Any, name: str) -> list | None:
    """
    What the images of a list of lists bring along, nested as they are, as one list with an entry for each image.

    Raises:
        ValueError: not one list for each list of images, or not one entry for each of its images.
    """
    if values is None:
        return None
    rows = split_per_image(values, name, len(images), batched=True)
    flat = []
    for i, (entries, row) in enumerate(zip(images, rows, strict=True)):
        flat += split_per_image(row, f"{name}[{i}]", len(entries), batched=True)
    return flat


def _count(values: Any, name: str, ndim: int) -> int:
    if isinstance(values, np.ndarray | torch.Tensor) and values.ndim != ndim and (not values.ndim or len(values)):
        raise ValueError(f"{name} must have {ndim} dimensions, one row per region, got shape {tuple(values.shape)}")
    if not is_list(values):
        raise TypeError(f"{name} must be a list with one entry per region, got {type(values).__name__}")
    return len(values)


def is_list(values: Any) -> bool:
    """Whether values come one after the other: in a list, or in an array that has an axis."""
    return isinstance(values, list | tuple) or (isinstance(values, np.ndarray | torch.Tensor) and values.ndim > 0)


def choose_prompt(prompt: str | None, masks: Any, boxes: Any, prompts: tuple[str, ...], points: Any = None) -> str:
    """
    What prompts the regions of a call: as said, else masks or boxes, whichever are given, else points.

    Args:
        prompt: what the caller says, or None.
        masks, boxes, points: as given, None where not.
        prompts: what the model can be prompted by, the usual one first.

    Raises:
        ValueError: an unknown prompt, or none where masks and boxes are both given; points for a model that takes
            none, or a prompt that nothing of its kind is given for.
    """
    if points is not None and "point" not in prompts:
        raise ValueError(
            f"points must be None for a model that {' or '.join(map(repr, prompts))} prompts: make masks of them "
            "first with masks_from_points"
        )
    if prompt is not None:
        if prompt not in prompts:
            raise ValueError(f"prompt must be one of {', '.join(map(repr, prompts))}, got {prompt!r}")
        if prompt == "point" and points is None:
            raise ValueError("prompt='point' needs points, got None")
        if prompt != "point" and masks is None and boxes is None and points is not None:
            raise ValueError(f"prompt={prompt!r} needs boxes or masks, got points alone")
        return prompt
    if masks is None and boxes is None and points is not None:
        return "point"
    if masks is not None and boxes is not None:
        raise ValueError(
            f"prompt must say which of masks and boxes prompts the model where both are given: "
            f"{' or '.join(map(repr, prompts))}, got None"
        )
    given = "box" if masks is None else "mask"
    return given if given in prompts else prompts[0]


def read_regions(
    masks: Any,
    boxes: Any,
    sizes: list[tuple[int, int]],
    batched: bool,
    use: str,
    box_format: str = "xyxy",
    normalized: bool | None = None,
) -> list[Regions] | None:
    """
    Read the regions of a batch.

    Args:
        masks, boxes: a list of regions for one bare image, or for a list of images a list of those; None, or an empty
            list for an image without regions.
        sizes: (height, width) of each image.
        batched: the images came as a list.
        use: "masks" or "boxes": which of the two is read where both are given.

    Returns:
        Regions of each image, None when neither masks nor boxes are given. Boxes that were partly outside their image
        are clipped with one warning.

    Raises:
        TypeError, ValueError: as `read_mask` and `read_boxes`; the counts of images, masks and boxes differ; no region
            at all.
    """
    given = {key: value for key, value in (("masks", masks), ("boxes", boxes)) if value is not None}
    if not given:
        return None
    counts = {}
    for key, values in given.items():
        given[key] = split_per_image(values, key, len(sizes), batched)
        names = [f"{key}[{i}]" for i in range(len(sizes))] if batched else [key]
        ndim = 3 if key == "masks" else 2
        counts[key] = [_count(value, name, ndim) for value, name in zip(given[key], names, strict=True)]
    if len(counts) == 2 and counts["masks"] != counts["boxes"]:
        raise ValueError(f"masks and boxes must match: got {counts['masks']} masks and {counts['boxes']} boxes")
    key = use if use in given else next(iter(given))
    if not any(counts[key]):
        raise ValueError(f"{key} holds no region for any image; leave it out to process images alone")
    cut: list[str] = []
    result = []
    for i, (values, size) in enumerate(zip(given[key], sizes, strict=True)):
        name = f"{key}[{i}]" if batched else key
        names = [f"{name}[{j}]" for j in range(counts[key][i])]
        if key == "masks":
            read = [read_runs_or_mask(mask, size, mask_name) for mask, mask_name in zip(values, names, strict=True)]
            result.append(Regions(size, names, read, None))
        else:
            clipped, cut_here = read_boxes(values, size, name, box_format, normalized)
            cut += cut_here
            result.append(Regions(size, names, None, clipped))
    if cut:
        logger.warning(f"{len(cut)} boxes lie partly outside their image and were clipped: {', '.join(cut):.200}")
    return result


def pad_regions(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Stack (R_i, ...) arrays into (B, R, ...), zeros after the last region, and their (B, R) int64 mask."""
    slots = max(len(row) for row in rows)
    padded = np.zeros((len(rows), slots, *rows[0].shape[1:]), dtype=rows[0].dtype)
    mask = np.zeros((len(rows), slots), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return padded, mask


def check_call(
    images: Any,
    text: Any,
    region_inputs: dict[str, Any],
    region_outputs: dict[str, bool],
) -> None:
    """
    Refuse a combination of arguments that no reading of their values can make good.

    Raises:
        ValueError: no input at all, regions or their texts without images, or region texts or outputs without regions.
    """
    given = [name for name, value in region_inputs.items() if value is not None]
    if images is None and text is None and not given:
        raise ValueError("nothing to process: give images, text, or both")
    if images is None and given:
        raise ValueError(f"{given[0]} needs the images that the regions are in, got images=None")
    if region_inputs.get("point_labels") is not None and region_inputs.get("points") is None:
        raise ValueError("point_labels needs points, got None")
    if {"masks", "boxes", "points"} & set(given):
        return
    asked = given + [name for name, wanted in region_outputs.items() if wanted]
    if asked:
        raise ValueError(f"{asked[0]} needs regions: give masks, boxes or points")
