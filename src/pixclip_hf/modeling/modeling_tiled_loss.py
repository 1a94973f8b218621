"""The contrastive loss in tiles: exact, forwards and backwards, without the matrix of all similarities."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_SIZE = 1024


class Negatives(NamedTuple):
    """Which of the `n` queries and `N` keys are no negatives of each other.

    Args:
        ids (`(n,)`), all_ids (`(N,)`): identities of the texts; equal ones are left out, the positive among them.
        valid (`(n,)` bool), all_valid (`(N,)` bool), *optional*: pairs with a padded row are left out.
        texts (`(n, D)`), all_texts (`(N, D)`), similarity_threshold: texts of a higher cosine are left out.
    """

    ids: Tensor
    all_ids: Tensor
    valid: Tensor | None
    all_valid: Tensor | None
    texts: Tensor
    all_texts: Tensor
    similarity_threshold: float | None

    def left_out(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """`(rows, columns)` bool: True for pairs that are no negatives."""
        left_out = self.ids[rows, None] == self.all_ids[None, columns]
        if self.valid is not None:
            left_out |= ~self.valid[rows, None]
        if self.all_valid is not None:
            left_out |= ~self.all_valid[None, columns]
        if self.similarity_threshold is not None:
            # Full precision also where a backward pass runs under autocast.
            with torch.autocast(left_out.device.type, enabled=False):
                left_out |= self.texts[rows] @ self.all_texts[columns].T > self.similarity_threshold
        return left_out


def product_tiles(queries: Tensor, keys: Tensor, tile_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and products of each tile of `queries @ keys.T`."""
    for row in range(0, len(queries), tile_size):
        rows = slice(row, row + tile_size)
        for column in range(0, len(keys), tile_size):
            columns = slice(column, column + tile_size)
            # Full precision also where a backward pass runs under autocast.
            with torch.autocast(queries.device.type, enabled=False):
                products = queries[rows] @ keys[columns].T
            yield rows, columns, products


class NegativesLogSumExp(torch.autograd.Function):
    """log-sum-exp of `queries @ keys.T` over the negatives, a tile at a time (as in Inf-CL, arXiv 2410.17243).

    The backward pass computes the tiles again. Beside its results and gradients it holds a few tiles.

    Args:
        queries (`(n, D)`), keys (`(N, D)`): float32 or float64; the temperature is in one of them.
        negatives: see [`Negatives`].
        tile_size: rows and columns of a tile.
        both: over the queries too; one computation of the products serves both directions.

    Returns:
        `(n,)` over the keys and, with `both`, `(N,)` over the queries, else None; -inf where there is no negative.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, negatives: Negatives, tile_size: int, both: bool
    ) -> tuple[Tensor, Tensor | None]:
        over_keys = queries.new_full((len(queries),), float("-inf"))
        over_queries = queries.new_full((len(keys),), float("-inf")) if both else None
        for rows, columns, logits in _tiles(queries, keys, negatives, tile_size):
            over_keys[rows] = torch.logaddexp(over_keys[rows], logits.logsumexp(1))
            if both:
                over_queries[columns] = torch.logaddexp(over_queries[columns], logits.logsumexp(0))
        ctx.save_for_backward(queries, keys, over_keys, over_queries)
        ctx.negatives, ctx.tile_size = negatives, tile_size
        return over_keys, over_queries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_over_keys: Tensor, grad_over_queries: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, over_keys, over_queries = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries) if ctx.needs_input_grad[0] else None
        grad_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        # Without a negative the weights are zero: exp(-inf - inf).
        over_keys = over_keys.masked_fill(over_keys == float("-inf"), float("inf"))
        if over_queries is not None:
            over_queries = over_queries.masked_fill(over_queries == float("-inf"), float("inf"))
        for rows, columns, logits in _tiles(queries, keys, ctx.negatives, ctx.tile_size):
            weights = torch.sub(logits, over_keys[rows, None]).exp_().mul_(grad_over_keys[rows, None])
            if over_queries is not None:
                weights.addcmul_(logits.sub_(over_queries[columns]).exp_(), grad_over_queries[None, columns])
            if grad_queries is not None:
                grad_queries[rows].addmm_(weights, keys[columns])
            if grad_keys is not None:
                grad_keys[columns].addmm_(weights.T, queries[rows])
        return grad_queries, grad_keys, None, None, None


def tiled_losses(
    embeds: Tensor,
    text_embeds: Tensor,
    all_embeds: Tensor,
    all_text_embeds: Tensor,
    logit_scale: Tensor,
    negatives: Negatives,
    tile_size: int,
) -> Tensor:
    """Symmetric InfoNCE of each row, `(n,)`: what [`contrastive_loss`] averages.

    Args:
        embeds, text_embeds (`(n, D)`), all_embeds, all_text_embeds (`(N, D)`): float32 or float64.
        logit_scale (scalar).
        negatives: see [`Negatives`].
        tile_size: rows and columns of a tile.
    """
    queries = logit_scale * embeds
    positives = (queries * text_embeds).sum(-1)
    if all_embeds is embeds and all_text_embeds is text_embeds:
        directions = NegativesLogSumExp.apply(queries, text_embeds, negatives, tile_size, True)
    else:
        directions = (
            NegativesLogSumExp.apply(queries, all_text_embeds, negatives, tile_size, False)[0],
            NegativesLogSumExp.apply(logit_scale * text_embeds, all_embeds, negatives, tile_size, False)[0],
        )
    # -log softmax of the positive. Beyond the threshold softplus is the identity in float64 too.
    over_texts, over_regions = (F.softplus(direction - positives, threshold=40) for direction in directions)
    return (over_texts + over_regions) / 2


def _tiles(
    queries: Tensor, keys: Tensor, negatives: Negatives, tile_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    for rows, columns, logits in product_tiles(queries, keys, tile_size):
        yield rows, columns, logits.masked_fill_(negatives.left_out(rows, columns), float("-inf"))
