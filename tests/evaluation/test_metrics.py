"""The `evaluate` metrics on hand-made scores, loaded by their path, and bootstrap intervals."""

import ast
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from pixclip_hf.evaluation import metrics
from pixclip_hf.evaluation.intervals import bootstrap_interval, mean_interval
from pixclip_hf.evaluation.metrics.region_classification.class_accuracy import class_mean, label_hits
from pixclip_hf.evaluation.retrieval import rank_right_keys

FOLDER = Path(metrics.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory):
    """Metrics are copied into a modules cache: not into the user's own."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("modules")
    patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder))
    patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
    yield
    patch.undo()


def load(name, tmp_path):
    return evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path))


def test_retrieval_recall(tmp_path):
    metric = load("retrieval_recall", tmp_path)
    scores = [[0.9, 0.1, 0.5, 0.2], [0.8, 0.7, 0.6, 0.1], [0.3, 0.3, 0.3, 0.3]]
    # First right at once; right keys 1 and 3: rank 2; one right of four that tie.
    found = metric.compute(predictions=scores, references=[[0], [1, 3], [2]], ks=(1, 2, 3))
    assert found == pytest.approx(
        {"recall@1": (1 + 0 + 0.25) / 3, "recall@2": (1 + 1 + 0.5) / 3, "recall@3": 2.75 / 3, "median_rank": 2}
    )
    with pytest.raises(ValueError, match=r"`references\[0\]` must hold indices of the 4 keys"):
        metric.compute(predictions=scores[:1], references=[[4]])


def test_retrieval_recall_agrees_with_the_blocks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    keys[7] = keys[3]
    ids, own = torch.arange(20) % 10, torch.arange(30) % 10
    right = [(own == identity).nonzero()[:, 0].tolist() for identity in ids]
    scores = queries @ keys.T
    found = load("retrieval_recall", tmp_path).compute(predictions=scores.tolist(), references=right)
    ranks = rank_right_keys(queries, keys, ids, own, block=8)
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(ranks.hits(k).mean())


def test_region_classification(tmp_path):
    scores = np.eye(7)[[0, 0, 1, 2, 3]] + np.linspace(0, 0.06, 7)
    # Items take classes 0, 0, 1, 2, 3; the second is of 6, its second best, the fourth of 5, its third best.
    references = [0, 6, 1, 5, 3]
    found = load("region_classification", tmp_path).compute(predictions=scores.tolist(), references=references)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            "top5_accuracy": 1,
            "class_mean_accuracy": (1 + 0 + 1 + 0 + 1) / 5,
            "class_mean_top5_accuracy": 1,
        }
    )
    uneven = load("region_classification", tmp_path).compute(
        predictions=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], references=[0, 0, 0, 1]
    )
    assert uneven["accuracy"] == pytest.approx(2 / 4)
    assert uneven["class_mean_accuracy"] == pytest.approx((2 / 3 + 0) / 2)


def test_label_hits_of_equal_scores():
    scores = np.array([[0.5, 0.5, 0.1], [0.2, 0.2, 0.2]])
    assert label_hits(scores, np.array([0, 1]), 1) == pytest.approx([1 / 2, 1 / 3])
    assert label_hits(scores, np.array([2, 1]), 2) == pytest.approx([0, 2 / 3])
    assert label_hits(scores, np.array([2, 1]), 5) == pytest.approx([1, 1])


def test_class_mean_with_weights():
    hits, labels = np.array([1.0, 0, 1, 0]), np.array([0, 0, 2, 5])
    assert class_mean(hits, labels) == pytest.approx((0.5 + 1 + 0) / 3)
    assert class_mean(hits, labels, np.array([3.0, 1, 1, 0])) == pytest.approx((0.75 + 1) / 2)


def test_referring_accuracy(tmp_path):
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 4, 4]]
    right = [[[0, 0, 10, 5]], [[20, 20, 30, 30], [0, 0, 10, 9]], [[5, 5, 9, 9]]]
    found = load("referring_accuracy", tmp_path).compute(predictions=boxes, references=right)
    # An overlap of exactly one half is not above it.
    assert found == pytest.approx({"accuracy": 1 / 3, "mean_iou": (0.5 + 0.9 + 0) / 3})
    assert load("referring_accuracy", tmp_path).compute(predictions=boxes, references=right, threshold=0.4)[
        "accuracy"
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "folder", sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name[0] != "_")
)
def test_metrics_need_no_package(folder):
    """What lies in a metric's folder is enough, on the Hub too: `evaluate` copies the script and what it imports."""
    script = FOLDER / folder / f"{folder}.py"
    for path in script.parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"datasets", "evaluate", "numpy"}
            elif isinstance(node, ast.ImportFrom):
                # Only the script's own imports are followed.
                assert path == script and node.level == 1 and (script.parent / f"{node.module}.py").is_file()


def test_bootstrap_draws_whole_groups():
    values = np.array([1.0, 1, 1, 1, 0])

    def mean(weights):
        return float(np.average(values, weights=weights))

    low, high = bootstrap_interval(mean, np.array([7, 7, 7, 7, 3]), resamples=200)
    assert (low, high) == (0, 1)  # one of two groups is drawn alone in every fourth draw
    assert bootstrap_interval(mean, np.zeros(5), resamples=20) == pytest.approx((0.8, 0.8))
    # Too few groups for a bootstrap: the interval of a share says how little they tell.
    low, high = mean_interval(values, np.zeros(5))
    assert low < 0.2 and high > 0.95


def test_bootstrap_covers_the_mean_of_a_normal():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = mean_interval(values, np.arange(400))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_bad_input():
    assert np.isnan(mean_interval(np.ones(3), np.arange(3), resamples=0)).all()
    with pytest.raises(ValueError, match="at least one item"):
        mean_interval(np.ones(0), np.arange(0))
    with pytest.raises(ValueError, match=r"`level` must lie in \(0, 1\), got 1"):
        bootstrap_interval(np.sum, np.arange(3), level=1)
