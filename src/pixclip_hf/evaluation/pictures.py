"""The pictures of a report: an image with its regions, the matrix of regions and texts, a sheet of images found."""

from pathlib import Path
from typing import Any

import numpy as np

from ..encoders.cached import CachedEncoder
from ..encoders.views import pixel_mask
from ..images import open_image
from ..visualization import draw_matrix, draw_regions, draw_retrieval, similarity_map
from .image_sets import Images
from .retrieval import nearest_keys

# A region is named by the first of these that it has.
SHOWN_TEXTS = ("caption", "category")
MOST_REGIONS, QUERIES, FOUND, SEARCHED = 6, 4, 5, 200


def draw_pictures(encoder: CachedEncoder, data: Images, folder: str | Path, name: str) -> list[str]:
    """Writes what the data allows: `<name>-regions.png` (which a model card shows) and `<name>-matrix.png` of the
    first image with two different region texts, `<name>-retrieval.png` of the first captions over 200 images.

    Returns:
        The names of the files.
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _first_regions(data)) is not None:
        record, texts = found
        written += [f"{name}-regions.png", f"{name}-matrix.png"]
        _draw_regions(encoder, record, texts, *(folder / file for file in written))
    captioned = [record for record in data.records if record.get("captions")][:SEARCHED]
    if len(captioned) > 1:
        queries = [record["captions"][0] for record in captioned[:QUERIES]]
        images = encoder.encode_images([record["image"] for record in captioned])
        scores, indices = nearest_keys(encoder.encode_texts(queries), images, FOUND)
        rows = [
            [(open_image(captioned[i]["image"]), score, i == own) for i, score in zip(row, values, strict=True)]
            for own, (row, values) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True))
        ]
        written.append(f"{name}-retrieval.png")
        draw_retrieval(folder / written[-1], queries, rows, title=f"captions among {len(captioned)} images")
    return written


def _first_regions(data: Images) -> tuple[dict[str, Any], list[str]] | None:
    for record in data.records:
        named = [
            (region, text)
            for region in record["regions"]
            if not region.get("iscrowd") and (text := next(filter(None, map(region.get, SHOWN_TEXTS)), None))
        ][:MOST_REGIONS]
        if len({text for _, text in named}) > 1:
            return {**record, "regions": [region for region, _ in named]}, [text for _, text in named]
    return None


def _draw_regions(
    encoder: CachedEncoder, record: dict[str, Any], texts: list[str], picture: Path, matrix: Path
) -> None:
    image, regions = open_image(record["image"]), record["regions"]
    candidates = list(dict.fromkeys(texts))
    (rows,) = encoder.encode_records([record], name="pictured regions")
    scores = (rows @ encoder.encode_texts(candidates).T).numpy()
    right = [candidates.index(text) for text in texts]
    names = [f"{number + 1}: {text}" for number, text in enumerate(texts)]
    draw_matrix(matrix, scores, names, candidates, right, title="regions and texts")
    best = [[(candidates[i], float(row[i])) for i in np.argsort(-row)[:3]] for row in scores]
    maps = {}
    if encoder.encoder.view is None:
        maps = {text: similarity_map(encoder.encoder, image, text) for text in candidates[:2]}
    boxes = [region["box"] for region in regions]
    masks = [pixel_mask(region, image.size) for region in regions] if encoder.encoder.prompt == "mask" else None
    draw_regions(picture, image, boxes, best, maps, masks, truths=texts)
