"""Accuracies over items and over classes, of regions and of whole images."""

import numpy as np
from torch import Tensor

from ..intervals import RESAMPLES, class_mean_interval, mean_interval
from ..metrics.region_classification.class_accuracy import class_mean, label_hits


def class_accuracies(
    embeds: Tensor, classes: Tensor, labels: Tensor, groups: np.ndarray, resamples: int = RESAMPLES, block: int = 4096
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Top-1 and top-5 accuracy, over items and as a mean over the classes that occur, with their intervals.

    Args:
        embeds (`(N, D)`), classes (`(C, D)`): L2-normalized.
        labels (`(N,)`): class of each item.
        groups (`(N,)`): image of each item, which the bootstrap draws.
        resamples: the number of resamples of the bootstrap.
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
        intervals[f"class_mean_{name}"] = class_mean_interval(values, numbers, groups, resamples)
    return metrics, intervals


def class_chances(classes: int) -> dict[str, float]:
    """What guessing among so many classes gives of the measures of [`class_accuracies`]."""
    first, five = 1 / classes, min(5, classes) / classes
    return {
        "accuracy": first,
        "class_mean_accuracy": first,
        "top5_accuracy": five,
        "class_mean_top5_accuracy": five,
    }
