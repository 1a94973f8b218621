"""Top-1 and top-5 accuracy, over items and as a mean over classes, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from .class_accuracy import class_mean, label_hits

_DESCRIPTION = """\
Zero-shot classification of regions or images: accuracy and top-5 accuracy over items, and both as a mean over the
classes that occur (mAcc), which counts a rare class as much as a frequent one. Classes of equal score count as if in
random order.
"""
_INPUTS = """\
Args:
    predictions: for each item its score for every class.
    references: for each item the index of its class.

Returns:
    `accuracy`, `top5_accuracy`, `class_mean_accuracy`, `class_mean_top5_accuracy`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RegionClassification(evaluate.Metric):
    """Accuracy over items and over classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        if labels.min() < 0 or labels.max() >= scores.shape[1]:
            raise ValueError(f"`references` must be indices of the {scores.shape[1]} classes, got {labels.tolist()}.")
        results = {}
        for name, k in (("accuracy", 1), ("top5_accuracy", 5)):
            hits = label_hits(scores, labels, k)
            results[name] = float(hits.mean())
            results[f"class_mean_{name}"] = class_mean(hits, labels)
        return results
