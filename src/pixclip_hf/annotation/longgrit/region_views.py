"""What a model is shown of a region: the object cut out of its image, or the image with the box."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ...processing.processing_regions import mask_box

_GRAY = (127, 127, 127)
_LEAST_SIDE = 224  # pixels; smaller crops are enlarged, some models refuse them
_MARGIN = 0.05  # width of the gray margin around an object, as a share of its longer side


def isolate(image: Image.Image, box: Sequence[float], mask: np.ndarray | None) -> Image.Image:
    """An object alone, on a gray square of at least 224 pixels per side.

    Args:
        image: RGB.
        box: xyxy in pixels.
        mask: (H, W) bool of the image. Without one the object is all that the box holds.
    """
    if mask is None:
        x0, y0, x1, y1 = int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))
        crop = image.crop((x0, y0, x1, y1))
        opaque = Image.new("L", crop.size, 255)
    else:
        x0, y0, x1, y1 = mask_box(mask).tolist()
        crop = image.crop((x0, y0, x1, y1))
        opaque = Image.fromarray(mask[y0:y1, x0:x1].astype(np.uint8) * 255)
    side = max(crop.size) + 2 * max(1, round(_MARGIN * max(crop.size)))
    canvas = Image.new("RGB", (side, side), _GRAY)
    canvas.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2), opaque)
    if side < _LEAST_SIDE:
        canvas = canvas.resize((_LEAST_SIDE, _LEAST_SIDE), Image.Resampling.BICUBIC)
    return canvas


def draw_box(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """A copy of an image with a red rectangle just around a box (xyxy in pixels)."""
    marked = image.copy()
    width = max(2, round(min(image.size) / 150))
    x0, y0, x1, y1 = int(box[0]) - width, int(box[1]) - width, int(np.ceil(box[2])), int(np.ceil(box[3]))
    # Inside the image even where the box touches its edge.
    edges = max(x0, 0), max(y0, 0), min(x1 + width, image.width) - 1, min(y1 + width, image.height) - 1
    ImageDraw.Draw(marked).rectangle(edges, outline=(255, 0, 0), width=width)
    return marked


def box_in_thousandths(box: Sequence[float], width: int, height: int) -> str:
    """A box (xyxy in pixels) as whole thousandths of the image: `"120, 0, 533, 1000"`."""
    edges = np.asarray(box, dtype=np.float64) * 1000 / [width, height, width, height]
    return ", ".join(str(round(edge)) for edge in edges.tolist())
