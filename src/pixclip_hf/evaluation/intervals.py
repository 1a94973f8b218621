"""95 % confidence intervals of means over items that come in groups.

A share near 0 or 1, a few images with most of the regions, and classes that occur once are the rule here, and
percentile bootstraps fail on them: of classes that occur once a draw leaves every third out, which moves the mean over
classes, and the estimate may lie outside of its own interval. Shares therefore get Wilson's score interval (1927),
which contains its estimate, with the number of independent decisions that would have the variance of the estimate (the
effective sample size of a survey). Of that variance there are two estimates: linearized, over groups (cluster-robust,
with the correction "HC2" for groups that hold much of the data), which assumes nothing and is unsteady where few
groups decide; and that of a model with one correlation inside all groups. The more groups decide, the more the first
counts.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# The weight of the model beside the linearized variance, in groups that decide.
MODEL_GROUPS = 20
# Of the variance of classes that occur in one image, no more than this share is taken for differences between classes,
# which are no error: that share is known from other classes alone.
MOST_BETWEEN = 0.5
# Few such classes tell that share badly, and never too small: it counts as if this many more had shown none of it.
ALIKE_CLASSES = 5


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
    """Interval of the mean of `values`, which contains it.

    Args:
        values (`(N,)`): hits, shares of hits, overlaps: anything in [0, 1] gets a score interval. Others get
            [`bootstrap_interval`].
        groups (`(N,)`): identity of each item's group.
        resamples: the number of resamples of the bootstrap; 0 gives (nan, nan).

    Raises:
        ValueError: no items, or a value that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    _check_values("values", values)
    index = np.unique(groups, return_inverse=True)[1].reshape(-1)
    if not len(values) or resamples < 1 or values.min() < 0 or values.max() > 1:
        return bootstrap_interval(lambda weights: float(np.average(values, weights=weights)), groups, resamples)
    if values.min() == values.max() and 0 < values[0] < 1:
        return float(values[0]), float(values[0])
    count = np.bincount(index).astype(np.float64)
    share, mean = count / len(values), np.bincount(index, weights=values) / count
    estimate, spread = float(values.mean()), float(values.var())
    several = len(count) > 1  # one group says nothing of others
    terms = share * (mean - estimate) / np.sqrt(1 - share) if several else np.zeros(1)
    rho = _correlation(values, index) if spread and several else 1.0
    modeled = spread * float((share**2 * (rho + (1 - rho) / count)).sum())
    variance = _blended(terms, modeled)
    number = estimate * (1 - estimate) / variance if variance else 1 / float((share**2).sum())
    return _score_interval(estimate, number, 1 / float((share**2).sum()) - 1)


def mean_measures(
    values: Mapping[str, Sequence[float]], groups: Sequence[int], resamples: int = RESAMPLES
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The mean of the values of each measure, and its [`mean_interval`].

    Args:
        values: for each measure one value per item.
        groups: identity of each item's group.
        resamples: as in [`mean_interval`].
    """
    arrays = {name: np.array(own, dtype=np.float64) for name, own in values.items()}
    means = {name: float(array.mean()) for name, array in arrays.items()}
    return means, {name: mean_interval(array, np.array(groups), resamples) for name, array in arrays.items()}


def class_mean_interval(
    hits: np.ndarray, labels: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Interval of the mean over the classes that occur of the mean hit in each, which contains it.

    No class drops out: every class keeps its place in the mean, and the error of one that occurs in a single image is
    that of the others.

    Args:
        hits (`(N,)`): in [0, 1].
        labels (`(N,)` int): class of each item.
        groups (`(N,)`): identity of each item's group.
        resamples: 0 gives (nan, nan).

    Raises:
        ValueError: no items, or a hit that is not finite.
    """
    if not len(hits):
        raise ValueError("`hits` must have at least one item, got none.")
    if resamples < 1:
        return float("nan"), float("nan")
    hits = np.asarray(hits, dtype=np.float64)
    _check_values("hits", hits)
    group = np.unique(groups, return_inverse=True)[1].reshape(-1)
    label = np.unique(labels, return_inverse=True)[1].reshape(-1)
    # One cell per class and group: what a group says of a class.
    cells, cell = np.unique(label * (group.max() + 1) + group, return_inverse=True)
    own, of_group = np.divmod(cells, group.max() + 1)
    size = np.bincount(cell).astype(np.float64)
    said = np.bincount(cell, weights=hits) / size
    accuracy = np.bincount(label, weights=hits) / np.bincount(label)
    classes, estimate = len(accuracy), float(accuracy.mean())
    share = size / np.bincount(label)[own]
    number = np.bincount(own)  # groups of each class
    several = number[own] > 1
    terms = np.where(several, share * (said - accuracy[own]) / np.sqrt(np.where(several, 1 - share, 1)), 0) / classes
    squares = np.bincount(own, weights=share**2) / classes**2
    telling = int((number > 1).sum())
    between = min(_correlation(said, own), MOST_BETWEEN) * telling / (telling + ALIKE_CLASSES)
    modeled = estimate * (1 - estimate) * (1 - between) * squares
    alone = number == 1
    variance = _blended(np.bincount(of_group, weights=terms), float(modeled[~alone].sum())) + float(
        modeled[alone].sum()
    )
    independent = estimate * (1 - estimate) / variance if variance else 1 / float(squares.sum())
    freedom = squares.sum() ** 2 / (squares**2 / number).sum()
    return _score_interval(estimate, independent, float(freedom))


def _check_values(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        number = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"`{name}[{number}]` must be finite, got {values[number]}: a decision is a hit or a miss.")


def _blended(terms: np.ndarray, modeled: float) -> float:
    """The variance: linearized, of the terms of the groups, and modeled."""
    linearized = float((terms**2).sum())
    decide = linearized**2 / float((terms**4).sum()) if linearized else 0.0
    weight = decide / (decide + MODEL_GROUPS)
    return weight * linearized + (1 - weight) * modeled


def _correlation(values: np.ndarray, index: np.ndarray) -> float:
    """Correlation of values inside their groups, by analysis of variance, in [0, 1]; 0 where each group has one."""
    count = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, weights=values) / count
    inside = len(values) - len(count)
    if len(count) < 2 or not inside:
        return 0.0
    between = float((count * (mean - values.mean()) ** 2).sum()) / (len(count) - 1)
    # One more degree of freedom of the whole spread: groups that agree by chance are not taken for all alike.
    within = (float(((values - mean[index]) ** 2).sum()) + float(values.var())) / (inside + 1)
    typical = (len(values) - float((count**2).sum()) / len(values)) / (len(count) - 1)
    total = between + (typical - 1) * within
    return min(max((between - within) / total, 0.0), 1.0) if total > 0 else 0.0


def _score_interval(estimate: float, number: float, freedom: float) -> tuple[float, float]:
    """Wilson's interval of a share of `number` independent decisions, with the quantile of Student's t: the model adds
    its groups to the degrees of freedom."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    freedom = max(freedom, 0) + MODEL_GROUPS
    # Expansion of the quantile in 1 / freedom (Abramowitz and Stegun, 26.7.5), exact to three digits from 20 on.
    quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    square = quantile**2 / number
    center = (estimate + square / 2) / (1 + square)
    half = np.sqrt(max(estimate * (1 - estimate), 0) * square + square**2 / 4) / (1 + square)
    low, high = max(center - half, 0.0), min(center + half, 1.0)
    # Equal but for rounding where the estimate is 0 or 1.
    return float(min(low, estimate)), float(max(high, estimate))
