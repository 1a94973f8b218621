"""Retrieval between two sets of embeddings, in blocks: memory does not grow with the product of their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .intervals import RESAMPLES, mean_interval
from .metrics.retrieval_recall.tied_ranks import expected_ranks, hit_chances

BLOCK = 2048
# Cosines closer than this are equal: products of the same rows in other blocks differ in their last bits.
TOLERANCE = 1e-6


@dataclass
class Ranks:
    """How the best right key of each query ranks; arrays `(Q,)` of int64.

    Args:
        greater: wrong keys that score higher.
        tied_wrong, tied_right: wrong and right keys of the same score, the best right one included.
    """

    greater: np.ndarray
    tied_wrong: np.ndarray
    tied_right: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        """Chance `(Q,)` that a right key is among the k nearest, over random orders of keys of equal score."""
        return hit_chances(self.greater, self.tied_wrong, self.tied_right, k)

    def expected(self) -> np.ndarray:
        """Mean rank `(Q,)` of the first right key over those orders, from 1 on."""
        return expected_ranks(self.greater, self.tied_wrong, self.tied_right)


def _check_rows(name: str, rows: Tensor, ids: Tensor) -> None:
    if not len(rows):
        raise ValueError(f"`{name}` must have at least one row, got none.")
    if len(ids) != len(rows):
        raise ValueError(f"`{name}` has {len(rows)} rows, but {len(ids)} identities belong to it.")


@torch.no_grad()
def rank_right_keys(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    block: int = BLOCK,
    progress: str | None = None,
) -> Ranks:
    """How each query ranks the best of its right keys: those with its identity.

    Two passes over blocks of `block` x `block` scores, the first for the best right score, the second for what is
    above it: the whole matrix never exists, twice its multiplications are the price.

    What is not a number is wrong: a query none of whose right keys has a finite score misses, and a wrong key whose
    score is NaN stands before all others.

    Args:
        queries (`(Q, D)`), keys (`(K, D)`): L2-normalized.
        query_ids (`(Q,)`), key_ids (`(K,)`): a key is right for a query of the same identity.
        block: rows and columns at a time.
        progress: what a progress bar says; none when None.

    Raises:
        ValueError: no rows, counts that differ, or a query without a right key.
    """
    _check_rows("queries", queries, query_ids)
    _check_rows("keys", keys, key_ids)
    query_ids, key_ids = query_ids.to(queries.device), key_ids.to(queries.device)
    counts = torch.zeros(3, len(queries), dtype=torch.long)
    starts = tqdm(range(0, len(queries), block), desc=progress, disable=progress is None, leave=False)
    for start in starts:
        rows, ids = queries[start : start + block].float(), query_ids[start : start + block, None]
        best = torch.full((len(rows), 1), -torch.inf, device=rows.device)
        has_right = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, own in zip(keys.split(block), key_ids.split(block), strict=True):
            scores, right = rows @ columns.to(rows).T, ids == own
            best = torch.maximum(best, scores.masked_fill_(~(right & scores.isfinite()), -torch.inf).amax(-1, True))
            has_right |= right.any(-1)
        if not has_right.all():
            missing = start + int((~has_right).nonzero()[0, 0])
            raise ValueError(f"`key_ids` must hold the identity of every query, query {missing} has no right key.")
        scored = best.isfinite()
        best.masked_fill_(~scored, 0)
        for columns, own in zip(keys.split(block), key_ids.split(block), strict=True):
            above = (rows @ columns.to(rows).T).sub_(best)
            above.masked_fill_(above.isnan(), torch.inf)
            right = ids == own
            tied = (above.abs() <= TOLERANCE) & scored
            # A query without a score ranks behind all keys.
            greater = torch.where(scored, (above > TOLERANCE) & ~right, True)
            counted = greater, tied & ~right, tied & right
            counts[:, start : start + len(rows)] += torch.stack([mask.sum(-1) for mask in counted]).cpu()
    return Ranks(*counts.numpy())


@torch.no_grad()
def nearest_keys(queries: Tensor, keys: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Scores and indices `(Q, k)` of the k best keys of each query, best first, the lower index first among equals. A
    score that is NaN counts as minus infinity.

    Args:
        queries (`(Q, D)`), keys (`(K, D)`), block: as in [`rank_right_keys`].
        k: at most K are returned.

    Raises:
        ValueError: no keys, or `k` below 1.
    """
    if not len(keys) or k < 1:
        raise ValueError(f"`k` must be at least 1 and `keys` have a row, got k={k} of {len(keys)} keys.")
    found = []
    for rows in queries.split(block):
        scores = rows.new_zeros(len(rows), 0, dtype=torch.float32)
        indices = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
        for start in range(0, len(keys), block):
            new = rows.float() @ keys[start : start + block].to(rows).float().T
            new.masked_fill_(new.isnan(), -torch.inf)
            own = torch.arange(start, start + new.shape[1], device=rows.device).expand(len(rows), -1)
            # Earlier keys stand in front, and a stable sort leaves them there among equals.
            order = torch.cat([scores, new], -1).sort(dim=-1, descending=True, stable=True)
            scores, chosen = order.values[:, :k], order.indices[:, :k]
            indices = torch.cat([indices, own], -1).gather(-1, chosen)
        found.append((scores, indices))
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def retrieval_recall(queries: Tensor, keys: Tensor, ids: Tensor, k: int = 1, chunk: int = 1024) -> tuple[float, float]:
    """Recall@k both ways between paired rows; rows with equal `ids` count as right for each other.

    Args:
        queries, keys (`(N, D)`): L2-normalized; row `i` of one belongs to row `i` of the other.
        ids (`(N,)`): identity of each pair's text.
        k: how many hits are looked at.
        chunk: rows and columns compared at a time.

    Returns:
        Share of the queries with a right key among their k nearest, and of the keys with a right query; equal scores
        count as if in random order.

    Raises:
        ValueError: no rows.
    """
    forth = rank_right_keys(queries, keys, ids, ids, chunk)
    back = rank_right_keys(keys, queries, ids, ids, chunk)
    return forth.hits(k).mean().item(), back.hits(k).mean().item()


