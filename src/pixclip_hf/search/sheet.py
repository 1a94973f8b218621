"""The hits of some queries as one drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..visualization import draw_retrieval
from .collection import Hit
from .queries import Query


def draw_sheet(
    path: str | Path,
    images: Mapping[str, Image.Image],
    queries: Sequence[Query],
    hits: Sequence[Sequence[Hit]],
    title: str = "",
) -> None:
    """The hits of each query with their cosines; green and red frames where the regions' texts tell right from wrong.

    Args:
        path: path of the PNG file.
        images: name -> image, RGB.
        queries: the queries.
        hits: the hits of each query, as [`Collection.search`] gives them.
        title: above the sheet.
    """
    rows = []
    for query, found in zip(queries, hits, strict=True):
        known = query.text is not None and query.text in [hit.text for hit in found]
        rows.append(
            [
                (draw_hit(images[hit.image_id], hit.box), hit.cosine, hit.text == query.text if known else None)
                for hit in found
            ]
        )
    draw_retrieval(path, [query.label for query in queries], rows, title=title)


def draw_hit(image: Image.Image, box: Sequence[float] | None, context: float = 0.5) -> Image.Image:
    """What is around a box, on either side by `context` of its longer side, with the box drawn in; the whole image
    without a box."""
    if box is None:
        return image.resize([max(1, round(side * 256 / max(image.size))) for side in image.size])
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
