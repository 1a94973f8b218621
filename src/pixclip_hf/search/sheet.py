"""The hits of some queries as one drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..visualization import draw_retrieval


def draw_sheet(
    path: str | Path,
    images: Mapping[str, Image.Image],
    queries: Sequence[str],
    hits: Sequence[Mapping[str, Any]],
    title: str = "",
) -> None:
    """The hits of each query with their scores; framed in green or red where the regions' texts tell right from wrong.

    Args:
        path: path of the PNG file.
        images: name -> image, RGB.
        queries: texts.
        hits: the hits of each query, as [`find_regions`] gives them.
        title: above the sheet.
    """
    rows = []
    for query, found in zip(queries, hits, strict=True):
        known = query in found["text"]
        columns = zip(found["image_id"], found["box"], found["score"], found["text"], strict=True)
        rows.append(
            [
                (draw_hit(images[name], box), score, text == query if known else None)
                for name, box, score, text in columns
            ]
        )
    draw_retrieval(path, queries, rows, title=title)


def draw_hit(image: Image.Image, box: Sequence[float], context: float = 0.5) -> Image.Image:
    """What is around a box, on either side by `context` of its longer side, with the box drawn in."""
    x0, y0, x1, y1 = box
    margin = context * max(x1 - x0, y1 - y0)
    left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
    crop = image.crop((left, top, min(image.width, int(x1 + margin)), min(image.height, int(y1 + margin))))
    scale = 256 / max(crop.size)
    crop = crop.resize([max(1, round(side * scale)) for side in crop.size])
    corners = [(side - start) * scale for side, start in zip(box, (left, top, left, top), strict=True)]
    ImageDraw.Draw(crop).rectangle(corners, outline="white", width=4)
    ImageDraw.Draw(crop).rectangle(corners, outline="black", width=2)
    return crop
