"""Bootstrap confidence intervals of means over items that come in groups."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979), drawing whole groups with replacement.

    Regions of one image, or captions of one image, are no independent draws: the image is what is drawn.

    Args:
        statistic: from weights `(N,)`, how often each item was drawn, to a number.
        groups (`(N,)`): identity of each item's group.
        resamples: how many draws; 0 gives (nan, nan).
        level: share of the draws that the interval holds.
        seed: the seed of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no items, or a `level` outside (0, 1).
    """
    if not len(groups):
        raise ValueError("`groups` must have at least one item, got none.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level}.")
    if resamples < 1:
        return float("nan"), float("nan")
    index = np.unique(groups, return_inverse=True)[1].reshape(-1)
    number = index.max() + 1
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(number, size=number), minlength=number)
        draws.append(statistic(counts[index].astype(np.float64)))
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """[`bootstrap_interval`] of the mean of `values` `(N,)`."""
    return bootstrap_interval(lambda weights: float(np.average(values, weights=weights)), groups, resamples)
