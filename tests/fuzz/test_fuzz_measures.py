"""Measures of any scores: shares in [0, 1], ranks that exist, intervals that hold their estimate, no hit that is no
number."""

import numpy as np
import torch
from cases import fuzz
from hypothesis import strategies as st

from pixclip_hf.evaluation.intervals import class_mean_interval, mean_interval
from pixclip_hf.evaluation.metrics.referring_accuracy.box_overlap import pairwise_iou
from pixclip_hf.evaluation.metrics.region_classification.class_accuracy import class_mean, label_hits
from pixclip_hf.evaluation.metrics.retrieval_recall.tied_ranks import count_ranks, expected_ranks, hit_chances
from pixclip_hf.evaluation.retrieval import nearest_keys, rank_right_keys

scores = st.one_of(st.sampled_from([0.0, 0.5, 0.5, 1.0, np.nan, np.inf, -np.inf]), st.floats(-1, 1))


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(scores, min_size=rows * columns, max_size=rows * columns))
    return np.array(values).reshape(rows, columns), draw(st.integers(0, 2**32))


@fuzz(2000, case=matrices(), k=st.integers(1, 7))
def test_classes(case, k):
    values, seed = case
    labels = np.random.default_rng(seed).integers(0, values.shape[1], len(values))
    hits = label_hits(values, labels, k)
    assert ((hits >= 0) & (hits <= 1)).all()
    assert not hits[~np.isfinite(values[np.arange(len(labels)), labels])].any()
    # A class whose score is no number is never overtaken.
    wrong = np.isnan(values).sum(1)
    assert not hits[wrong >= k].any()
    mean, groups = class_mean(hits, labels), np.arange(len(labels))
    low, high = class_mean_interval(hits, labels, groups)
    assert 0 <= low <= mean <= high <= 1
    low, high = mean_interval(hits, groups)
    assert 0 <= low <= hits.mean() <= high <= 1


@fuzz(2000, case=matrices(), k=st.integers(1, 7))
def test_ranks(case, k):
    values, seed = case
    right = np.random.default_rng(seed).random(values.shape) < 0.4
    right[:, seed % values.shape[1]] = True
    counts = count_ranks(values, right, 1e-6)
    hits, ranks = hit_chances(*counts, k), expected_ranks(*counts)
    assert ((hits >= 0) & (hits <= 1)).all() and ((ranks >= 1) & (ranks <= values.shape[1] + 1)).all()
    none = ~(right & np.isfinite(values)).any(1)
    assert not hits[none].any() and (ranks[none] == values.shape[1] + 1).all()


@fuzz(2000, case=matrices(), k=st.integers(1, 3), block=st.integers(1, 4))
def test_retrieval(case, k, block):
    rows, seed = torch.from_numpy(case[0]).float(), case[1]
    keys = torch.from_numpy(np.random.default_rng(seed).permutation(case[0])).float()
    ids = torch.arange(len(rows))
    ranks = rank_right_keys(rows, keys, ids, ids, block)
    hits = ranks.hits(k)
    assert ((hits >= 0) & (hits <= 1)).all()
    assert not hits[~torch.isfinite((rows * keys).sum(-1)).numpy()].any()
    found, indices = nearest_keys(rows, keys, k, block)
    assert not found.isnan().any() and indices.max() < len(keys)


@fuzz(
    1500,
    boxes=st.lists(st.lists(st.one_of(scores, st.floats(-50, 50)), min_size=4, max_size=4), min_size=1, max_size=4),
)
def test_overlaps(boxes):
    overlaps = pairwise_iou(boxes, [[0, 0, 10, 10], [5, 5, 5, 9]])
    assert ((overlaps >= 0) & (overlaps <= 1)).all()
    assert not overlaps[~np.isfinite(boxes).all(1)].any()
