"""Zero-shot classification of whole images, as on ImageNet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...encoders.cached import CachedEncoder
from ...encoders.templates import IMAGENET_TEMPLATES
from ..image_sets import LAYOUTS, Images
from ..intervals import RESAMPLES
from ..pictures import draw_classified_images, spread
from ..report import Result
from ..retrieval import nearest_keys
from .base import Task
from .class_accuracies import class_accuracies, class_chances


def classify_images(
    encoder: CachedEncoder, data: Images, templates: Sequence[str] = IMAGENET_TEMPLATES, resamples: int = RESAMPLES
) -> Result:
    """Zero-shot classification of whole images, as on ImageNet (Radford et al. 2021, section 3.1).

    Args:
        encoder: a [`CachedEncoder`].
        data: images with a `label`, the number of their class among `categories`. Classes of the same name stay
            apart and tie.
        templates: the templates of the class names.
        resamples: the number of resamples of the bootstrap.

    Returns:
        The measures of [`classify_regions`], with `image_count`.
    """
    classes = encoder.encode_texts(data.categories, templates=templates)
    embeds = encoder.encode_images([record["image"] for record in data.records])
    labels = torch.tensor([record["label"] for record in data.records])
    metrics, intervals = class_accuracies(embeds, classes, labels, np.arange(len(labels)), resamples)
    metrics |= {"image_count": len(embeds), "class_count": len(classes)}
    protocol = f"{len(templates)} template" + "s" * (len(templates) > 1)
    chance = class_chances(len(classes))
    return Result(
        "zero-shot-classification", data.name, protocol, metrics, intervals, data.split, data.left_out, chance=chance
    )


class ImageClassification(Task):
    """Every image among the classes of its dataset."""

    name = "zero-shot-classification"
    layout = LAYOUTS["zero-shot-classification"]
    primary_measure = "accuracy"
    hub_task = "zero-shot-image-classification"

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        return [classify_images(encoder, data, resamples=resamples)]

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        names = data.categories
        records = [data.records[number] for number in spread(len(data.records))]
        classes = encoder.encode_texts(names, templates=IMAGENET_TEMPLATES)
        images = encoder.encode_images([record["image"] for record in records])
        answers = [names[i] for i in nearest_keys(images, classes, 1)[1][:, 0].tolist()]
        truths = [names[record["label"]] for record in records]
        title = f"{self.name}: the first of {len(names)} classes"
        return draw_classified_images(records, answers, truths, folder, name, title)
