"""Geometry of the procedural scenes: their random stream, the silhouettes and where the objects go."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star", "crescent", "hourglass")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "chequered", "dotted")
SPLITS = ("train", "validation", "test")
SETTINGS = {"default": (20, 45), "hard": (8, 45)}  # shortest and longest object side, percent of the image side

_SMALLEST_OBJECT = 5  # pixels; below that a ring has no hole
_RING_HOLE = 0.56  # hole diameter over ring diameter
_LARGEST_INDEX = 2**48  # region ids (8 to a scene) stay within int64


class DrawStream:
    """Random integers of one scene, keyed by (split, seed, index).

    Reads the raw PCG64 words, which NumPy keeps stable across versions and platforms (the methods of
    `np.random.Generator` may change). The key has fixed-width words before the seed, so that two different
    (split, seed, index) never share an entropy pool's input, whatever the size of the seed.

    Raises:
        ValueError: for an unknown split or a negative or too large seed or index.
        TypeError: for a seed or index that is not an integer.
    """

    def __init__(self, split: str, seed: int, index: int):
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}")
        for name, value in (("seed", seed), ("index", index)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"`{name}` must be an integer, got {value!r}")
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}")
        seed, index = int(seed), int(index)
        if index >= _LARGEST_INDEX:
            raise ValueError(f"`index` must be below 2**48, got {index}")
        key = (SPLITS.index(split), index & 0xFFFFFFFF, index >> 32, seed)
        self._source = np.random.PCG64(np.random.SeedSequence(key))
        self._words: Iterator[int] = iter(())

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._source.random_raw(256).tolist())
            return self.below(limit)
        return word * limit >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def noise(self, count: int) -> np.ndarray:
        """`count` random bytes (uint8)."""
        words = self._source.random_raw((count + 7) // 8)
        return words.astype("<u8", copy=False).view(np.uint8)[:count]


@dataclass
class SceneObject:
    """One drawn object; `x`, `y` is the upper left pixel of its `side` × `side` square, `layer` its drawing order."""

    shape: str
    color: str
    texture: str
    side: int
    x: int
    y: int
    layer: int = 0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # tight box of the visible pixels, set when it is drawn


def _inside_polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


# A five-pointed star stretched to the unit square, tips and notches in turn from the top tip on. Written as numbers
# because sines differ in the last bit between platforms.
_STAR = [
    (0.5, 0.0), (0.639, 0.352), (1.0, 0.382), (0.725, 0.633), (0.809, 1.0),
    (0.5, 0.803), (0.191, 1.0), (0.275, 0.633), (0.0, 0.382), (0.361, 0.352),
]  # fmt: skip


@lru_cache(maxsize=4096)
def silhouette(shape: str, side: int) -> np.ndarray:
    """The pixels of a shape, bool (side, side), read-only; every shape touches all four sides of its square.

    Only sums, products and comparisons of small numbers: the same pixels on every platform.
    """
    steps = np.arange(side)
    a = (2 * steps + 1 - side)[None, :]  # pixel centers in half pixels from the middle
    b = (2 * steps + 1 - side)[:, None]
    x, y = ((steps + 0.5) / side)[None, :], ((steps + 0.5) / side)[:, None]
    disc = a * a + b * b <= side * side
    if shape == "disc":
        pixels = disc
    elif shape == "square":
        pixels = np.ones((side, side), dtype=bool)
    elif shape == "triangle":
        pixels = np.abs(a) <= steps[:, None] + 1
    elif shape == "cross":
        pixels = (np.abs(a) <= 0.36 * side) | (np.abs(b) <= 0.36 * side)
    elif shape == "ring":
        pixels = disc & (a * a + b * b >= (_RING_HOLE * side) ** 2)
    elif shape == "star":
        pixels = _inside_polygon(x, y, _STAR)
        for tip_x, tip_y in _STAR[::2]:  # thin tips may miss every pixel center
            pixels[min(int(tip_y * side), side - 1), min(int(tip_x * side), side - 1)] = True
    elif shape == "crescent":
        # A disc of radius 1 less a disc of radius 0.85 at (0.5, 0), stretched so that -1 .. 0.5275 fills the width.
        u, v = 1.5275 * x - 1, 2 * y - 1
        pixels = (u * u + v * v <= 1) & ((u - 0.5) * (u - 0.5) + v * v >= 0.7225)
        tip = int((1 - 0.8496) / 2 * side)
        pixels[[tip, side - 1 - tip], side - 1] = True
        pixels[[0, side - 1], int(side / 1.5275)] = True
    elif shape == "hourglass":
        pixels = np.abs(a) <= np.maximum(np.abs(b), 0.18 * side)
    else:
        raise ValueError(f"`shape` must be one of {SHAPES}, got {shape!r}")
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (side, side)))
    pixels.setflags(write=False)
    return pixels


def tight_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the true pixels of a non-empty bool (H, W), ends exclusive."""
    columns, rows = np.flatnonzero(pixels.any(axis=0)), np.flatnonzero(pixels.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# Shapes behind, each with those in front of it that leave it recognizable.
_BEHIND = {
    "square": ("disc", "cross", "ring", "star", "crescent"),
    "hourglass": ("cross", "ring", "star"),
    "disc": ("star",),
    "triangle": ("star",),
    "cross": ("star",),
    "ring": ("star",),
    "crescent": ("star",),
}


@lru_cache(maxsize=512)
def same_box_shapes(side: int) -> tuple[tuple[str, str], ...]:
    """(behind, in front) shapes of one square where what is visible of the back one still has its whole box."""
    return tuple(
        (back, front)
        for back, fronts in _BEHIND.items()
        for front in fronts
        if tight_box(silhouette(back, side) & ~silhouette(front, side)) == (0, 0, side, side)
    )


def _visible_percent(back: str, back_side: int, front: str, front_side: int, dx: int, dy: int) -> int:
    """Share of `back` left visible by `front` whose square lies (dx, dy) from its own."""
    pixels = silhouette(back, back_side)
    x0, x1 = max(dx, 0), min(dx + front_side, back_side)
    y0, y1 = max(dy, 0), min(dy + front_side, back_side)
    if x0 >= x1 or y0 >= y1:
        return 100
    cover = silhouette(front, front_side)[y0 - dy : y1 - dy, x0 - dx : x1 - dx]
    hidden = int(np.count_nonzero(pixels[y0:y1, x0:x1] & cover))
    return 100 - 100 * hidden // int(np.count_nonzero(pixels))


class _Layout:
    """One attempt at a scene: objects in drawing order and the squares that are taken."""

    def __init__(self, draws: DrawStream, size: int, setting: str):
        self.draws, self.size = draws, size
        self.low, self.high = SETTINGS[setting]
        self.objects: list[SceneObject] = []
        self.taken: list[tuple[int, int, int, int]] = []
        self.looks: set[tuple[str, str]] = set()  # (shape, color), unique but for twins

    def side(self, low: int, high: int) -> int:
        """An object side in pixels, between `low` and `high` percent of the image side."""
        smallest = max(-(-low * self.size // 100), _SMALLEST_OBJECT)
        return self.draws.between(smallest, max(high * self.size // 100, smallest))

    def free_place(self, width: int, height: int) -> tuple[int, int] | None:
        for _ in range(24):
            x, y = self.draws.below(self.size - width + 1), self.draws.below(self.size - height + 1)
            if all(x >= x1 + 1 or y >= y1 + 1 or x + width + 1 <= x0 or y + height + 1 <= y0
                   for x0, y0, x1, y1 in self.taken):  # fmt: skip
                return x, y
        return None

    def first_place(self, width: int, height: int) -> tuple[int, int]:
        """As `free_place` in an empty scene, where every place is free."""
        return self.draws.below(self.size - width + 1), self.draws.below(self.size - height + 1)

    def color_for(self, shape: str) -> str:
        return self.draws.pick([color for color in COLORS if (shape, color) not in self.looks])

    def put(self, shape: str, color: str, texture: str, side: int, x: int, y: int) -> None:
        self.looks.add((shape, color))
        self.objects.append(SceneObject(shape, color, texture, side, x, y, len(self.objects)))

    def single(self) -> None:
        shape, texture = self.draws.pick(SHAPES), self.draws.pick(TEXTURES)
        color = self.color_for(shape)
        top = self.high
        for _ in range(4):  # a smaller side each time, until it fits
            side = self.side(self.low, top)
            place = self.free_place(side, side)
            if place is not None:
                self.taken.append((*place, place[0] + side, place[1] + side))
                self.put(shape, color, texture, side, *place)
                return
            top = (self.low + top) // 2

    def same_box_pair(self) -> None:
        side = self.side(30, 45)
        back, front = self.draws.pick(same_box_shapes(side))
        colors = self.draws.shuffled(COLORS)
        x, y = self.first_place(side, side)
        self.taken.append((x, y, x + side, y + side))
        self.put(back, colors[0], self.draws.pick(TEXTURES), side, x, y)
        self.put(front, colors[1], self.draws.pick(TEXTURES), side, x, y)

    def twins(self) -> None:
        side = self.side(self.low, 35)
        shape, color = self.draws.pick(SHAPES), self.draws.pick(COLORS)
        for texture in self.draws.shuffled(TEXTURES)[:2]:
            place = self.free_place(side, side)
            if place is not None:
                self.taken.append((*place, place[0] + side, place[1] + side))
                self.put(shape, color, texture, side, *place)

    def nested_pair(self) -> None:
        side = self.side(40, 45)
        inner = min(self.side(self.low, 24), side - 4)
        x, y = self.first_place(side, side)
        self.taken.append((x, y, x + side, y + side))
        self.put("ring", self.draws.pick(COLORS), self.draws.pick(TEXTURES), side, x, y)
        shape = self.draws.pick(SHAPES)
        shift = (side - inner) // 2
        self.put(shape, self.color_for(shape), self.draws.pick(TEXTURES), inner, x + shift, y + shift)

    def overlapping_pair(self) -> None:
        back_side, front_side = self.side(28, 40), self.side(28, 40)
        back, front = self.draws.shuffled(SHAPES)[:2]
        for _ in range(16):
            dx, dy = self.draws.between(-front_side, back_side), self.draws.between(-front_side, back_side)
            if 60 <= _visible_percent(back, back_side, front, front_side, dx, dy) <= 90:
                break
        else:
            return
        left, top = min(dx, 0), min(dy, 0)
        width = max(back_side, dx + front_side) - left
        height = max(back_side, dy + front_side) - top
        if max(width, height) > self.size:
            return
        x, y = self.first_place(width, height)
        self.taken.append((x, y, x + width, y + height))
        self.put(back, self.draws.pick(COLORS), self.draws.pick(TEXTURES), back_side, x - left, y - top)
        color = self.color_for(front)
        self.put(front, color, self.draws.pick(TEXTURES), front_side, x - left + dx, y - top + dy)


def draw_layout(draws: DrawStream, size: int, setting: str) -> list[SceneObject]:
    """Three to five objects in drawing order.

    Of 100 scenes 30 hold a pair of one box, 30 twins (same shape, color and side, two textures), 10 an object in a
    ring, 10 an overlapping pair. Only those pairs touch; of an overlapped object at least 60 % stays visible.
    """
    lot = draws.below(100)
    count = draws.pick((3, 4, 4, 5))
    while True:
        layout = _Layout(draws, size, setting)
        if lot < 30:
            layout.same_box_pair()
        elif lot < 60:
            layout.twins()
        elif lot < 70:
            layout.nested_pair()
        elif lot < 80:
            layout.overlapping_pair()
        if lot < 80 and len(layout.objects) < 2:
            continue
        while len(layout.objects) < count:
            before = len(layout.objects)
            layout.single()
            if len(layout.objects) == before:
                break
        if len(layout.objects) >= 3:
            return layout.objects
