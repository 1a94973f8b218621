"""Phrase grounding (Flickr30k Entities): where in its image a phrase is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...encoders.cached import CachedEncoder
from ...images import open_image
from ..image_sets import LAYOUTS, Images
from ..intervals import RESAMPLES, mean_measures
from ..metrics.referring_accuracy.box_overlap import pairwise_iou
from ..report import Result
from .base import Task
from .detection import PROPOSALS, propose

IOU_THRESHOLD = 0.5
RANKS = (1, 5, 10)


def phrases_of(record: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """The phrases of an image and the boxes of each, any of which is right (the ANY-BOX protocol)."""
    phrases: dict[str, list[list[float]]] = {}
    for region in record["regions"]:
        if region.get("caption"):
            phrases.setdefault(region["caption"], []).append([float(edge) for edge in region["box"]])
    return phrases


def _with_phrases(data: Images) -> list[tuple[Mapping[str, Any], dict[str, list[list[float]]]]]:
    """The images that have phrases, each with its own."""
    found = [(record, phrases) for record in data.records if (phrases := phrases_of(record))]
    if not found:
        raise ValueError(f"{data.name} has no phrase to ground: no region has a `caption`.")
    return found


def ground_by_proposals(
    encoder: CachedEncoder, data: Images, proposals: str = "grid", resamples: int = RESAMPLES
) -> Result:
    """Each phrase ranks the proposals of its image by similarity; right where one of the first k overlaps one of its
    boxes by half (IoU).

    Args:
        encoder: a [`CachedEncoder`].
        data: images whose `regions` have a `caption`, one for each box of a phrase.
        proposals: as in [`detect_objects`].
        resamples: the number of resamples of the bootstrap, which draws images.

    Returns:
        `recall@1`, `recall@5`, `recall@10`, `upper_bound` (phrases with any right proposal), `phrase_count`.

    Raises:
        ValueError: no phrases, or unknown proposals.
    """
    records = []
    for record, phrases in _with_phrases(data):
        found = propose(proposals)(open_image(record["image"]))
        regions = [{"box": list(region["box"]), "mask": region.get("mask")} for region in found]
        records.append({**record, "regions": regions, "phrases": phrases})
    filled = [record for record in records if record["regions"]]
    rows = iter(encoder.encode_records(filled, name=f"proposals {proposals}") if filled else [])
    texts = iter(encoder.encode_texts([phrase for record in records for phrase in record["phrases"]]))
    hits: dict[str, list[float]] = {name: [] for name in (*(f"recall@{k}" for k in RANKS), "upper_bound")}
    groups = []
    for number, record in enumerate(records):
        embeds = next(rows) if record["regions"] else None
        boxes = np.array([region["box"] for region in record["regions"]], dtype=np.float64).reshape(-1, 4)
        for own in record["phrases"].values():
            text = next(texts)
            groups.append(number)
            right = np.zeros(0, dtype=bool)
            if embeds is not None:
                order = (-(embeds @ text)).argsort(stable=True).numpy()
                right = (pairwise_iou(boxes, np.array(own)).max(1) >= IOU_THRESHOLD)[order]
            for k in RANKS:
                hits[f"recall@{k}"].append(float(right[:k].any()))
            hits["upper_bound"].append(float(right.any()))
    return _result(data, "proposals", hits, groups, resamples, [f"Boxes from {proposals}."])


def ground_by_head(encoder: CachedEncoder, data: Images, resamples: int = RESAMPLES) -> Result:
    """The box that CLOC's grounding head finds for each phrase; there is one, and with it `recall@1` alone.

    Args:
        encoder: a [`CachedEncoder`] of a [`CLOCModel`] with `config.grounding`.
        data, resamples: as in [`ground_by_proposals`].

    Raises:
        ValueError: a model without a grounding head, or no phrases.
    """
    if not encoder.encoder.grounds:
        raise ValueError("`encoder` must have a grounding head: a CLOC model with `config.grounding=True`.")
    hits: dict[str, list[float]] = {"recall@1": []}
    groups = []
    for number, (record, phrases) in enumerate(_with_phrases(data)):
        found = encoder.find_boxes(open_image(record["image"]), list(phrases)).numpy()
        for box, own in zip(found, phrases.values(), strict=True):
            hits["recall@1"].append(float(pairwise_iou(box[None], np.array(own)).max() >= IOU_THRESHOLD))
            groups.append(number)
    return _result(data, "grounding-head", hits, groups, resamples, ["The head finds one box per phrase."])


def _result(
    data: Images, protocol: str, hits: dict[str, list[float]], groups: Sequence[int], resamples: int, notes: list[str]
) -> Result:
    metrics, intervals = mean_measures(hits, groups, resamples)
    metrics["phrase_count"] = len(groups)
    return Result("phrase-grounding", data.name, protocol, metrics, intervals, data.split, data.left_out, notes)


class PhraseGrounding(Task):
    """Where in its image a phrase is: among proposals, and by the grounding head of a model that has one."""

    name = "phrase-grounding"
    layout = LAYOUTS["phrase-grounding"]
    primary_measure = "recall@1"
    options = {"proposals": PROPOSALS}
    hub_task = "zero-shot-object-detection"

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        results = [ground_by_head(encoder, data, resamples)] if encoder.encoder.grounds else []
        return [*results, ground_by_proposals(encoder, data, options["proposals"], resamples)]
