"""Top-k accuracy over items and as a mean over classes."""

import numpy as np


def label_hits(scores: np.ndarray, labels: np.ndarray, k: int, tolerance: float = 1e-6) -> np.ndarray:
    """Chance that an item's class is among its k best, over random orders of classes of equal score.

    Args:
        scores (`(N, C)`): of each item and class.
        labels (`(N,)` int): the class of each item.
        k: how many classes are looked at.
        tolerance: scores closer than this are equal.

    Returns:
        `(N,)` float64; 0 or 1 without ties. What is not a number is wrong: an item whose own class has a score that is
        not finite misses, and a class whose score is NaN stands before all others.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    scored = np.isfinite(own)
    # Where the own score is none, any number will do.
    own = np.where(scored, own, 0)
    scores = np.where(np.isnan(scores), np.inf, scores)
    higher = (scores > own + tolerance).sum(1)
    tied = (np.abs(scores - own) <= tolerance).sum(1)
    return np.where(scored[:, 0], np.clip((k - higher) / np.maximum(tied, 1), 0, 1), 0.0)


def class_mean(hits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean over the classes that occur of the mean hit in each; `weights` `(N,)` count items several times or not."""
    weights = np.ones(len(hits)) if weights is None else weights
    count = np.bincount(labels, weights=weights)
    total = np.bincount(labels, weights=weights * hits)
    return float((total[count > 0] / count[count > 0]).mean())
