"""The sigmoid loss of SigLIP: each pair is a decision by itself; in tiles, exact, forwards and backwards."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .modeling_tiled_loss import Negatives, product_tiles


class Pairs(NamedTuple):
    """What the `n` queries and `N` keys are to each other.

    Args:
        negatives: see [`Negatives`].
        offset: row `i` of the queries belongs to row `i + offset` of the keys.
        equal_texts_are_positive: whether pairs of equal identity are positive, or left out.
    """

    negatives: Negatives
    offset: int
    equal_texts_are_positive: bool

    def signs(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """`(rows, columns)`: 1 for positive pairs, -1 for negative ones, 0 for those that are left out."""
        ids, all_ids, valid, all_valid = self.negatives[:4]
        row = torch.arange(len(ids), device=ids.device)[rows, None] + self.offset
        positive = row == torch.arange(len(all_ids), device=ids.device)[None, columns]
        if self.equal_texts_are_positive:
            positive |= ids[rows, None] == all_ids[None, columns]
        if valid is not None:
            positive &= valid[rows, None]
        if all_valid is not None:
            positive &= all_valid[None, columns]
        negative = ~self.negatives.left_out(rows, columns) & ~positive
        return positive.to(dtype) - negative.to(dtype)


def plain_sigmoid_losses(queries: Tensor, keys: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
    """The loss of each query, the sum over its pairs, from one matrix; arguments as in [`tiled_sigmoid_losses`]."""
    signs = pairs.signs(queries.dtype)
    return -(F.logsigmoid(signs * (queries @ keys.T + bias)) * signs.abs()).sum(1)


def tiled_sigmoid_losses(queries: Tensor, keys: Tensor, bias: Tensor, pairs: Pairs, tile_size: int) -> Tensor:
    """The loss of each query, `(n,)`: the sum over its pairs of -log sigmoid(sign * logit).

    Args:
        queries (`(n, D)`), keys (`(N, D)`): float32 or float64; the temperature is in one of them.
        bias (scalar): of the logits.
        pairs: see [`Pairs`].
        tile_size: rows and columns of a tile.
    """
    return SigmoidOfPairs.apply(queries, keys, bias, pairs, tile_size)


class SigmoidOfPairs(torch.autograd.Function):
    """[`tiled_sigmoid_losses`]. The backward pass computes the tiles again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, bias: Tensor, pairs: Pairs, tile_size: int) -> Tensor:
        losses = queries.new_zeros(len(queries))
        for rows, _, logits, signs in _tiles(queries, keys, bias, pairs, tile_size):
            losses[rows] -= (F.logsigmoid(signs * logits) * signs.abs()).sum(1)
        ctx.save_for_backward(queries, keys, bias)
        ctx.pairs, ctx.tile_size = pairs, tile_size
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, bias = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries) if ctx.needs_input_grad[0] else None
        grad_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias)
        for rows, columns, logits, signs in _tiles(queries, keys, bias, ctx.pairs, ctx.tile_size):
            weights = torch.sigmoid(-signs * logits).mul_(-signs).mul_(grad_losses[rows, None])
            grad_bias += weights.sum()
            if grad_queries is not None:
                grad_queries[rows].addmm_(weights, keys[columns])
            if grad_keys is not None:
                grad_keys[columns].addmm_(weights.T, queries[rows])
        return grad_queries, grad_keys, grad_bias, None, None


def _tiles(
    queries: Tensor, keys: Tensor, bias: Tensor, pairs: Pairs, tile_size: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    for rows, columns, products in product_tiles(queries, keys, tile_size):
        yield rows, columns, products + bias, pairs.signs(queries.dtype, rows, columns)
