"""What the demo draws over an image: numbered regions, and the heat map and box of a text. Pillow and numpy only."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..visualization import REGION_COLORS
from .predictions import Region, TextPlace, box_of

# Images are shown with their longer side between these, so that lines are fine on small ones and large ones load fast.
LEAST_SIDE, MOST_SIDE = 512, 1024
# From the lowest value of a heat map to the highest: dark blue, teal, yellow-green, light yellow.
HEAT = ("#18104a", "#26608a", "#40a47a", "#bad23e", "#fffabe")
_HEAT = np.array([ImageColor.getrgb(color) for color in HEAT], dtype=np.float32)
_ENDS = 7  # half the side of a point's mark, in pixels


def shown_scale(size: tuple[int, int]) -> float:
    """By how much an image of this `(width, height)` is enlarged where it is shown; whole numbers for small ones,
    whose pixels then stay equal."""
    longest = max(size)
    if longest < LEAST_SIDE:
        return float(-(-LEAST_SIDE // longest))
    return min(1.0, MOST_SIDE / longest)


def enlarged(image: Image.Image) -> Image.Image:
    """An image as it is shown, RGB."""
    scale = shown_scale(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), way)


def draw_drawn(
    image: Image.Image, regions: Sequence[Region], corner: tuple[float, float] | None = None
) -> Image.Image:
    """The image as it is shown, with its numbered regions.

    Args:
        image: RGB.
        regions: in pixels of the image.
        corner: `(x, y)`, the first corner of a box whose second one is still to come.
    """
    shown, scale = enlarged(image), shown_scale(image.size)
    for number, region in enumerate(regions):
        color, _ = REGION_COLORS[number % len(REGION_COLORS)]
        if region.mask is not None:
            shown = _tinted(shown, region.mask, color)
    draw = ImageDraw.Draw(shown)
    numbered: set[tuple[int, int]] = set()
    for number, region in enumerate(regions):
        color, ink = REGION_COLORS[number % len(REGION_COLORS)]
        if region.box is not None:
            _outline(draw, [scale * edge for edge in region.box], color)
        for (x, y), label in zip(region.points, region.point_labels, strict=True):
            _point(draw, scale * x, scale * y, color, label == 1)
        x, y = (scale * edge for edge in box_of(region)[:2])
        if region.kind == "point":
            x, y = scale * region.points[0][0] + _ENDS + 3, scale * region.points[0][1] - 2 * _ENDS
        # Beside the number of a region that begins at the same place.
        while (round(x), round(y)) in numbered and x + 30 < shown.width:
            x += 30
        numbered.add((round(x), round(y)))
        _number(draw, x, y, number + 1, color, ink, shown.size)
    if corner is not None:
        x, y = scale * corner[0], scale * corner[1]
        for width, color in ((5, "white"), (2, "black")):
            draw.line((x - 12, y, x + 12, y), fill=color, width=width)
            draw.line((x, y - 12, x, y + 12), fill=color, width=width)
    return shown


def draw_place(image: Image.Image, place: TextPlace) -> Image.Image:
    """The image in gray as it is shown, under the heat map of a text, with the text's box."""
    shown, scale = enlarged(image), shown_scale(image.size)
    low, high = float(place.values.min()), float(place.values.max())
    heat = (place.values - low) / max(high - low, 1e-6)
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(shown.size, Image.Resampling.BILINEAR))
    at = np.clip(smooth, 0, 1) * (len(_HEAT) - 1)
    below = np.minimum(at.astype(int), len(_HEAT) - 2)
    share = (at - below)[..., None]
    colors = Image.fromarray(((1 - share) * _HEAT[below] + share * _HEAT[below + 1]).astype(np.uint8))
    drawn = Image.blend(shown.convert("L").convert("RGB"), colors, 0.6)
    if place.box is not None:
        _outline(ImageDraw.Draw(drawn), [scale * edge for edge in place.box], "#d55e00")
    return drawn


def _tinted(shown: Image.Image, mask: np.ndarray, color: str) -> Image.Image:
    """The image with a mask laid over it, and the mask's outline."""
    large = Image.fromarray(mask.astype(np.uint8) * 255).resize(shown.size, Image.Resampling.NEAREST)
    inside = np.asarray(large) > 0
    padded = np.pad(inside, 2)
    eroded = inside.copy()
    for y in range(5):
        for x in range(5):
            eroded &= padded[y : y + inside.shape[0], x : x + inside.shape[1]]
    opacity = np.where(inside & ~eroded, 255, np.where(inside, 90, 0)).astype(np.uint8)
    return Image.composite(Image.new("RGB", shown.size, color), shown, Image.fromarray(opacity))


def _outline(draw: ImageDraw.ImageDraw, box: Sequence[float], color: str) -> None:
    x0, y0, x1, y1 = box
    draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="white", width=5)
    draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 2), max(y0 + 1, y1 - 2)), outline=color, width=3)


def _point(draw: ImageDraw.ImageDraw, x: float, y: float, color: str, is_on_it: bool) -> None:
    """A disc for a point on the region, a cross for one beside it."""
    if is_on_it:
        draw.ellipse((x - _ENDS, y - _ENDS, x + _ENDS, y + _ENDS), fill=color, outline="white", width=2)
        return
    for width, ink in ((7, "white"), (4, color)):
        draw.line((x - _ENDS, y - _ENDS, x + _ENDS, y + _ENDS), fill=ink, width=width)
        draw.line((x - _ENDS, y + _ENDS, x + _ENDS, y - _ENDS), fill=ink, width=width)


def _number(
    draw: ImageDraw.ImageDraw, x: float, y: float, number: int, color: str, ink: str, size: tuple[int, int]
) -> None:
    """The number of a region, its upper left corner at (x, y) as far as the image reaches."""
    font = ImageFont.load_default(20)
    left, top, right, bottom = draw.textbbox((0, 0), str(number), font=font)
    wide, high = right - left + 10, bottom - top + 10
    x, y = max(0, min(x, size[0] - wide)), max(0, min(y, size[1] - high))
    draw.rectangle((x, y, x + wide, y + high), fill=color)
    draw.text((x + 5 - left, y + 5 - top), str(number), fill=ink, font=font)
