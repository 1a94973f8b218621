"""Zero-shot classification of regions by named protocols (COCO, LVIS), and of whole images (ImageNet)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import CachedEncoder
from .image_sets import Images
from .intervals import RESAMPLES, bootstrap_interval, mean_interval
from .metrics.region_classification.class_accuracy import class_mean, label_hits
from .prompts import IMAGENET_TEMPLATES, ONE_TEMPLATE, class_embeddings
from .report import Result
from .views import crop, official_crop, padded_square

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How regions and classes reach the model.

    Args:
        view: `"context"` (the region prompt in the whole image), `"crop"`, `"official_crop"` or `"padded_square"` (see
            `views`).
        prompt: `"mask"` (the box where there is none) or `"box"`.
        templates: of the class names.
        crowds: count regions that are marked as crowds.
        raw_names: class names as the annotation file has them, underscores included.
    """

    view: str
    prompt: str
    templates: tuple[str, ...]
    crowds: bool = False
    raw_names: bool = False


PROTOCOLS = {
    "pixclip-coco": Protocol("crop", "mask", ONE_TEMPLATE),
    "pixclip-coco-official": Protocol("official_crop", "mask", ONE_TEMPLATE, crowds=True, raw_names=True),
    "pixclip-lvis-official": Protocol("padded_square", "mask", ONE_TEMPLATE, crowds=True, raw_names=True),
    "cloc-boxes": Protocol("context", "box", IMAGENET_TEMPLATES),
    "context-masks": Protocol("context", "mask", ONE_TEMPLATE),
}
"""Named protocols of region classification; docs/evaluation.md explains them."""


def choose_protocol(name: str | None, dataset: str, encoder: Any) -> str:
    """The protocol that `corrected` (or None) and `official` mean for a dataset and an encoder.

    Raises:
        ValueError: an unknown name.
    """
    if name in PROTOCOLS:
        return name
    if name == "official":
        return "pixclip-lvis-official" if "lvis" in dataset.lower() else "pixclip-coco-official"
    if name in (None, "corrected"):
        if hasattr(encoder, "view"):
            return "context-masks"  # a peer has its own way of looking at the regions of an image
        return "pixclip-coco" if encoder.takes_masks else "cloc-boxes"
    raise ValueError(f"`protocol` must be corrected, official or one of {', '.join(PROTOCOLS)}, got {name!r}.")


def classify_regions(
    encoder: CachedEncoder, data: Images, protocol: str | None = None, resamples: int = RESAMPLES
) -> Result:
    """Zero-shot classification of every region among all classes of the dataset.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions` that have a `category`.
        protocol: a name of [`PROTOCOLS`], `corrected` or `official`.
        resamples: of the bootstrap, which draws images.

    Returns:
        `accuracy`, `top5_accuracy` (over regions), `class_mean_accuracy` (mAcc) and `class_mean_top5_accuracy` (mean
        over the classes that occur), `region_count`, `class_count` (classes to choose from).

    Raises:
        ValueError: no region is left, or an unknown protocol.
    """
    name = choose_protocol(protocol, data.name, encoder.encoder)
    chosen = PROTOCOLS[name]
    left_out = dict(data.left_out)
    records, labels = [], []
    numbers = {category: number for number, category in enumerate(data.categories)}
    for record in data.records:
        regions = []
        for region in record["regions"]:
            crowd = region.get("iscrowd") and not chosen.crowds
            if reason := "crowds" if crowd else None if region["category"] else "regions without a category":
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                regions.append(region)
        if chosen.prompt == "box":
            regions = [{**region, "mask": None} for region in regions]
        if regions:
            records.append({**record, "regions": regions})
            labels.append([numbers[region["category"]] for region in regions])
    if not records:
        raise ValueError(f"{data.name} has no region to classify; left out: {left_out or 'none'}.")
    names = [category if chosen.raw_names else category.replace("_", " ") for category in data.categories]
    classes = class_embeddings(encoder, names, chosen.templates)
    embeds = torch.cat(encoder.embed_regions(records, _show(chosen.view, encoder), name=name))
    groups = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    metrics, intervals = class_accuracies(embeds, classes, torch.tensor(sum(labels, [])), groups, resamples)
    metrics |= {"region_count": len(embeds), "class_count": len(classes)}
    return Result("region-classification", data.name, name, metrics, intervals, data.split, left_out)


def _show(view: str, encoder: CachedEncoder) -> Any:
    if view == "crop":
        return partial(crop, fill=tuple(round(255 * channel) for channel in encoder.mean_colour))
    return {"context": None, "official_crop": official_crop, "padded_square": padded_square}[view]


def classify_images(
    encoder: CachedEncoder, data: Images, templates: Sequence[str] = IMAGENET_TEMPLATES, resamples: int = RESAMPLES
) -> Result:
    """Zero-shot classification of whole images, as on ImageNet (Radford et al. 2021, section 3.1).

    Args:
        encoder: a [`CachedEncoder`].
        data: images with a `label`, the number of their class among `categories`. Classes of the same name stay two,
            which tie.
        templates: of the class names.
        resamples: of the bootstrap.

    Returns:
        The measures of [`classify_regions`], with `image_count`.
    """
    classes = class_embeddings(encoder, data.categories, templates)
    embeds = encoder.embed_images([record["image"] for record in data.records])
    labels = torch.tensor([record["label"] for record in data.records])
    metrics, intervals = class_accuracies(embeds, classes, labels, np.arange(len(labels)), resamples)
    metrics |= {"image_count": len(embeds), "class_count": len(classes)}
    protocol = f"{len(templates)} template" + "s" * (len(templates) > 1)
    return Result("zero-shot-classification", data.name, protocol, metrics, intervals, data.split, data.left_out)


def class_accuracies(
    embeds: Tensor, classes: Tensor, labels: Tensor, groups: np.ndarray, resamples: int = RESAMPLES, block: int = 4096
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Top-1 and top-5 accuracy, over items and as a mean over the classes that occur, with their intervals.

    Args:
        embeds (`(N, D)`), classes (`(C, D)`): L2-normalised.
        labels (`(N,)`): class of each item.
        groups (`(N,)`): image of each item, which the bootstrap draws.
        resamples: of the bootstrap.
        block: items at a time.
    """
    hits: dict[str, list[np.ndarray]] = {"accuracy": [], "top5_accuracy": []}
    for rows, own in zip(embeds.split(block), labels.split(block), strict=True):
        scores = (rows.float() @ classes.float().T).numpy()
        hits["accuracy"].append(label_hits(scores, own.numpy(), 1))
        hits["top5_accuracy"].append(label_hits(scores, own.numpy(), 5))
    metrics, intervals, numbers = {}, {}, labels.numpy()
    for name, parts in hits.items():
        values = np.concatenate(parts)
        metrics[name] = float(values.mean())
        intervals[name] = mean_interval(values, groups, resamples)
        metrics[f"class_mean_{name}"] = class_mean(values, numbers)
        over_classes = partial(class_mean, values, numbers)
        intervals[f"class_mean_{name}"] = bootstrap_interval(over_classes, groups, resamples)
    return metrics, intervals
