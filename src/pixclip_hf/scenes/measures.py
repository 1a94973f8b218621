"""What a model has learned of the scenes: descriptions, regions that only the mask tells apart, late details,
whole images; and the same vision tower on crops."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encoders.cached import CachedEncoder
from ..encoders.protocol import Record
from ..encoders.region_encoder import RegionEncoder
from ..encoders.views import square_crop
from ..evaluation.intervals import mean_interval
from ..evaluation.retrieval import rank_right_keys
from ..modeling.modeling_regions import box_iou
from ..processing.processing_pixclip import CROP_SCALE
from .dataset import all_descriptions, late_detail_pairs, same_box_pairs

CLIP_TOKENS = 77
GROUNDED_IOU = 0.5
# Begins the seeds of the texts that a scene does not show.
ABSENT_STREAM = 1002
DESCRIBED = ("texture", "color", "shape")


def description_hits(regions: Sequence[Tensor], records: Sequence[Record], descriptions: Tensor) -> np.ndarray:
    """Whether texture, color and shape of the best description of each region are its own: `(R, 3)` bool."""
    names = [name.split()[1:] for name in all_descriptions()]
    scores = [rows @ descriptions.T for rows in regions]
    # What is not a number describes nothing.
    told = [row for rows in scores for row in rows.isfinite().all(-1).tolist()]
    found = [names[index] for rows in scores for index in rows.argmax(-1).tolist()]
    true = [region["caption"].split()[1:] for record in records for region in record["regions"]]
    hits = np.array([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(found, true, strict=True)])
    return hits & np.array(told)[:, None]


def description_accuracy(regions: Sequence[Tensor], records: Sequence[Record], descriptions: Tensor) -> dict[str, Any]:
    """Zero-shot description: each region against every description (texture, color, shape).

    Args:
        regions: embeddings of each record's regions.
        descriptions (`(256, D)`): embeddings of [`all_descriptions`].

    Returns:
        Shares of regions: `exact`, and `texture`, `color`, `shape` one by one; `count` of regions.
    """
    hits = description_hits(regions, records, descriptions)
    parts = dict(zip(DESCRIBED, hits.mean(0).tolist(), strict=True))
    return {"exact": float(hits.all(-1).mean()), **parts, "count": len(hits)}


def pair_hits(
    regions: Sequence[Tensor],
    records: Sequence[Record],
    texts: Mapping[str, Tensor],
    find_pairs: Callable[[Record], Iterable[tuple[int, int]]],
    field: str = "long_caption",
) -> tuple[np.ndarray, np.ndarray]:
    """The decisions that [`pair_accuracy`] is the share of: 1, 0, or 0.5 for a tie; and the record of each."""
    hits, groups = [], []
    for number, (rows, record) in enumerate(zip(regions, records, strict=True)):
        captions = [region[field] for region in record["regions"]]
        for i, j in find_pairs(record):
            for own, other in ((i, j), (j, i)):
                margin = (rows[own] @ (texts[captions[own]] - texts[captions[other]])).item()
                hits.append(0.5 if abs(margin) < 1e-6 else float(0 < margin < np.inf))
                groups.append(number)
    return np.array(hits), np.array(groups)


def pair_accuracy(
    regions: Sequence[Tensor],
    records: Sequence[Record],
    texts: Mapping[str, Tensor],
    find_pairs: Callable[[Record], Iterable[tuple[int, int]]],
) -> tuple[float, int]:
    """How often a region of a pair is closer to its own long caption than to the other's; a tie counts half.

    Args:
        regions: embeddings of each record's regions.
        texts: embedding of each long caption.
        find_pairs: the pairs of a record.

    Returns:
        The share, and the number of decisions behind it (two per pair).
    """
    hits, _ = pair_hits(regions, records, texts, find_pairs)
    return (float(hits.mean()) if len(hits) else float("nan")), len(hits)


def absent_texts(record: Record, caption: str, rng: np.random.Generator) -> list[str]:
    """Two descriptions that a scene shows nowhere: any, and one that differs from a region's in one attribute.

    Args:
        record: a scene.
        caption: the caption of one of its regions.
        rng: decides the draws.
    """
    names, shown = all_descriptions(), {region["caption"] for region in record["regions"]}
    parts = caption.split()
    absent = [name for name in names if name not in shown]
    near = [name for name in absent if sum(a != b for a, b in zip(name.split(), parts, strict=True)) == 1]
    return [absent[rng.integers(len(absent))], near[rng.integers(len(near))]]


def scored_grounding(encoder: Any, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The boxes that the grounding head finds for texts that are in a scene and for texts that are not: the captions
    that name exactly one region of their scene, and two [`absent_texts`] for each.

    Returns:
        `(N,)` each: the scores; whether the box is right, since its text is there and it overlaps the region's by half
        (IoU); whether the text is there; and the number of its scene.
    """
    scores, right, present, groups = [], [], [], []
    for number, record in enumerate(records):
        captions = Counter(region["caption"] for region in record["regions"])
        regions = [region for region in record["regions"] if captions[region["caption"]] == 1]
        if not regions:
            continue
        rng = np.random.default_rng((ABSENT_STREAM, number))
        texts = [region["caption"] for region in regions]
        absent = [text for caption in texts for text in absent_texts(record, caption, rng)]
        boxes, found = encoder.find_scored_boxes(record["image"], [*texts, *absent])
        overlaps = box_iou(boxes[: len(texts)], torch.tensor([region["box"] for region in regions]))
        right += [*(overlaps >= GROUNDED_IOU).tolist(), *[False] * len(absent)]
        scores += found.tolist()
        present += [True] * len(texts) + [False] * len(absent)
        groups += [number] * (len(texts) + len(absent))
    return np.array(scores), np.array(right, dtype=bool), np.array(present, dtype=bool), np.array(groups)


