"""Scenes, the embedded default dataset: procedurally drawn objects with exact masks, boxes and texts.

Any record can be made on its own, from (index, split, seed, size, setting) alone, and is the same on every platform.
"""

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..processing.processing_regions import encode_rle
from ..record import record_features
from .layout import (
    COLORS,
    SETTINGS,
    SHAPES,
    SPLITS,
    TEXTURES,
    DrawStream,
    SceneObject,
    draw_layout,
    silhouette,
    tight_box,
)
from .texts import EARLY_WORDS, all_descriptions, alt_text, describe, image_captions, long_captions

if TYPE_CHECKING:
    import datasets


__all__ = [
    "COLORS",
    "EARLY_WORDS",
    "SETTINGS",
    "SHAPES",
    "SPLITS",
    "TEXTURES",
    "all_descriptions",
    "describe",
    "late_detail_pairs",
    "make_scene",
    "same_box_pairs",
    "scene_texts",
    "scenes_dataset",
]

COLOURS = COLORS  # the name before 0.2
SMALLEST_SIZE = 32

_INKS = {
    "red": (215, 25, 35),
    "orange": (250, 135, 10),
    "yellow": (245, 220, 30),
    "green": (25, 140, 45),
    "cyan": (40, 205, 215),
    "blue": (35, 65, 215),
    "purple": (115, 30, 160),
    "pink": (250, 110, 185),
}
_BACKGROUNDS = {
    "pale grey": (200, 200, 202),
    "medium grey": (140, 140, 138),
    "dark grey": (104, 104, 108),
    "sand-coloured": (206, 196, 176),
    "slate": (120, 130, 144),
    "brownish": (142, 130, 120),
}
_FINE_SIDE = 16  # percent of the image side below which an object wears its texture at half the scale


