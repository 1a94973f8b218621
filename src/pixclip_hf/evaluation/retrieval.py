"""Retrieval between two sets of embeddings."""

import torch
from torch import Tensor


def retrieval_recall(queries: Tensor, keys: Tensor, ids: Tensor, k: int = 1, chunk: int = 1024) -> tuple[float, float]:
    """Recall@k both ways between paired rows; rows with equal `ids` count as right for each other.

    Args:
        queries, keys (`(N, D)`): L2-normalised; row `i` of one belongs to row `i` of the other.
        ids (`(N,)`): identity of each pair's text.
        k: how many hits are looked at.
        chunk: rows compared at a time.

    Returns:
        Share of the queries with a right key among their k nearest, and of the keys with a right query.

    Raises:
        ValueError: no rows.
    """
    if not len(queries):
        raise ValueError("`queries` must have at least one row, got none.")
    k = min(k, len(queries))

    def one_way(rows: Tensor, others: Tensor) -> float:
        hits = 0
        for start in range(0, len(rows), chunk):
            nearest = (rows[start : start + chunk] @ others.T).topk(k, dim=-1).indices
            hits += (ids[nearest] == ids[start : start + chunk, None]).any(-1).sum().item()
        return hits / len(rows)

    with torch.no_grad():
        return one_way(queries, keys), one_way(keys, queries)
