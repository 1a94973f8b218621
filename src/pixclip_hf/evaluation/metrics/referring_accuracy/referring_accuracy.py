"""Accuracy of referring expression comprehension, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from .box_overlap import pairwise_iou

_DESCRIPTION = """\
Referring expression comprehension: the share of expressions whose predicted box overlaps a right one with an
intersection over union above a threshold.
"""
_INPUTS = """\
Args:
    predictions: for each expression a box [x0, y0, x1, y1].
    references: for each expression its right boxes (several where any of them counts).
    threshold: threshold of the intersection over union, 0.5 as usual; it must be exceeded.

Returns:
    `accuracy` and `mean_iou`, the mean overlap with the best right box.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReferringAccuracy(evaluate.Metric):
    """Accuracy at an overlap, and mean overlap."""

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": box, "references": datasets.Sequence(box)}),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[list[float]]],
        threshold: float = 0.5,
    ) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        best = np.array([pairwise_iou(np.array([box]), np.array(right)).max() for box, right in pairs])
        return {"accuracy": float((best > threshold).mean()), "mean_iou": float(best.mean())}
