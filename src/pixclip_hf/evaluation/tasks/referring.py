"""Referring expression comprehension: which box an expression means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...encoders.cached import CachedEncoder
from ...encoders.views import blurred
from ...images import open_image
from ..image_sets import LAYOUTS, Images, read_images
from ..intervals import RESAMPLES, mean_measures
from ..metrics.referring_accuracy.box_overlap import pairwise_iou
from ..report import Result
from ..retrieval import TOLERANCE
from .base import Option, Task

IOU_THRESHOLD = 0.5
# Of ReCLIP's script, for every way of showing a region but its own.
OFFICIAL_TEMPLATE = "a photo of {}"


def refer_by_similarity(
    encoder: CachedEncoder, data: Images, protocol: str | None = None, resamples: int = RESAMPLES
) -> Result:
    """Each expression takes the candidate box that is most similar to it; right above an overlap of 0.5.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions`, the candidates, and `expressions`.
        protocol: `corrected` (or None): the expression as it is, one look at each candidate; an image without
            candidates is a miss. `official`: as the published scripts (ReCLIP's, taken over by Alpha-CLIP and
            PixCLIP): lower case after "a photo of", the similarities of the plain and of the blurred image added up,
            and the whole image for missing candidates. Their masks are made by SAM and their spatial words parsed by
            spaCy, which is not repeated here: the candidates' own masks or boxes, and the baseline without parser.
        resamples: the number of resamples of the bootstrap, which draws images.

    Returns:
        `accuracy`, `mean_iou`, `expression_count`, and `upper_bound`, the share of expressions with any right
        candidate.

    Raises:
        ValueError: an unknown protocol.
    """
    if protocol not in (None, "corrected", "official"):
        raise ValueError(f"`protocol` of referring must be corrected or official, got {protocol!r}.")
    official = protocol == "official"
    records = [record for record in data.records if record["expressions"]]
    if not records:
        raise ValueError("`data` has no expression.")
    if official:
        records = [
            record if record["regions"] else {**record, "regions": [{"box": _whole(record), "mask": None}]}
            for record in records
        ]
    regions = encoder.encode_records(records)
    if official:
        shown = encoder.encode_records(records, _show_blurred, name="blurred regions")
        regions = [rows + more for rows, more in zip(regions, shown, strict=True)]
    expressions = [expression["text"] for record in records for expression in record["expressions"]]
    if official:
        expressions = [OFFICIAL_TEMPLATE.format(text.lower()) for text in expressions]
    texts = iter(encoder.encode_texts(expressions))

    hits, overlaps, bounds, groups = [], [], [], []
    guessed_hits, guessed_overlaps = [], []
    for number, (record, rows) in enumerate(zip(records, regions, strict=True)):
        boxes = np.array([region["box"] for region in record["regions"]], dtype=np.float64).reshape(-1, 4)
        for expression in record["expressions"]:
            text = next(texts)
            groups.append(number)
            overlap = pairwise_iou(boxes, expression["boxes"]).max(1) if len(boxes) else np.zeros(1)
            chosen = np.ones(1, dtype=bool)
            if len(boxes):
                scores = (rows @ text).numpy()
                # Candidates of equal similarity share the decision.
                chosen = scores >= scores.max() - TOLERANCE
            taken = overlap[chosen] if chosen.any() else np.zeros(1)  # what is not a number chooses nothing
            hits.append((taken > IOU_THRESHOLD).mean())
            overlaps.append(taken.mean())
            bounds.append(overlap.max() > IOU_THRESHOLD)
            guessed_hits.append((overlap > IOU_THRESHOLD).mean())
            guessed_overlaps.append(overlap.mean())
    metrics, intervals = _measures({"accuracy": hits, "mean_iou": overlaps, "upper_bound": bounds}, groups, resamples)
    chance = {"accuracy": float(np.mean(guessed_hits)), "mean_iou": float(np.mean(guessed_overlaps))}
    protocol = protocol or "corrected"
    return Result("referring", data.name, protocol, metrics, intervals, data.split, data.left_out, chance=chance)


def refer_by_grounding(encoder: CachedEncoder, data: Images, resamples: int = RESAMPLES) -> Result:
    """Each expression takes the box that CLOC's grounding head finds in the image; there are no candidates.

    Args:
        encoder: a [`CachedEncoder`] of a [`CLOCModel`] with `config.grounding`.
        data, resamples: as in [`refer_by_similarity`].

    Returns:
        `accuracy`, `mean_iou`, `expression_count`.

    Raises:
        ValueError: a model without a grounding head.
    """
    if not encoder.encoder.grounds:
        raise ValueError("`encoder` must have a grounding head: a CLOC model with `config.grounding=True`.")
    hits, overlaps, groups = [], [], []
    for number, record in enumerate(data.records):
        if not record["expressions"]:
            continue
        texts = [expression["text"] for expression in record["expressions"]]
        found = encoder.find_boxes(open_image(record["image"]), texts).numpy()
        for box, expression in zip(found, record["expressions"], strict=True):
            overlap = pairwise_iou(box[None], expression["boxes"]).max()
            hits.append(overlap > IOU_THRESHOLD)
            overlaps.append(overlap)
            groups.append(number)
    metrics, intervals = _measures({"accuracy": hits, "mean_iou": overlaps}, groups, resamples)
    return Result("referring", data.name, "grounding-head", metrics, intervals, data.split, data.left_out)


class Referring(Task):
    """Which box an expression means: among candidates, and by the grounding head of a model that has one."""

    name = "referring"
    layout = LAYOUTS["referring"]
    protocols = ("official",)
    primary_measure = "accuracy"
    options = {"candidates": Option("objects", "boxes to choose from in referring", ("objects", "detections"))}
    hub_task = "zero-shot-object-detection"

    def read(
        self, data_dir: str | Sequence[str], split: str | None = None, protocol: str | None = None, **options: Any
    ) -> Images:
        return read_images(self.name, data_dir, split, options["candidates"])

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        results = [refer_by_similarity(encoder, data, protocol, resamples)]
        return results + ([refer_by_grounding(encoder, data, resamples)] if encoder.encoder.grounds else [])


def _measures(
    found: dict[str, list[float]], groups: list[int], resamples: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    if not groups:
        raise ValueError("`data` has no expression.")
    metrics, intervals = mean_measures(found, groups, resamples)
    return {**metrics, "expression_count": len(groups)}, intervals


def _whole(record: Mapping[str, Any]) -> list[float]:
    width, height = open_image(record["image"]).size
    return [0.0, 0.0, float(width), float(height)]


def _show_blurred(image: Any, region: Any) -> dict[str, Any]:
    return {"image": blurred(image, region), "regions": [region]}
