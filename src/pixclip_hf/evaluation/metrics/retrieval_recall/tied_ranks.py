"""Ranks with ties: what a query scores when keys of equal score come in random order."""

import numpy as np


def hit_chances(greater: np.ndarray, tied_wrong: np.ndarray, tied_right: np.ndarray, k: int) -> np.ndarray:
    """Chance that a right key is among the k nearest, over random orders of keys of equal score.

    A model that gives every key the same score thus scores what guessing does, not 1.

    Args:
        greater (`(Q,)`): wrong keys that score higher than the best right one.
        tied_wrong, tied_right (`(Q,)`): wrong and right keys that score the same as the best right one, itself
            included. A query without a right key that has a score, `tied_right` 0, misses.
        k: how many keys are looked at.

    Returns:
        `(Q,)` float64 in [0, 1]; 0 or 1 without ties.

    Raises:
        ValueError: `k` below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    slots = np.clip(k - greater, 0, None)
    tied = tied_wrong + tied_right
    miss = np.ones(len(slots))
    # The chance that the first `slots` of the tied keys are all wrong, drawn one by one.
    for drawn in range(int(min(k, tied.max(initial=0)))):
        share = np.clip(tied_wrong - drawn, 0, None) / np.clip(tied - drawn, 1, None)
        miss = np.where(drawn < slots, miss * share, miss)
    return np.where((slots > 0) & (tied_right > 0), 1 - miss, 0.0)


def expected_ranks(greater: np.ndarray, tied_wrong: np.ndarray, tied_right: np.ndarray) -> np.ndarray:
    """Mean rank of the first right key over random orders of keys of equal score, from 1 on; arguments as above."""
    return greater + (tied_wrong + tied_right + 1) / (tied_right + 1)


def count_ranks(scores: np.ndarray, right: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`greater`, `tied_wrong`, `tied_right` of a whole matrix.

    What is not a number is wrong: a right key whose score is not finite is none, and a wrong key whose score is NaN
    stands before all others. A query that has no right key left ranks behind all keys, with `tied_right` 0.

    Args:
        scores (`(Q, K)`): of each query and key.
        right (`(Q, K)` bool): the keys that are right for a query.
        tolerance: scores closer than this are equal.

    Raises:
        ValueError: a query without a right key.
    """
    if not right.any(-1).all():
        raise ValueError(f"Every query needs a right key, query {int(np.argmin(right.any(-1)))} has none.")
    best = np.where(right & np.isfinite(scores), scores, -np.inf).max(-1, keepdims=True)
    scored = np.isfinite(best)
    best = np.where(scored, best, 0)
    # An infinite score minus a finite one: never tied.
    known = np.where(np.isnan(scores), np.inf, scores)
    tied = (np.abs(known - best) <= tolerance) & scored
    greater = ((known > best + tolerance) & ~right).sum(-1)
    return np.where(scored[..., 0], greater, scores.shape[-1]), (tied & ~right).sum(-1), (tied & right).sum(-1)
