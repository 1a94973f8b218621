"""How a region of an image is shown to a model: cut out, outlined, or with everything else blurred."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..processing.processing_pixclip import CROP_SCALE
from ..processing.processing_regions import box_mask, encode_rle, read_mask

Region = Mapping[str, Any]
# Of PixCLIP's published COCO script: white border around the whole image, in pixels.
OFFICIAL_BORDER = 600
# Of ReCLIP's and Alpha-CLIP's referring expression scripts, in pixels.
BLUR_RADIUS = 100


def pixel_mask(region: Region, size: tuple[int, int]) -> np.ndarray:
    """The mask of a region `(H, W)` bool; the rectangle of its box where it has none. `size` is (width, height)."""
    shape = size[::-1]
    if region.get("mask"):
        return read_mask(region["mask"], shape, "mask") != 0
    return box_mask(np.asarray(region["box"], dtype=np.float64), shape)


def _cut(image: Image.Image, region: Region, window: Sequence[int], fill: tuple[int, int, int]) -> dict[str, Any]:
    """The window (xyxy, may reach beyond the image) as a record of one region, whose box and mask lie in it."""
    left, top, right, bottom = window
    picture = Image.new("RGB", (right - left, bottom - top), fill)
    picture.paste(image, (-left, -top))
    box = np.asarray(region["box"], dtype=np.float64) - np.array([left, top, left, top])
    shown = np.clip(box, 0, [picture.width, picture.height] * 2)
    if (shown[2:] <= shown[:2]).any():
        shown = np.array([0, 0, picture.width, picture.height])
    mask = None
    if region.get("mask"):
        canvas = Image.new("L", picture.size, 0)
        canvas.paste(Image.fromarray(pixel_mask(region, image.size).astype(np.uint8) * 255), (-left, -top))
        # Rounding may cut off a mask of a pixel or two: the box then stands for it.
        mask = encode_rle(np.asarray(canvas)) if canvas.getbbox() else None
    return {"image": picture, "regions": [{**region, "box": shown.tolist(), "mask": mask}]}


def crop(image: Image.Image, region: Region, fill: tuple[int, int, int], scale: float = CROP_SCALE) -> dict[str, Any]:
    """Square around a region as a record: `scale` times the longer side of the box, `fill` beyond the image."""
    x0, y0, x1, y1 = region["box"]
    side = max(1, round(scale * max(x1 - x0, y1 - y0)))
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    return _cut(image, region, (left, top, left + side, top + side), fill)


def square_crop(image: Image.Image, box: Sequence[float], scale: float = CROP_SCALE) -> Image.Image:
    """Square of `scale` times the longer side of a box (xyxy pixels) around it; black beyond the image."""
    x0, y0, x1, y1 = box
    half = scale * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def official_crop(image: Image.Image, region: Region) -> dict[str, Any]:
    """The crop of PixCLIP's published COCO script (eval/COCO/mask_image_test.py), with its quirks.

    The image gets a white border of 600 pixels; the box is cut to whole pixels; the window is cut to the bordered
    image less its last row and column, so that it is no square where 1.5 x the box reaches that far.
    """
    x0, y0, x1, y1 = region["box"]
    left, top = int(x0 + OFFICIAL_BORDER), int(y0 + OFFICIAL_BORDER)
    width, height = max(int(x1 - x0), 1), max(int(y1 - y0), 1)
    side = max(width, height)
    x, y = left - (side - width) / 2, top - (side - height) / 2
    margin = (CROP_SCALE - 1) / 2 * side
    last_x, last_y = image.width + 2 * OFFICIAL_BORDER - 1, image.height + 2 * OFFICIAL_BORDER - 1
    window = (
        max(int(x - margin), 0),
        max(int(y - margin), 0),
        min(int(x + side + margin), last_x),
        min(int(y + side + margin), last_y),
    )
    x0, y0, x1, y1 = (edge - OFFICIAL_BORDER for edge in window)
    return _cut(image, region, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)), (255, 255, 255))


def padded_square(image: Image.Image, region: Region) -> dict[str, Any]:
    """The whole image padded to a square with black, as in PixCLIP's published LVIS script."""
    side = max(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _cut(image, region, (left, top, left + side, top + side), (0, 0, 0))


def blurred(image: Image.Image, region: Region, radius: int = BLUR_RADIUS) -> Image.Image:
    """The image with everything beyond the region blurred (ReCLIP, Subramanian et al. 2022)."""
    result = image.filter(ImageFilter.GaussianBlur(radius))
    result.paste(image, mask=Image.fromarray(pixel_mask(region, image.size).astype(np.uint8) * 255))
    return result


def outlined(image: Image.Image, region: Region) -> Image.Image:
    """The image with a red frame around the region's box (as red circles in Shtedritski et al. 2023)."""
    result = image.copy()
    line = max(2, round(max(image.size) / 150))
    ImageDraw.Draw(result).rectangle([float(edge) for edge in region["box"]], outline=(255, 0, 0), width=line)
    return result
