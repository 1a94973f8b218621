"""Recall of hand-made embeddings."""

import math

import pytest
import torch

from pixclip_hf.evaluation.report import markdown_table, share, standard_error
from pixclip_hf.evaluation.retrieval import retrieval_recall


def unit(*degrees):
    radians = torch.tensor([float(angle) for angle in degrees]).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def test_recall_both_ways():
    queries, keys = unit(0, 50, 100, 180), unit(10, 65, 60, 170)
    # 0 finds 10; 50 finds 60, which is the third's; 100 finds 65; 180 finds 170.
    # 10 finds 0; 65 finds 50, right for it; 60 finds 50; 170 finds 180.
    assert retrieval_recall(queries, keys, torch.arange(4)) == (2 / 4, 3 / 4)
    # The second's own key is its second; the third's, at 60, comes second behind 65.
    assert retrieval_recall(queries, keys, torch.arange(4), k=2) == (1, 1)


def test_equal_texts_are_right_for_each_other():
    queries, keys = unit(0, 50, 100, 180), unit(10, 65, 60, 170)
    assert retrieval_recall(queries, keys, torch.tensor([7, 8, 8, 9])) == (1, 1)
    same = unit(0, 120, 240, 30), unit(0, 120, 240, 0)
    ids = torch.tensor([-5, 2, 3, -5])
    assert retrieval_recall(*same, ids) == (1, 1)


def test_more_hits_than_rows():
    assert retrieval_recall(unit(0, 90), unit(90, 0), torch.arange(2), k=10) == (1, 1)
    assert retrieval_recall(unit(0, 90), unit(90, 0), torch.arange(2)) == (0, 0)


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(50, 4, generator=generator), dim=-1)
    queries = torch.nn.functional.normalize(keys + 0.7 * torch.randn(50, 4, generator=generator), dim=-1)
    ids = torch.arange(50) // 2
    for k in (1, 3):
        hits = [0, 0]
        for way, (rows, others) in enumerate(((queries, keys), (keys, queries))):
            for i in range(50):
                nearest = sorted(range(50), key=lambda j: -float(rows[i] @ others[j]))[:k]
                hits[way] += any(ids[j] == ids[i] for j in nearest)
        assert 5 < hits[0] < 45
        for chunk in (7, 1024):
            assert retrieval_recall(queries, keys, ids, k=k, chunk=chunk) == (hits[0] / 50, hits[1] / 50)


def test_no_rows():
    with pytest.raises(ValueError, match="`queries` must have at least one row"):
        retrieval_recall(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))


def test_report():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert math.isnan(standard_error(0.5, 0))
    assert share({"a": 0.82, "n": 400.0}, "a", "n") == "82.0 ± 1.9 % of 400"
    table = markdown_table(["what", "how much"], [["this", 1], ("that", 2.5)])
    assert table == "| what | how much |\n| --- | --- |\n| this | 1 |\n| that | 2.5 |"
