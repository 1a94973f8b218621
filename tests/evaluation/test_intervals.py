"""Intervals hold the truth in 95 % of repeats, on long tails of classes and of groups, and always their estimate."""

import numpy as np
import pytest

from pixclip_hf.evaluation.intervals import class_mean_interval, mean_interval
from pixclip_hf.evaluation.metrics.region_classification.class_accuracy import class_mean

REPEATS = 1000


def coverage(draw, interval, truth, estimate):
    """The share of repeats whose interval holds the truth; every interval holds its estimate."""
    held = 0
    for seed in range(REPEATS):
        drawn = draw(np.random.default_rng(seed))
        low, high = interval(*drawn)
        assert 0 <= low <= estimate(*drawn) <= high <= 1
        held += low <= truth <= high
    return held / REPEATS


def long_tail(classes, most):
    """Labels of classes of which the first occurs `most` times and most of them once or twice."""
    return np.repeat(np.arange(classes), np.maximum(1, most // np.arange(1, classes + 1)))


@pytest.mark.parametrize("per_image", (1, 4))
@pytest.mark.parametrize("mean", (0.1, 0.3, 0.8))
@pytest.mark.parametrize(("classes", "most"), [(60, 200), (300, 300)])
def test_class_mean_on_a_long_tail(classes, most, mean, per_image):
    labels = long_tail(classes, most)
    accuracies = np.random.default_rng(7).beta(8 * mean, 8 * (1 - mean), classes)

    def draw(rng):
        groups = rng.integers(len(labels) // per_image, size=len(labels)) if per_image > 1 else np.arange(len(labels))
        return (rng.random(len(labels)) < accuracies[labels]).astype(float), labels, groups

    share = coverage(draw, class_mean_interval, accuracies.mean(), lambda hits, own, _: class_mean(hits, own))
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("alike", (False, True))
@pytest.mark.parametrize("mean", (0.05, 0.3, 0.9))
def test_mean_over_images_with_a_long_tail_of_regions(mean, alike):
    """Regions of an image that are alike, or not; a few images hold most of them."""
    sizes = np.minimum((np.random.default_rng(3).pareto(1.5, 300) + 1).astype(int), 30)
    groups = np.repeat(np.arange(len(sizes)), sizes)

    def draw(rng):
        own = rng.beta(5 * mean, 5 * (1 - mean), len(sizes)) if alike else np.full(len(sizes), mean)
        return (rng.random(len(groups)) < own[groups]).astype(float), groups

    assert 0.93 <= coverage(draw, mean_interval, mean, lambda hits, _: hits.mean()) <= 0.97


def test_mean_of_overlaps_on_a_long_tail():
    """Values between 0 and 1, most of them small."""

    def draw(rng):
        return rng.beta(0.5, 4.5, 200), np.arange(200)

    assert 0.93 <= coverage(draw, mean_interval, 0.1, lambda values, _: values.mean()) <= 0.97


@pytest.mark.parametrize("per_image", (1, 4))
@pytest.mark.parametrize("mean", (0.03, 0.5))
def test_class_mean_on_long_tails_that_are_drawn(mean, per_image):
    """Each repeat draws its own sizes and accuracies of classes, very uneven both of them. With classes that are drawn
    once, an accuracy that only rare classes have would be unknowable: intervals hold it as far as others tell it."""
    held = 0
    for seed in range(REPEATS):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(60), np.minimum(rng.pareto(1.0, 60) + 1, 300).astype(int))
        accuracies = rng.beta(2 * mean, 2 * (1 - mean), 60)
        hits = (rng.random(len(labels)) < accuracies[labels]).astype(float)
        groups = rng.integers(len(labels) // per_image, size=len(labels)) if per_image > 1 else np.arange(len(labels))
        low, high = class_mean_interval(hits, labels, groups)
        held += low <= accuracies.mean() <= high
    assert 0.93 <= held / REPEATS <= 0.97


@pytest.mark.parametrize("images", (1, 2, 3, 4))
def test_a_few_images_say_little(images):
    """All right, all wrong, or some: never that the accuracy is known."""
    groups = np.repeat(np.arange(images), 2)
    for share in (0.0, 0.5, 1.0):
        hits = np.repeat([1.0, 0.0], [round(share * len(groups)), len(groups) - round(share * len(groups))])
        low, high = mean_interval(hits, groups)
        assert low <= share <= high and high - low > 0.4


def test_a_class_mean_of_few_hits():
    """One hit in 41 classes that occur once: a bootstrap over images would leave classes out, and the estimate with
    them."""
    hits, classes = np.eye(41)[0], np.arange(41)
    low, high = class_mean_interval(hits, classes, np.arange(41))
    assert 0 < low < 1 / 41 < high < 0.2
    # Classes that all fail say that the accuracy is low, not that it is 0.
    low, high = class_mean_interval(np.zeros(41), classes, np.arange(41))
    assert low == 0 and 0.05 < high < 0.15
    assert np.isnan(class_mean_interval(hits, classes, classes, resamples=0)).all()
    with pytest.raises(ValueError, match="at least one item"):
        class_mean_interval(np.ones(0), np.ones(0, dtype=int), np.ones(0))


def test_shares_of_all_and_none():
    low, high = mean_interval(np.ones(30), np.arange(30))
    assert 0.8 < low < 0.95 and high == 1
    assert mean_interval(np.full(30, 0.5), np.arange(30)) == (0.5, 0.5)


def test_chances_of_retrieval():
    """By hand: image 0 has two right texts of three, image 1 one; each text has one right image of two."""
    import torch

    from pixclip_hf.evaluation.retrieval import retrieval_chances

    found = retrieval_chances(torch.tensor([0, 1]), torch.tensor([0, 0, 1]), ks=(1, 2, 5))
    assert found == pytest.approx(
        {
            "image_to_text_recall@1": (2 / 3 + 1 / 3) / 2,
            "image_to_text_recall@2": (1 + 2 / 3) / 2,
            "image_to_text_recall@5": 1,
            "text_to_image_recall@1": 1 / 2,
            "text_to_image_recall@2": 1,
            "text_to_image_recall@5": 1,
        }
    )