def average_precision(scores: np.ndarray, right: np.ndarray, positives: int) -> float:
    """Mean over all positives of the precision down to the score of each; 0 for those that were not found.

    Args:
        scores, right (`(N,)`): of what was found. Of equal scores the wrong ones count first.
        positives: how many could be right.
    """
    if not positives:
        return float("nan")
    hits = right[np.lexsort((right, -scores))]
    return float((hits * np.cumsum(hits) / np.arange(1, len(hits) + 1)).sum() / positives)


def embed_crops(encoder: Any, records: Sequence[Record], scale: float = CROP_SCALE) -> list[Tensor]:
    """The crop baseline: each region's square crop, `scale` times its longer box side, embedded as a whole image."""
    crops = [square_crop(record["image"], region["box"], scale) for record in records for region in record["regions"]]
    return list(encoder.encode_images(crops).split([len(record["regions"]) for record in records]))


def evaluate_scenes(model: Any, processor: Any, records: Iterable[Record]) -> dict[str, float]:
    """The measures of [`measure_scenes`], without intervals.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`]; left in the mode, training or not, that it was in.
        processor: its processor.
        records: scenes that the model has not seen.
    """
    was_training = model.training
    encoder = CachedEncoder(RegionEncoder(model, processor), progress=False, batch_size=64)
    metrics, _ = measure_scenes(encoder, list(records), resamples=0)
    model.train(was_training)
    return metrics


