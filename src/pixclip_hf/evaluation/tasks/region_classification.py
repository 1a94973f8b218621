"""Zero-shot classification of regions by named protocols (COCO, LVIS)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ...encoders.cached import CachedEncoder
from ...encoders.protocol import Encoder
from ...encoders.templates import IMAGENET_TEMPLATES, ONE_TEMPLATE
from ...encoders.views import crop, official_crop, padded_square
from ..image_sets import LAYOUTS, Images
from ..intervals import RESAMPLES
from ..pictures import ComparedTexts, draw_first_image
from ..report import Result
from .base import Option, Task
from .class_accuracies import class_accuracies, class_chances
from .mask_sensitivity import measure_sensitivity

# Regions that the sensitivity to their prompts is measured on beside the classification.
SENSITIVITY_REGIONS = 100


@dataclass(frozen=True)
class Protocol:
    """How regions and classes reach the model.

    Args:
        view: `"context"` (the region prompt in the whole image), `"crop"`, `"official_crop"` or `"padded_square"` (see
            `views`).
        prompt: `"mask"` (the box where there is none) or `"box"`.
        templates: the templates of the class names.
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


def choose_protocol(name: str | None, dataset: str, encoder: Encoder) -> str:
    """The protocol that `corrected` (or None) and `official` mean for a dataset and an encoder.

    Raises:
        ValueError: an unknown name.
    """
    if name in PROTOCOLS:
        return name
    if name == "official":
        return "pixclip-lvis-official" if "lvis" in dataset.lower() else "pixclip-coco-official"
    if name in (None, "corrected"):
        if encoder.view is not None:
            return "context-masks"  # the view is a way of its own to look at the regions of an image
        return "pixclip-coco" if encoder.prompt == "mask" else "cloc-boxes"
    raise ValueError(f"`protocol` must be corrected, official or one of {', '.join(PROTOCOLS)}, got {name!r}.")


def classify_regions(
    encoder: CachedEncoder, data: Images, protocol: str | None = None, resamples: int = RESAMPLES
) -> Result:
    """Zero-shot classification of every region among all classes of the dataset.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions` that have a `category`.
        protocol: a name of [`PROTOCOLS`], `corrected` or `official`.
        resamples: the number of resamples of the bootstrap, which draws images.

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
            if reason := why_left_out(region, chosen):
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                regions.append(prompting(region, chosen))
        if regions:
            records.append({**record, "regions": regions})
            labels.append([numbers[region["category"]] for region in regions])
    if not records:
        raise ValueError(f"{data.name} has no region to classify; left out: {left_out or 'none'}.")
    names = class_names(data, chosen)
    classes = encoder.encode_texts(names, templates=chosen.templates)
    embeds = torch.cat(encoder.encode_records(records, _show(chosen.view, encoder.encoder), name=name))
    groups = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    metrics, intervals = class_accuracies(embeds, classes, torch.tensor(sum(labels, [])), groups, resamples)
    metrics |= {"region_count": len(embeds), "class_count": len(classes)}
    chance = class_chances(len(classes))
    return Result("region-classification", data.name, name, metrics, intervals, data.split, left_out, chance=chance)


def why_left_out(region: Mapping[str, Any], protocol: Protocol) -> str | None:
    """The reason for which a protocol leaves a region out; None for one that counts."""
    if region.get("iscrowd") and not protocol.crowds:
        return "crowds"
    return None if region["category"] else "regions without a category"


def prompting(region: Mapping[str, Any], protocol: Protocol) -> Mapping[str, Any]:
    """A region as a protocol prompts with it."""
    return {**region, "mask": None} if protocol.prompt == "box" else region


def class_names(data: Images, protocol: Protocol) -> list[str]:
    """The classes as a protocol writes them."""
    return [category if protocol.raw_names else category.replace("_", " ") for category in data.categories]


def _show(view: str, encoder: Encoder) -> Any:
    if view == "crop":
        red, green, blue = (round(255 * channel) for channel in encoder.mean_color)
        return partial(crop, fill=(red, green, blue))
    return {"context": None, "official_crop": official_crop, "padded_square": padded_square}[view]


class RegionClassification(Task):
    """Every region among all classes of its dataset; and, for models with prompts, what the prompts do."""

    name = "region-classification"
    layout = LAYOUTS["region-classification"]
    protocols = ("official", *PROTOCOLS)
    primary_measure = "accuracy"
    options = {
        "sensitivity_regions": Option(
            SENSITIVITY_REGIONS, "regions whose prompts are changed beside region-classification; 0 for none"
        )
    }
    hub_task = "zero-shot-image-classification"

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        results = [classify_regions(encoder, data, protocol, resamples)]
        if options["sensitivity_regions"] and encoder.encoder.view is None:
            results.append(measure_sensitivity(encoder, data, "category", options["sensitivity_regions"], resamples))
        return results

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        named = choose_protocol(protocol, data.name, encoder.encoder)
        chosen = PROTOCOLS[named]
        texts = class_names(data, chosen)
        numbers = {category: number for number, category in enumerate(data.categories)}

        def own(region: Mapping[str, Any]) -> int | None:
            return None if why_left_out(region, chosen) else numbers[region["category"]]

        records = [
            {**record, "regions": [prompting(region, chosen) for region in record["regions"]]}
            for record in data.records
        ]
        compared = ComparedTexts(texts, encoder.encode_texts(texts, templates=chosen.templates), own)
        title = f"{self.name}, {named}: best of {len(texts)} classes"
        show = _show(chosen.view, encoder.encoder)
        return draw_first_image(encoder, records, compared, folder, name, title, show)
