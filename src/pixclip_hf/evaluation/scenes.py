"""What a model has learned of the scenes: descriptions, regions that only the mask tells apart, late details,
whole images; and the same vision tower on crops."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.collator import region_inputs
from ..data.scenes import all_descriptions, late_detail_pairs, same_box_pairs
from .retrieval import retrieval_recall

Record = Mapping[str, Any]
CLIP_TOKENS = 77


@torch.no_grad()
def embed_texts(
    model: Any, processor: Any, texts: Sequence[str], max_length: int | None = None, batch_size: int = 128
) -> Tensor:
    """L2-normalised embeddings `(T, D)` of texts, equal texts sharing one; cut to `max_length` tokens if given."""
    unique = list(dict.fromkeys(texts))
    inputs = processor(text=unique, max_length=max_length, return_tensors="pt")
    # Texts that a cut makes equal must tie exactly: they, too, are embedded once.
    keys = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)
    ]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = torch.tensor(sorted(first.values()))
    embeds = [
        model.get_text_features(
            inputs.input_ids[part].to(model.device), inputs.attention_mask[part].to(model.device)
        ).pooler_output
        for part in rows.split(batch_size)
    ]
    by_row = dict(zip(rows.tolist(), F.normalize(torch.cat(embeds).float(), dim=-1).cpu(), strict=True))
    by_text = {text: by_row[first[key]] for text, key in zip(unique, keys, strict=True)}
    return torch.stack([by_text[text] for text in texts])


@torch.no_grad()
def embed_images(model: Any, processor: Any, images: Sequence[Any], batch_size: int = 64) -> Tensor:
    """L2-normalised embeddings `(N, D)` of whole images."""
    embeds = [
        model.get_image_features(processor(images=part, return_tensors="pt").pixel_values.to(model.device))
        for part in _batches(images, batch_size)
    ]
    return F.normalize(torch.cat([part.pooler_output for part in embeds]).float(), dim=-1).cpu()


@torch.no_grad()
def embed_regions(model: Any, processor: Any, records: Sequence[Record], batch_size: int = 64) -> list[Tensor]:
    """L2-normalised embeddings `(R_i, D)` of the regions of each record."""
    embeds = []
    for part in _batches(records, batch_size):
        inputs = processor(
            images=[record["image"] for record in part],
            return_tensors="pt",
            **region_inputs(processor, [record["regions"] for record in part]),
        ).to(model.device)
        features = F.normalize(model.get_region_features(**inputs).pooler_output.float(), dim=-1).cpu()
        embeds += [rows[: len(record["regions"])] for rows, record in zip(features, part, strict=True)]
    return embeds


def embed_crops(
    model: Any, processor: Any, records: Sequence[Record], scale: float = 1.5, batch_size: int = 64
) -> list[Tensor]:
    """The crop baseline: each region's square crop, `scale` times its longer box side, embedded as a whole image."""
    crops = [_square_crop(record["image"], region["box"], scale) for record in records for region in record["regions"]]
    return list(embed_images(model, processor, crops, batch_size).split([len(r["regions"]) for r in records]))


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


def _square_crop(image: Any, box: Sequence[float], scale: float) -> Any:
    x0, y0, x1, y1 = box
    half = scale * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
