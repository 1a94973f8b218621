"""Does the prompt do anything? What moving, shrinking, inverting and dropping it changes, in embedding and ranking."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from ...encoders.cached import CachedEncoder
from ...encoders.views import pixel_mask
from ...images import open_image
from ...processing.processing_regions import encode_rle, mask_box
from ..image_sets import LAYOUTS, Images, read_images
from ..intervals import RESAMPLES, mean_interval
from ..report import Result
from ..retrieval import nearest_keys
from .base import Task
from .retrieval import REGION_TEXT

# Below this mean cosine distance the prompt has no effect worth the name: bfloat16 alone moves a cosine by as much.
NO_EFFECT = 1e-3
CHANGES = ("moved", "shrunk", "inverted", "whole")


def farthest_shift(box: Sequence[float] | np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """How far, in x and in y, a box (xyxy) can go without leaving its image of `size` (width, height)."""
    rooms = ((-box[axis], size[axis] - box[axis + 2]) for axis in (0, 1))
    x, y = (after if after >= -before else before for before, after in rooms)
    return x, y


def moved(mask: np.ndarray) -> np.ndarray:
    """The mask `(H, W)` in another place: as far away as it goes whole, in both directions."""
    x0, y0, x1, y1 = map(int, mask_box(mask))
    x, y = map(int, farthest_shift((x0, y0, x1, y1), mask.shape[::-1]))
    found = np.zeros_like(mask)
    found[y0 + y : y1 + y, x0 + x : x1 + x] = mask[y0:y1, x0:x1]
    return found


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


def measure_sensitivity(
    encoder: CachedEncoder, data: Images, text: str = "caption", most: int = 500, resamples: int = RESAMPLES
) -> Result:
    """How much a region's embedding, and the text that it finds first, depend on its prompt.

    Every region is embedded with its own prompt and with four others: moved, shrunk, inverted, and the whole image. A
    model with box prompts sees its box moved, and the bounding boxes of the other masks; inverted, which is the whole
    image nearly always, is left out for it. Regions as wide and as high as their image cannot move: they are counted
    in `left_out` and part of the other changes only.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions`.
        text: field of the regions whose texts are ranked; `category` for regions that lack it.
        most: how many regions are measured, from the first on.
        resamples: the number of resamples of the bootstrap, which draws images.

    Returns:
        For each change `<change>_distance_cosine` (mean of 1 - cosine to the region's own embedding) and
        `<change>_top_text_changed` (share of the regions whose first text is another one);
        `regions_distance_cosine`, the mean distance between regions of one image, to compare with; `region_count`.

    Raises:
        ValueError: no region.
    """
    records, texts, fields = _first_regions(data, text, most)
    if not records:
        raise ValueError(f"{data.name} has no region.")
    keys = list(dict.fromkeys(texts))
    text_embeds = encoder.encode_texts(keys)
    rows = encoder.encode_records(records, name="regions of the sensitivity")
    own = torch.cat(rows)
    first = nearest_keys(own, text_embeds, 1)[1][:, 0]
    groups = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    takes_masks = encoder.encoder.prompt == "mask"
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    left_out: dict[str, int] = {}
    for change in CHANGES:
        if change == "inverted" and not takes_masks:
            continue
        changed = [_changed(record, change, takes_masks) for record in records]
        kept = torch.tensor([region is not None for record in changed for region in record["regions"]])
        if not kept.all():
            left_out[f"regions that cannot be {change}"] = int((~kept).sum())
        if not kept.any():
            continue
        changed = [{**record, "regions": [r for r in record["regions"] if r is not None]} for record in changed]
        others = torch.cat(encoder.encode_records(changed, name=f"{change} regions"))
        found = nearest_keys(others, text_embeds, 1)[1][:, 0]
        for name, values in (
            (f"{change}_distance_cosine", 1 - (own[kept] * others).sum(-1)),
            (f"{change}_top_text_changed", (found != first[kept]).float()),
        ):
            metrics[name] = values.mean().item()
            intervals[name] = mean_interval(values.numpy(), groups[kept.numpy()], resamples)
    strongest = max(value for name, value in metrics.items() if name.endswith("_distance_cosine"))
    # Distances of a model that tells little apart are small differences of numbers near 1.
    wide = [part.double() for part in rows if len(part) > 1]
    between = [1 - (part @ part.T)[~torch.eye(len(part), dtype=torch.bool)] for part in wide]
    metrics["regions_distance_cosine"] = torch.cat(between).mean().item() if between else float("nan")
    metrics["region_count"] = len(own)
    note = (
        "The prompt has no effect: no change of it moves the embeddings by more than "
        f"{NO_EFFECT} in cosine on average."
        if strongest < NO_EFFECT
        else "The prompt has an effect."
    )
    protocol = f"texts: {', '.join(fields)}"
    return Result("mask-sensitivity", data.name, protocol, metrics, intervals, data.split, left_out, [note])


class MaskSensitivity(Task):
    """What the prompts of regions do."""

    name = "mask-sensitivity"
    layout = LAYOUTS["region-classification"]
    primary_measure = "moved_distance_cosine"
    options = {"region_text": REGION_TEXT}
    hub_task = "image-feature-extraction"

    def read(
        self, data_dir: str | Sequence[str], split: str | None = None, protocol: str | None = None, **options: Any
    ) -> Images:
        return read_images("region-classification", data_dir, split)

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        return [measure_sensitivity(encoder, data, options["region_text"], resamples=resamples)]


def _first_regions(data: Images, text: str, most: int) -> tuple[list[Mapping[str, Any]], list[str], list[str]]:
    """Records with the first regions that have a text, the texts, and the fields that they are from."""
    records: list[Mapping[str, Any]] = []
    texts: list[str] = []
    fields: dict[str, None] = {}
    for record in data.records:
        regions = [region for region in record["regions"] if region.get(text) or region.get("category")]
        regions = regions[: most - len(texts)]
        if regions:
            records.append({**record, "regions": regions})
            texts += [region.get(text) or region["category"] for region in regions]
            fields |= dict.fromkeys(text if region.get(text) else "category" for region in regions)
        if len(texts) >= most:
            break
    return records, texts, list(fields)


def _changed(record: Mapping[str, Any], change: str, takes_masks: bool) -> dict[str, Any]:
    """The record with its prompts changed; None for a region whose prompt cannot be."""
    image = open_image(record["image"])
    make = {"moved": moved, "shrunk": shrunk, "inverted": inverted, "whole": whole}[change]
    regions: list[Any] = []
    for region in record["regions"]:
        own = pixel_mask(region, image.size)
        mask, box = make(own), region["box"]
        if change == "moved":
            x, y = farthest_shift(box, image.size)
            room = farthest_shift(mask_box(own), image.size) if takes_masks else (x, y)
            if max(map(abs, room)) < 1:
                regions.append(None)
                continue
            box = [box[0] + x, box[1] + y, box[2] + x, box[3] + y]
        else:
            box = [float(edge) for edge in mask_box(mask)]
        regions.append({**region, "mask": encode_rle(mask), "box": box})
    return {**record, "regions": regions}
