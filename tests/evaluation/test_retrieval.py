"""Recall of hand-made embeddings."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixclip_hf.evaluation.report import markdown_table, share, standard_error
from pixclip_hf.evaluation.retrieval import (
    nearest_keys,
    rank_right_keys,
    retrieval_measures,
    retrieval_recall,
    text_identities,
)


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


def random_sets(queries, keys, identities, width=6):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=-1) for n in (queries, keys)]
    ids = [torch.randint(identities, (n,), generator=generator) for n in (queries, keys)]
    ids[1][:identities] = torch.arange(identities)  # every query has a right key
    return *rows, *ids


def test_ranks_are_those_of_a_sorted_matrix():
    queries, keys, query_ids, key_ids = random_sets(40, 90, 12)
    scores = queries @ keys.T
    expected = []
    for i in range(40):
        order = sorted(range(90), key=lambda j: -float(scores[i, j]))
        expected.append(1 + next(place for place, j in enumerate(order) if key_ids[j] == query_ids[i]))
    assert len(set(expected)) > 10
    for block in (7, 64, 2048):
        ranks = rank_right_keys(queries, keys, query_ids, key_ids, block=block)
        assert ranks.expected().tolist() == expected
        for k in (1, 5, 200):
            assert ranks.hits(k).tolist() == [float(rank <= k) for rank in expected]


def test_equal_scores_count_as_guessing():
    """All keys equal: a right one is among k of 8 at random; two of the eight are right for the first query."""
    same = unit(*[20] * 8)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    ranks = rank_right_keys(same[:1], same, ids[:1], ids)
    for k in (1, 2, 3, 7, 8, 20):
        draws = list(itertools.combinations(range(8), min(k, 8)))
        chance = sum(0 in draw or 1 in draw for draw in draws) / len(draws)
        assert ranks.hits(k)[0] == pytest.approx(chance)
    orders = list(itertools.permutations(range(5)))
    ranks = rank_right_keys(same[:1], same[:5], ids[:1], ids[:5])
    mean = sum(1 + min(order.index(0), order.index(1)) for order in orders) / len(orders)
    assert ranks.expected()[0] == pytest.approx(mean)
    # Behind one wrong key that is better, the tie is for what is left.
    keys = torch.cat([unit(0), same])
    ranks = rank_right_keys(unit(0), keys, torch.tensor([6]), torch.cat([torch.tensor([9]), ids]))
    assert ranks.hits(1)[0] == 0 and ranks.hits(2)[0] == pytest.approx(1 / 8)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def test_memory_does_not_grow_with_the_product_of_the_sizes():
    largest = {}
    for count in (1000, 2000):
        queries, keys, query_ids, key_ids = random_sets(count, count, 50, width=4)
        with LargestTensor() as watch:
            rank_right_keys(queries, keys, query_ids, key_ids, block=128)
            nearest_keys(queries, keys, 5, block=128)
        largest[count] = watch.numel
    # Nothing larger than a block beside the best five so far: twice the rows, the same tensors.
    assert 128 * 128 <= largest[1000] == largest[2000] <= 128 * (128 + 5)


def test_nearest_keys():
    queries, keys, *_ = random_sets(30, 70, 5)
    expected = (queries @ keys.T).topk(4)
    for block in (9, 2048):
        scores, indices = nearest_keys(queries, keys, 4, block=block)
        torch.testing.assert_close(scores, expected.values)
        assert torch.equal(indices, expected.indices)
    assert nearest_keys(unit(0), unit(5, 5, 5, 5), 3, block=2)[1].tolist() == [[0, 1, 2]]
    assert nearest_keys(unit(0), unit(5), 3)[1].tolist() == [[0]]
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        nearest_keys(unit(0), unit(5), 0)


def test_five_captions_an_image():
    """Image 0 finds its second caption; image 1 finds a caption of image 0 first and its own third."""
    images, image_ids = unit(0, 90), torch.tensor([0, 1])
    texts, text_ids = unit(40, 5, 86, 80, 130), torch.tensor([0, 0, 0, 1, 1])
    metrics, intervals = retrieval_measures(images, texts, image_ids, text_ids, ks=(1, 2), resamples=50)
    assert metrics == {
        "image_to_text_recall@1": 0.5,
        "image_to_text_recall@2": 1,
        "image_to_text_median_rank": 1.5,
        "image_count": 2,
        "text_to_image_recall@1": 4 / 5,
        "text_to_image_recall@2": 1,
        "text_to_image_median_rank": 1,
        "text_count": 5,
    }
    low, high = intervals["image_to_text_recall@1"]  # of two images
    assert 0 <= low < 0.15 and 0.85 < high <= 1
    low, high = intervals["text_to_image_recall@1"]
    assert 0.2 < low < 2 / 3 and 0.9 < high <= 1


def test_text_identities():
    ids = text_identities(["A red  disc", "a star", "a red disc ", "A star"])
    assert ids.tolist() == [0, 1, 0, 1]


def test_bad_rows():
    with pytest.raises(ValueError, match="query 1 has no right key"):
        rank_right_keys(unit(0, 1), unit(0, 1), torch.tensor([0, 5]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`keys` has 2 rows, but 1 identities"):
        rank_right_keys(unit(0), unit(0, 1), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        rank_right_keys(unit(0), unit(0), torch.tensor([0]), torch.tensor([0])).hits(0)