def measure_scenes(
    encoder: Any, records: Sequence[Record], resamples: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Every measure of the scenes, for either model.

    Args:
        encoder: a [`CachedEncoder`] of a [`RegionEncoder`].
        records: scenes that the model has not seen.
        resamples: the number of resamples of the bootstrap, which draws scenes.

    Returns:
        Shares between 0 and 1, and the counts that they are of (`*_count`); and the 95 % intervals of the shares.
        For every model `image_to_text_recall@1` and `text_to_image_recall@1`, `region_description_*` by the encoder's
        own prompt (chance 1/256 for `exact`) and the same from crops (`crop_description_exact`). For a model that
        masks may prompt `region_description_exact_mask` and `same_box_by_mask_caption`, regions of one box told apart
        by their short captions (chance 1/2). For one that points may prompt `region_description_exact_point`, by one
        point of each region, drawn at random. For one that also pools regions from one image pass,
        `region_description_exact_pooled`. For a model with a grounding head `grounding_accuracy` at IoU 0.5, over
        captions that name one region of their scene, and `grounding_ap`, the average precision of the boxes of these
        captions and of two absent descriptions for each, one of which differs in a single attribute. For an
        encoder with mask prompts also `same_box_by_mask`, `late_detail` and, with texts cut to 77 tokens,
        `late_detail_cut_77` (chance 1/2), and the crop baseline of the first two.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("`records` must hold at least one scene, got none.")
    regions, crops = encoder.encode_records(records), embed_crops(encoder, records)
    descriptions = encoder.encode_texts(all_descriptions())
    images = encoder.encode_images([record["image"] for record in records])
    captions = encoder.encode_texts([record["captions"][0] for record in records])

    scenes = np.arange(len(records))
    own = np.repeat(scenes, [len(record["regions"]) for record in records])
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}

    def measure(name: str, hits: Any, groups: np.ndarray) -> None:
        metrics[name] = float(hits.mean()) if len(hits) else float("nan")
        if len(hits) and resamples:
            intervals[name] = mean_interval(hits, groups, resamples)

    ids = torch.from_numpy(scenes)
    measure("image_to_text_recall@1", rank_right_keys(images, captions, ids, ids).hits(1), scenes)
    measure("text_to_image_recall@1", rank_right_keys(captions, images, ids, ids).hits(1), scenes)
    metrics["image_count"] = len(records)
    described = description_hits(regions, records, descriptions)
    measure("region_description_exact", described.all(-1), own)
    for name, hits in zip(DESCRIBED, described.T, strict=True):
        measure(f"region_description_{name}", hits, own)
    metrics["region_description_count"] = len(described)
    measure("crop_description_exact", description_hits(crops, records, descriptions).all(-1), own)

    if "mask" in encoder.encoder.prompts:
        by_mask = regions if encoder.encoder.prompt == "mask" else encoder.encode_records(records, prompt="mask")
        measure("region_description_exact_mask", description_hits(by_mask, records, descriptions).all(-1), own)
        short = dict(zip(all_descriptions(), descriptions, strict=True))
        hits, groups = pair_hits(by_mask, records, short, same_box_pairs, field="caption")
        measure("same_box_by_mask_caption", hits, groups)
        metrics["same_box_by_mask_caption_count"] = len(hits)
    if "point" in encoder.encoder.prompts:
        by_point = encoder.encode_records(records, prompt="point")
        measure("region_description_exact_point", description_hits(by_point, records, descriptions).all(-1), own)
    if "pooled" in encoder.encoder.modes:
        pooled = encoder.encode_records(records, mode="pooled")
        measure("region_description_exact_pooled", description_hits(pooled, records, descriptions).all(-1), own)
    if encoder.encoder.grounds:
        scores, right, present, groups = scored_grounding(encoder, records)
        measure("grounding_accuracy", right[present], groups[present])
        metrics["grounding_accuracy_count"] = int(present.sum())
        metrics["grounding_ap"] = average_precision(scores, right, int(present.sum()))
        metrics["grounding_ap_count"] = len(scores)
    if encoder.encoder.prompt == "mask":
        long_captions = list(
            dict.fromkeys(region["long_caption"] for record in records for region in record["regions"])
        )
        texts = dict(zip(long_captions, encoder.encode_texts(long_captions), strict=True))
        cut = dict(zip(long_captions, encoder.encode_texts(long_captions, max_length=CLIP_TOKENS), strict=True))
        for name, rows, by_caption, find_pairs in (
            ("same_box_by_mask", regions, texts, same_box_pairs),
            ("late_detail", regions, texts, late_detail_pairs),
            ("late_detail_cut_77", regions, cut, late_detail_pairs),
            ("crop_same_box", crops, texts, same_box_pairs),
            ("crop_late_detail", crops, texts, late_detail_pairs),
        ):
            hits, groups = pair_hits(rows, records, by_caption, find_pairs)
            measure(name, hits, groups)
            metrics[f"{name}_count"] = len(hits)
    return metrics, intervals


def scene_chances(metrics: Mapping[str, float]) -> dict[str, float]:
    """What guessing gives of the measures of [`measure_scenes`], as far as that is known."""
    names = [name.split()[1:] for name in all_descriptions()]
    # Of the descriptions, each part alone is as frequent as its values are many.
    parts = {part: 1 / len(set(values)) for part, values in zip(DESCRIBED, zip(*names, strict=True), strict=True)}
    chances = {}
    for name in metrics:
        if name.endswith("_count"):
            continue
        if "_recall@1" in name:
            chances[name] = 1 / metrics["image_count"]
        elif "_description_exact" in name:
            chances[name] = 1 / len(names)
        elif name.startswith("region_description_"):
            chances[name] = parts[name.removeprefix("region_description_")]
        elif not name.startswith("grounding_"):
            chances[name] = 0.5  # one of a pair
    return chances


__all__ = [
    "CLIP_TOKENS",
    "description_accuracy",
    "embed_crops",
    "evaluate_scenes",
    "measure_scenes",
    "pair_accuracy",
    "scene_chances",
]
