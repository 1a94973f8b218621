"""Recall@k of retrieval with several right keys per query, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from .tied_ranks import count_ranks, expected_ranks, hit_chances

_DESCRIPTION = """\
Recall@k: the share of queries with a right key among their k nearest. A query may have several right keys (five
captions of an image, regions with the same text). Keys of equal score count as if in random order, so that equal
scores for everything give the recall of guessing.
"""
_INPUTS = """\
Args:
    predictions: for each query its similarity to every key.
    references: for each query the indices of its right keys.
    ks: the k of recall@k.
    tolerance: similarities closer than this are equal.

Returns:
    `recall@k` for each k, and `median_rank`, from 1 on.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RetrievalRecall(evaluate.Metric):
    """Recall@k and median rank."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[int]],
        ks: tuple[int, ...] = (1, 5, 10),
        tolerance: float = 1e-6,
    ) -> dict[str, float]:
        counts = []
        for query, (scores, right) in enumerate(zip(predictions, references, strict=True)):
            row = np.asarray(scores, dtype=np.float64)[None]
            if len(right) == 0 or min(right) < 0 or max(right) >= row.shape[1]:
                raise ValueError(
                    f"`references[{query}]` must hold indices of the {row.shape[1]} keys, got {list(right)}."
                )
            mask = np.zeros(row.shape, dtype=bool)
            mask[0, np.asarray(right)] = True
            counts.append([value[0] for value in count_ranks(row, mask, tolerance)])
        greater, tied_wrong, tied_right = np.array(counts).T
        recalls = {f"recall@{k}": float(hit_chances(greater, tied_wrong, tied_right, k).mean()) for k in ks}
        return {**recalls, "median_rank": float(np.median(expected_ranks(greater, tied_wrong, tied_right)))}