@lru_cache(maxsize=64)
def _second_tone(texture: str, size: int, unit: int) -> np.ndarray:
    """Where a texture shows its second tone, uint8 (size, size). Textures lie on the image's grid like wallpaper."""
    y, x = np.indices((size, size)) // unit
    if texture == "striped":
        pattern = y % 2 == 1
    elif texture == "chequered":
        pattern = (y // 2 + x // 2) % 2 == 1
    elif texture == "dotted":
        pattern = (y % 2 == 1) & (x % 2 == 1)
    else:
        pattern = np.zeros((size, size), dtype=bool)
    return pattern.astype(np.uint8)


@lru_cache(maxsize=8)
def _ramps(size: int) -> tuple[np.ndarray, np.ndarray]:
    ramp = (np.arange(size, dtype=np.int16) * 256 // size - 128).astype(np.int16)
    return ramp[None, :], ramp[:, None]


def _tones(color: str, shift: int) -> tuple[list[int], list[int]]:
    """First and second tone of an object: the color, and a dark tone of it that keeps the silhouette in one hue."""
    first = [min(max(channel + shift, 0), 255) for channel in _INKS[color]]
    return first, [channel * 42 // 100 for channel in first]


def _draw_labels(objects: list[SceneObject], size: int) -> np.ndarray:
    """uint8 (size, size): 0 is background, 2 k + 2 and 2 k + 3 the two tones of object k, later ones in front."""
    labels = np.zeros((size, size), dtype=np.uint8)
    coarse = max(1, (size + 16) // 32)
    for layer, item in enumerate(objects):
        fine = item.side * 100 < _FINE_SIDE * size
        pattern = _second_tone(item.texture, size, max(1, coarse // 2) if fine else coarse)
        window = slice(item.y, item.y + item.side), slice(item.x, item.x + item.side)
        np.copyto(labels[window], pattern[window] + np.uint8(2 * layer + 2), where=silhouette(item.shape, item.side))
    return labels


def _visible_masks(objects: list[SceneObject], labels: np.ndarray) -> list[np.ndarray]:
    """Bool (size, size) for each object; sets each object's `box` to the tight box of what is visible."""
    masks = []
    owners = labels >> 1
    for layer, item in enumerate(objects):
        mask = owners == layer + 1
        x0, y0, x1, y1 = tight_box(mask[item.y : item.y + item.side, item.x : item.x + item.side])
        item.box = (item.x + x0, item.y + y0, item.x + x1, item.y + y1)
        masks.append(mask)
    return masks


def _paint(draws: DrawStream, objects: list[SceneObject], labels: np.ndarray, background: str) -> Image.Image:
    """The image: background with a gradient, the objects in their tones, and a little brightness noise over all."""
    size = len(labels)
    palette: list[Sequence[int]] = [_BACKGROUNDS[background], (0, 0, 0)]
    for item in objects:
        palette.extend(_tones(item.color, draws.between(-10, 10)))
    slope_x, slope_y = (draws.pick((-1, 1)) * draws.between(8, 20) for _ in range(2))
    ramp_x, ramp_y = _ramps(size)
    noise = draws.noise(size * size).reshape(size, size)
    brightness = (noise & 7).astype(np.int16) + (noise >> 3 & 7) - 7
    gradient = (ramp_x * np.int16(slope_x) >> 8) + (ramp_y * np.int16(slope_y) >> 8)
    brightness += gradient * (labels == 0)
    pixels = np.asarray(palette, dtype=np.int16)[labels] + brightness[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _compose(
    index: int, split: str, seed: int, size: int, setting: str
) -> tuple[DrawStream, str, list[SceneObject], np.ndarray, list[np.ndarray]]:
    """All of a scene but its pixels: (stream, background, objects, labels, masks)."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        raise TypeError(f"`size` must be an integer, got {size!r}")
    if size < SMALLEST_SIZE:
        raise ValueError(f"`size` must be at least {SMALLEST_SIZE} pixels, got {size}")
    if setting not in SETTINGS:
        raise ValueError(f"`setting` must be one of {tuple(SETTINGS)}, got {setting!r}")
    draws = DrawStream(split, seed, index)
    background = draws.pick(tuple(_BACKGROUNDS))
    objects = draw_layout(draws, int(size), setting)
    labels = _draw_labels(objects, int(size))
    return draws, background, objects, labels, _visible_masks(objects, labels)


def make_scene(
    index: int, split: str = "train", seed: int = 0, size: int = 64, setting: str = "default"
) -> dict[str, Any]:
    """One record (see `pixclip_hf.record_features`) with three to five objects.

    Args:
        index: which scene, from 0 on, below 2**48.
        split: "train", "validation" or "test"; the random streams of the splits never meet.
        seed: any non-negative integer.
        size: side of the square image in pixels, at least 32.
        setting: "default" (object sides of 20 to 45 % of the image side) or "hard" (8 to 45 %).

    Returns:
        The record; `image` is an RGB `PIL.Image.Image` of (size, size). A region's mask holds the visible pixels of
        its object, its box is their tight box (xyxy pixels, x1 and y1 exclusive). Regions come in no special order.

    Raises:
        ValueError, TypeError: for an argument out of range or of the wrong kind.
    """
    draws, background, objects, labels, masks = _compose(index, split, seed, size, setting)
    size = len(labels)
    details = long_captions(draws, objects, size, background)
    captions = image_captions(draws, objects, background)
    alt = alt_text(draws, objects)
    regions: list[dict[str, Any]] = []
    for layer in draws.shuffled(range(len(objects))):
        item = objects[layer]
        regions.append(
            {
                "id": int(index) * 8 + len(regions),
                "box": [float(edge) for edge in item.box],
                "mask": encode_rle(masks[layer]),
                "category": item.shape,
                "caption": describe(item.shape, item.color, item.texture),
                "long_caption": details[layer],
                "score": 1.0,
                "source": "scenes",
            }
        )
    return {
        "image": _paint(draws, objects, labels, background),
        "width": size,
        "height": size,
        "captions": captions,
        "alt_text": alt,
        "regions": regions,
    }


def scene_texts(
    index: int, split: str = "train", seed: int = 0, size: int = 64, setting: str = "default"
) -> dict[str, Any]:
    """The texts of `make_scene` with the same arguments, without its pixels.

    Returns:
        {"captions": list of str, "alt_text": str, "descriptions": list of str, "long_captions": list of str}; the
        last two have one entry per object, in drawing order.
    """
    draws, background, objects, labels, _ = _compose(index, split, seed, size, setting)
    details = long_captions(draws, objects, len(labels), background)
    captions = image_captions(draws, objects, background)
    return {
        "captions": captions,
        "alt_text": alt_text(draws, objects),
        "descriptions": [describe(item.shape, item.color, item.texture) for item in objects],
        "long_captions": details,
    }


def same_box_pairs(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of regions that have identical boxes: only a mask tells them apart."""
    boxes = [tuple(region["box"]) for region in record["regions"]]
    return [(i, j) for i in range(len(boxes)) for j in range(i + 1, len(boxes)) if boxes[i] == boxes[j]]


def late_detail_pairs(record: Mapping[str, Any], words: int = EARLY_WORDS) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of regions whose long captions differ, but not within the first `words` words."""
    texts = [region["long_caption"].split() for region in record["regions"]]
    return [
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if texts[i][:words] == texts[j][:words] and texts[i] != texts[j]
    ]


def scenes_dataset(
    num_images: int, split: str = "train", seed: int = 0, size: int = 64, setting: str = "default", start: int = 0
) -> "datasets.Dataset":
    """Scenes `start` .. `start + num_images` as a `datasets.Dataset` with `record_features()`.

    The dataset lives in memory (about 7 kB a scene of 64 pixels) and writes no cache file: a cache keyed on the
    generator would outlive changes of the code that draws the scenes. For training that needs no `datasets`, call
    `make_scene` with an index.

    Raises:
        ValueError: for `num_images` below 1 or a negative `start`; see also `make_scene`.
    """
    import datasets

    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}")
    if start < 0:
        raise ValueError(f"`start` must not be negative, got {start}")
    columns: dict[str, list] = {name: [] for name in record_features()}
    for index in range(start, start + num_images):
        record = make_scene(index, split, seed, size, setting)
        buffer = io.BytesIO()
        record["image"].save(buffer, format="PNG", compress_level=1)
        record["image"] = {"bytes": buffer.getvalue(), "path": None}
        for name, values in columns.items():
            values.append(record[name])
    return datasets.Dataset.from_dict(columns, features=record_features(), split=datasets.Split(split))
