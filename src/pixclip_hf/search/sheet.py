"""The hits of some queries as one drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..visualization import draw_hit, draw_retrieval
from .collection import Hit
from .queries import Query


def draw_sheet(
    path: str | Path,
    images: Mapping[str, Image.Image],
    queries: Sequence[Query],
    hits: Sequence[Sequence[Hit]],
    title: str = "",
) -> None:
    """The hits of each query with their cosines; framed in blue and marked ✓, or in vermilion and marked ✗, where the
    regions' texts tell right from wrong.

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