def retrieval_measures(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    names: tuple[str, str] = ("image", "text"),
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    resamples: int = RESAMPLES,
    block: int = BLOCK,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Recall@k and median rank both ways.

    Args:
        images (`(N, D)`), texts (`(M, D)`): L2-normalized.
        image_ids (`(N,)`), text_ids (`(M,)`): a text is right for an image of the same identity.
        names: what the two are called, as in `image_to_text_recall@1`.
        groups: what the bootstrap draws, for each image and each text; the identities when None.
        ks: the k of recall@k.
        resamples: the number of resamples of the bootstrap.
        block: as in [`rank_right_keys`].

    Returns:
        The measures, with how many decisions they are of (`image_count`, `text_count`), and the 95 % intervals of the
        recalls.
    """
    measures, intervals = {}, {}
    if groups is None:
        groups = image_ids.numpy(), text_ids.numpy()
    sides = (images, image_ids, groups[0]), (texts, text_ids, groups[1])
    for (rows, ids, group), (others, other_ids, _), one, other in (
        (*sides, *names),
        (*sides[::-1], *names[::-1]),
    ):
        ranks = rank_right_keys(rows, others, ids, other_ids, block, progress=f"{one} to {other}")
        for k in ks:
            hits = ranks.hits(k)
            name = f"{one}_to_{other}_recall@{k}"
            measures[name] = float(hits.mean())
            intervals[name] = mean_interval(hits, group, resamples)
        measures[f"{one}_to_{other}_median_rank"] = float(np.median(ranks.expected()))
        measures[f"{one}_count"] = len(rows)
    return measures, intervals


def retrieval_chances(
    image_ids: Tensor,
    text_ids: Tensor,
    names: tuple[str, str] = ("image", "text"),
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """What a random order of the keys gives of the recalls of [`retrieval_measures`], whose arguments these are."""
    chances = {}
    sides = image_ids, text_ids
    for (own, others), (one, other) in ((sides, names), (sides[::-1], names[::-1])):
        keys, counts = np.unique(others.numpy(), return_counts=True)
        right = counts[np.searchsorted(keys, own.numpy())]
        for k in ks:
            # None of the k first is right: each of them is one of the wrong keys that are left.
            missed = np.ones(len(right))
            for drawn in range(min(k, len(others))):
                missed *= np.maximum(len(others) - right - drawn, 0) / (len(others) - drawn)
            chances[f"{one}_to_{other}_recall@{k}"] = float(1 - missed.mean())
    return chances


def text_identities(texts: Sequence[str]) -> Tensor:
    """One integer per text `(T,)`, equal for texts that are equal up to case and white space."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(" ".join(text.lower().split()), len(numbers)) for text in texts])
