"""What a model has learned of the scenes: descriptions, regions that only the mask tells apart, late details,
whole images; and the same vision tower on crops."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.scenes import all_descriptions, late_detail_pairs, same_box_pairs
from .encoders import Record, embed_crops, embed_images, embed_regions, embed_texts
from .retrieval import retrieval_recall

CLIP_TOKENS = 77


def description_accuracy(regions: Sequence[Tensor], records: Sequence[Record], descriptions: Tensor) -> dict[str, Any]:
    """Zero-shot description: each region against every description (texture, colour, shape).

    Args:
        regions: embeddings of each record's regions.
        descriptions (`(256, D)`): embeddings of [`all_descriptions`].

    Returns:
        Shares of regions: `exact`, and `texture`, `colour`, `shape` one by one; `count` of regions.
    """
    names = [name.split()[1:] for name in all_descriptions()]
    found = [names[index] for rows in regions for index in (rows @ descriptions.T).argmax(-1).tolist()]
    true = [region["caption"].split()[1:] for record in records for region in record["regions"]]
    hits = torch.tensor([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(found, true, strict=True)])
    shares = hits.float().mean(0).tolist()
    parts = dict(zip(("texture", "colour", "shape"), shares, strict=True))
    return {"exact": hits.all(-1).float().mean().item(), **parts, "count": len(hits)}


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
        The share, and how many decisions it is of (two a pair).
    """
    score, count = 0.0, 0
    for rows, record in zip(regions, records, strict=True):
        captions = [region["long_caption"] for region in record["regions"]]
        for i, j in find_pairs(record):
            for own, other in ((i, j), (j, i)):
                margin = (rows[own] @ (texts[captions[own]] - texts[captions[other]])).item()
                score += 0.5 if abs(margin) < 1e-6 else float(margin > 0)
                count += 1
    return (score / count if count else float("nan")), count


def evaluate_scenes(model: Any, processor: Any, records: Sequence[Record]) -> dict[str, float]:
    """Every measure of the scenes, for either model.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`].
        processor: its processor.
        records: scenes that the model has not seen.

    Returns:
        Shares between 0 and 1, and the counts that they are of (`*_count`).
        For every model `image_to_text_recall@1` and `text_to_image_recall@1`, `region_description_*` (chance 1/256 for
        `exact`) and the same from crops (`crop_description_exact`). For a model with mask prompts also
        `same_box_by_mask`, `late_detail` and, with texts cut to 77 tokens, `late_detail_cut_77` (chance 1/2), and the
        crop baseline of the first two.
    """
    records = list(records)
    was_training = model.training
    model.eval()
    regions = embed_regions(model, processor, records)
    crops = embed_crops(model, processor, records)
    descriptions = embed_texts(model, processor, all_descriptions())
    images = embed_images(model, processor, [record["image"] for record in records])
    captions = [record["captions"][0] for record in records]
    forth, back = retrieval_recall(images, embed_texts(model, processor, captions), torch.arange(len(records)))
    metrics = {"image_to_text_recall@1": forth, "text_to_image_recall@1": back, "image_count": len(records)}
    for name, value in description_accuracy(regions, records, descriptions).items():
        metrics[f"region_description_{name}"] = value
    metrics["crop_description_exact"] = description_accuracy(crops, records, descriptions)["exact"]

    if "region_masks" in processor.model_input_names:
        long_captions = list({region["long_caption"] for record in records for region in record["regions"]})
        texts = dict(zip(long_captions, embed_texts(model, processor, long_captions), strict=True))
        cut = dict(
            zip(long_captions, embed_texts(model, processor, long_captions, max_length=CLIP_TOKENS), strict=True)
        )
        for name, rows, by_caption, find_pairs in (
            ("same_box_by_mask", regions, texts, same_box_pairs),
            ("late_detail", regions, texts, late_detail_pairs),
            ("late_detail_cut_77", regions, cut, late_detail_pairs),
            ("crop_same_box", crops, texts, same_box_pairs),
            ("crop_late_detail", crops, texts, late_detail_pairs),
        ):
            metrics[name], metrics[f"{name}_count"] = pair_accuracy(rows, records, by_caption, find_pairs)
    model.train(was_training)
    return metrics
