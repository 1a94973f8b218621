"""The pictures of a report. A task draws what it measured: with its own regions, texts and way of showing them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, cat

from ..encoders.cached import CachedEncoder
from ..encoders.views import pixel_mask
from ..images import open_image
from ..visualization import draw_answers, draw_hit, draw_matrix, draw_regions, draw_retrieval, similarity_map
from .retrieval import nearest_keys

# Regions of one image, texts beside each, columns of a matrix; queries and hits of a sheet; images searched; images of
# a page.
MOST_REGIONS, BEST, COLUMNS, QUERIES, FOUND, SEARCHED, PAGE = 6, 3, 12, 4, 5, 200, 12


@dataclass(frozen=True)
class ComparedTexts:
    """The texts that a task compares regions with.

    Args:
        texts: as the pictures show them.
        embeds (`(T, D)`): their embeddings, as measured.
        own: the number of a region's own text, None for a region that is not measured.
    """

    texts: Sequence[str]
    embeds: Tensor
    own: Callable[[Mapping[str, Any]], int | None]


def draw_first_image(
    encoder: CachedEncoder,
    records: Sequence[Mapping[str, Any]],
    compared: ComparedTexts,
    folder: str | Path,
    name: str,
    title: str,
    show: Any = None,
) -> list[str]:
    """Writes `<name>-regions.png` (which a model card shows) and `<name>-matrix.png` of the first image with two
    regions of different texts: the best texts of each region, ✓ or ✗, and the scores behind them.

    Args:
        encoder: what was measured.
        records: images with regions.
        compared: the texts.
        folder: where the pictures go, which exists.
        name: what their names begin with.
        title: what was measured.
        show: how a region is shown, as in [`CachedEncoder.encode_records`].

    Returns:
        The names of the files; none where no image has two such regions.
    """
    for record in records:
        regions = [region for region in record["regions"] if compared.own(region) is not None][:MOST_REGIONS]
        right: list[Any] = [compared.own(region) for region in regions]
        if len(set(right)) > 1:
            break
    else:
        return []
    record = {**record, "regions": regions}
    (rows,) = encoder.encode_records([record], show, name=f"pictured {name}")
    scores = (rows @ compared.embeds.T).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :BEST]
    texts = compared.texts
    best = [[(texts[i], float(row[i])) for i in chosen] for row, chosen in zip(scores, order, strict=True)]
    truths = [texts[i] for i in right]
    image = open_image(record["image"])
    maps = {}
    if encoder.encoder.view is None and show is None:
        maps = {text: similarity_map(encoder.encoder, image, text) for text in list(dict.fromkeys(truths))[:2]}
    masks = [pixel_mask(region, image.size) for region in regions] if encoder.encoder.prompt == "mask" else None
    files = [f"{name}-regions.png", f"{name}-matrix.png"]
    boxes = [region["box"] for region in regions]
    draw_regions(Path(folder, files[0]), image, boxes, best, maps, masks, title=title, truths=truths)
    # The columns: what is right, then what else came first.
    columns = list(dict.fromkeys([*right, *order.T.flatten().tolist()]))[:COLUMNS]
    names = [f"{number}: {text}" for number, text in enumerate(truths, 1)]
    shown = [texts[i] for i in columns]
    draw_matrix(
        Path(folder, files[1]), scores[:, columns], names, shown, [columns.index(i) for i in right], title=title
    )
    return files


def draw_found_images(
    images: Tensor,
    queries: Tensor,
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    folder: str | Path,
    name: str,
    title: str,
) -> list[str]:
    """Writes `<name>-retrieval.png`: the images that captions of the first ones find.

    Args:
        images (`(N, D)`), queries (`(Q, D)`): embeddings, as measured; query q is a caption of image q.
        records: the images.
        texts: the captions.
        folder, name, title: as in [`draw_first_image`].

    Returns:
        The names of the files.
    """
    scores, indices = nearest_keys(queries, images, FOUND)
    rows = [
        [(open_image(records[i]["image"]), score, i == query) for i, score in zip(row, values, strict=True)]
        for query, (row, values) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True))
    ]
    return _draw_sheet(folder, name, texts, rows, title)


def draw_found_regions(
    encoder: CachedEncoder,
    records: Sequence[Mapping[str, Any]],
    compared: ComparedTexts,
    folder: str | Path,
    name: str,
    title: str,
) -> list[str]:
    """Writes `<name>-retrieval.png`: the regions of some images that the first texts find.

    Args:
        encoder, records, compared, folder, name, title: as in [`draw_first_image`]; the regions of the first 200
            images are searched.

    Returns:
        The names of the files.
    """
    owned = [(record, region, compared.own(region)) for record in records[:SEARCHED] for region in record["regions"]]
    found = cat(encoder.encode_records(records[:SEARCHED]))
    queries = list(dict.fromkeys(own for _, _, own in owned if own is not None))[:QUERIES]
    scores, indices = nearest_keys(compared.embeds[queries], found, FOUND)
    rows: list[list[tuple[Image.Image, float, bool | None]]] = []
    for query, row, values in zip(queries, indices.tolist(), scores.tolist(), strict=True):
        hits = [(*owned[i], score) for i, score in zip(row, values, strict=True)]
        rows.append([(draw_hit(open_image(r["image"]), g["box"]), score, own == query) for r, g, own, score in hits])
    return _draw_sheet(folder, name, [compared.texts[query] for query in queries], rows, title)


def draw_classified_images(
    records: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    truths: Sequence[str],
    folder: str | Path,
    name: str,
    title: str,
) -> list[str]:
    """Writes `<name>-images.png`: images with the class that each was given, ✓ or ✗.

    Args:
        records: the images.
        answers, truths: the name of the class that came first, and of the right one, for each image.
        folder, name, title: as in [`draw_first_image`].

    Returns:
        The names of the files.
    """
    images = [open_image(record["image"]) for record in records]
    boxes = [[[0, 0, *image.size]] for image in images]
    return draw_found_answers(images, boxes, [[answer] for answer in answers], [[truth] for truth in truths],
                              folder, name, title)  # fmt: skip


def draw_found_answers(
    images: Sequence[Image.Image],
    boxes: Sequence[Sequence[Sequence[float]]],
    answers: Sequence[Sequence[str]],
    truths: Sequence[Sequence[str]],
    folder: str | Path,
    name: str,
    title: str,
) -> list[str]:
    """Writes `<name>-images.png`: images with boxes, and what each was called, ✓ or ✗.

    Args:
        images, boxes, answers, truths: as in [`draw_answers`].
        folder, name, title: as in [`draw_first_image`].

    Returns:
        The names of the files.
    """
    draw_answers(Path(folder, f"{name}-images.png"), images, boxes, answers, truths, title=title)
    return [f"{name}-images.png"]


def spread(count: int, most: int = PAGE) -> list[int]:
    """The numbers of up to `most` of `count` items, from all over them: sets are often sorted by class."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def _draw_sheet(folder: str | Path, name: str, queries: Sequence[str], rows: Any, title: str) -> list[str]:
    draw_retrieval(Path(folder, f"{name}-retrieval.png"), queries, rows, title=title)
    return [f"{name}-retrieval.png"]
