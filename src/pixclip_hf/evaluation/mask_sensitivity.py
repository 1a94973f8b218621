"""Does the prompt do anything? What moving, shrinking, inverting and dropping it changes, in embedding and ranking."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..processing.processing_regions import encode_rle, mask_box
from .cache import CachedEncoder
from .image_sets import Images
from .report import Result
from .retrieval import nearest_keys
from .views import open_image, pixel_mask

# Below this mean cosine distance the prompt has no effect worth the name: bfloat16 alone moves a cosine by as much.
NO_EFFECT = 1e-3
CHANGES = ("moved", "shrunk", "inverted", "whole")


def moved(mask: np.ndarray) -> np.ndarray:
    """The mask `(H, W)` in another place: shifted by half of the image, around its borders, in both directions."""
    height, width = mask.shape
    return np.roll(mask, (height // 2, width // 2), axis=(0, 1))


def shrunk(mask: np.ndarray) -> np.ndarray:
    """The mask `(H, W)` eroded until no more than half of its pixels, and at least one, are left."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    found = mask
    while found.sum() > max(1, mask.sum() // 2):
        # The border of the image is a border of the mask, too.
        padded = Image.new("L", (image.width + 2, image.height + 2), 0)
        padded.paste(image, (1, 1))
        image = padded.filter(ImageFilter.MinFilter(3)).crop((1, 1, image.width + 1, image.height + 1))
        smaller = np.asarray(image) > 0
        if not smaller.any():
            break
        found = smaller
    if found is mask and mask.sum() > 1:
        # Too thin to erode: its first half, row by row.
        found = np.zeros_like(mask)
        rows, columns = np.nonzero(mask)
        found[rows[: len(rows) // 2], columns[: len(rows) // 2]] = True
    return found


def inverted(mask: np.ndarray) -> np.ndarray:
    """All but the mask `(H, W)`; the mask itself where it is the whole image."""
    return mask if mask.all() else ~mask


def whole(mask: np.ndarray) -> np.ndarray:
    """All of the image `(H, W)`."""
    return np.ones_like(mask)


def measure_sensitivity(encoder: CachedEncoder, data: Images, text: str = "caption", most: int = 500) -> Result:
    """How much a region's embedding, and the text that it finds first, depend on its prompt.

    Every region is embedded with its own prompt and with four others: moved, shrunk, inverted, and the whole image. A
    model with box prompts sees the bounding boxes of these masks; inverted, which is the whole image nearly always, is
    left out for it.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions`.
        text: field of the regions whose texts are ranked; `category` where a region has none of it.
        most: regions that are looked at, the first ones.

    Returns:
        For each change `<change>_distance_cosine` (mean of 1 - cosine to the region's own embedding) and
        `<change>_top_text_changed` (share of the regions whose first text is another one);
        `regions_distance_cosine`, the mean distance between regions of one image, to compare with; `region_count`.

    Raises:
        ValueError: no region.
    """
    records, texts = _first_regions(data, text, most)
    if not records:
        raise ValueError(f"{data.name} has no region.")
    keys = list(dict.fromkeys(texts))
    text_embeds = encoder.embed_texts(keys)
    rows = encoder.embed_regions(records, name="regions of the sensitivity")
    own = torch.cat(rows)
    first = nearest_keys(own, text_embeds, 1)[1][:, 0]
    metrics: dict[str, float] = {}
    for change in CHANGES:
        if change == "inverted" and not encoder.takes_masks:
            continue
        changed = [_changed(record, change) for record in records]
        others = torch.cat(encoder.embed_regions(changed, name=f"{change} regions"))
        metrics[f"{change}_distance_cosine"] = (1 - (own * others).sum(-1)).mean().item()
        found = nearest_keys(others, text_embeds, 1)[1][:, 0]
        metrics[f"{change}_top_text_changed"] = (found != first).float().mean().item()
    between = [1 - (part @ part.T)[~torch.eye(len(part), dtype=torch.bool)] for part in rows if len(part) > 1]
    metrics["regions_distance_cosine"] = torch.cat(between).mean().item() if between else float("nan")
    metrics["region_count"] = len(own)
    strongest = max(value for name, value in metrics.items() if name.endswith("_distance_cosine") and value == value)
    note = (
        f"The prompt has no effect: no change of it moves an embedding by more than {NO_EFFECT} in cosine."
        if strongest < NO_EFFECT
        else "The prompt has an effect."
    )
    return Result("mask-sensitivity", data.name, f"texts: {text}", metrics, {}, data.split, {}, [note])


def _first_regions(data: Images, text: str, most: int) -> tuple[list[Mapping[str, Any]], list[str]]:
    records, texts = [], []
    for record in data.records:
        regions = [region for region in record["regions"] if region.get(text) or region.get("category")]
        regions = regions[: most - len(texts)]
        if regions:
            records.append({**record, "regions": regions})
            texts += [region.get(text) or region["category"] for region in regions]
        if len(texts) >= most:
            break
    return records, texts


def _changed(record: Mapping[str, Any], change: str) -> dict[str, Any]:
    image = open_image(record["image"])
    make = {"moved": moved, "shrunk": shrunk, "inverted": inverted, "whole": whole}[change]
    regions = []
    for region in record["regions"]:
        mask = make(pixel_mask(region, image.size))
        regions.append({**region, "mask": encode_rle(mask), "box": [float(edge) for edge in mask_box(mask)]})
    return {**record, "regions": regions}
