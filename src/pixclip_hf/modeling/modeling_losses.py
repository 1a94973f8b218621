"""Losses of both models: pure functions of tensors.

None of them communicates. Under data parallelism the caller gathers the other side over the ranks and passes it with
the `offset` of its own rows and the `normalizer`; with gradients flowing through the gather, the mean of the ranks'
losses is then the loss of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_regions import generalized_box_iou
from .modeling_sigmoid_loss import Pairs, plain_sigmoid_losses, tiled_sigmoid_losses
from .modeling_tiled_loss import TILE_SIZE, Negatives, tiled_losses

# Pairs from which on the loss is computed in tiles unless told: below, one matrix is faster and small enough.
TILED_FROM_PAIRS = 4096 * 4096


def text_ids(values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """64-bit identities of texts, equal for equal texts: what takes a text's duplicates out of its negatives.

    Args:
        values (`(N, L)`): token ids, or pooled text states of any floating type.
        attention_mask (`(N, L)`, *optional*): 1 for real tokens; padding on either side does not change the identity.

    Returns:
        `(N,)` int64.
    """
    if values.is_floating_point():
        values = values.detach().float().contiguous().view(torch.int32)
    values = values.long()
    if attention_mask is None:
        position = torch.arange(1, values.shape[1] + 1, device=values.device).expand_as(values)
        real = torch.ones_like(values)
    else:
        real = attention_mask.long()
        position = real.cumsum(-1)
    # Multiplications wrap around in int64; the shifts bring the high bits down, so that nearby inputs do not collide.
    key = position * 0x1E3779B97F4A7C15
    key = (key ^ (key >> 29)) * 0x3F58476D1CE4E5B9
    term = (values + 1) * (key | 1)
    term = (term ^ (term >> 31)) * 0x14D049BB133111EB
    return (term * real).sum(-1)


def contrastive_loss(
    embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    similarity_threshold: float | None = None,
    all_embeds: Tensor | None = None,
    all_text_embeds: Tensor | None = None,
    all_ids: Tensor | None = None,
    all_valid: Tensor | None = None,
    offset: int = 0,
    normalizer: float | Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE between images or regions and their texts, with false negatives taken out (CLOC, section 3.2).

    Row `i` of `embeds` belongs to row `i` of `text_embeds`. A pair `(i, j)` with `i != j` is left out of both
    directions when text `j` is the same text as `i` (equal `ids`), when their cosine similarity lies above
    `similarity_threshold`, or when row `j` is padding.

    Args:
        embeds, text_embeds (`(n, D)`): L2-normalized, the rows of this rank.
        logit_scale (scalar): inverse temperature.
        ids (`(n,)` int, *optional*): identities of the texts, see [`text_ids`].
        valid (`(n,)` bool, *optional*): False for padded rows.
        similarity_threshold (`float`, *optional*): texts with a cosine similarity above it are no negatives.
        all_embeds, all_text_embeds (`(N, D)`), all_ids, all_valid (`(N,)`), *optional*: the rows of every rank.
        offset (`int`): index of this rank's first row among all rows.
        normalizer (`float`, *optional*): what the sum over the rows is divided by; their number when not given.
            Under data parallelism: the number of all valid rows divided by the number of ranks.
        tile_size (`int`, *optional*): computes the same loss in tiles with this many rows and columns, forward and
            backward, so that no `(n, N)` matrix is held; 0 computes one matrix. When not given, tiles are used where
            there are many pairs.

    Returns:
        Scalar; 0 (with a graph) when there is no valid row.
    """
    rows = len(embeds)
    all_embeds = embeds if all_embeds is None else all_embeds
    all_text_embeds = text_embeds if all_text_embeds is None else all_text_embeds
    tile_size = _tile_size(tile_size, rows * len(all_embeds))

    # Full precision also under autocast: the scale would amplify the rounding of half-precision similarities.
    one_side = all_embeds is embeds and all_text_embeds is text_embeds
    embeds, text_embeds = _at_least_float32(embeds), _at_least_float32(text_embeds)
    if one_side:
        all_embeds, all_text_embeds = embeds, text_embeds
    else:
        all_embeds, all_text_embeds = _at_least_float32(all_embeds), _at_least_float32(all_text_embeds)
    negatives = _negatives(text_embeds, all_text_embeds, ids, all_ids, valid, all_valid, similarity_threshold, offset)
    sides = (embeds, text_embeds, all_embeds, all_text_embeds)
    with torch.autocast(embeds.device.type, enabled=False):
        if tile_size:
            losses = _outside_of_compiled_graphs(tiled_losses)(*sides, logit_scale, negatives, tile_size)
        else:
            losses = _plain_losses(*sides, logit_scale, negatives, offset)
    if valid is not None:
        losses = torch.where(valid, losses, 0)
    return _mean_of_rows(losses, valid, normalizer)


def sigmoid_loss(
    embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    equal_texts: str = "left_out",
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    similarity_threshold: float | None = None,
    all_text_embeds: Tensor | None = None,
    all_ids: Tensor | None = None,
    all_valid: Tensor | None = None,
    offset: int = 0,
    normalizer: float | Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Sigmoid loss between images or regions and texts (SigLIP, arXiv 2303.15343): -log sigmoid(logit) of each pair
    that belongs together, -log sigmoid(-logit) of each that does not, where logit = `logit_scale` * cosine +
    `logit_bias`; summed over the pairs and divided by the number of rows.

    Args:
        embeds, text_embeds, logit_scale, valid, offset, normalizer, tile_size: as in [`contrastive_loss`].
        logit_bias (scalar).
        equal_texts: whether row `i` and a text `j != i` with equal `ids` are a `"positive"` pair, or `"left_out"`.
        ids, similarity_threshold: as in [`contrastive_loss`]; equal texts that are positive have no threshold.
        all_text_embeds (`(N, D)`), all_ids, all_valid (`(N,)`), *optional*: the texts of every rank. Each rank sums
            over its own rows and all texts, so that together they sum over all pairs.

    Returns:
        Scalar; 0 (with a graph) when there is no valid row.
    """
    all_text_embeds = text_embeds if all_text_embeds is None else all_text_embeds
    tile_size = _tile_size(tile_size, len(embeds) * len(all_text_embeds))

    # Full precision also under autocast, as in `contrastive_loss`.
    embeds, text_embeds = _at_least_float32(embeds), _at_least_float32(text_embeds)
    all_text_embeds = _at_least_float32(all_text_embeds)
    negatives = _negatives(text_embeds, all_text_embeds, ids, all_ids, valid, all_valid, similarity_threshold, offset)
    pairs = Pairs(negatives, offset, equal_texts == "positive")
    with torch.autocast(embeds.device.type, enabled=False):
        queries, bias = logit_scale * embeds, logit_bias.to(embeds.dtype)
        if tile_size:
            losses = _outside_of_compiled_graphs(tiled_sigmoid_losses)(
                queries, all_text_embeds, bias, pairs, tile_size
            )
        else:
            losses = plain_sigmoid_losses(queries, all_text_embeds, bias, pairs)
    return _mean_of_rows(losses, valid, normalizer)


def grounding_losses(
    pred_boxes: Tensor,
    boxes: Tensor,
    valid: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L1 and generalized-IoU losses of predicted boxes (the grounding loss of CLOC, section 3.2; its form is
    reconstructed).

    Args:
        pred_boxes, boxes (`(..., 4)`): xyxy in [0, 1].
        valid (`(...)` bool, *optional*): False for padded boxes.
        normalizer (`float`, *optional*): as in [`contrastive_loss`].

    Returns:
        Two scalars: the mean over boxes of the L1 distance summed over the coordinates, and of 1 - GIoU.
    """
    if valid is None:
        valid = torch.ones(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    # Padded boxes have no area: a whole-image box in their place keeps their (unused) GIoU and its gradient finite.
    boxes = torch.where(valid[..., None], boxes.float(), boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).float())
    pred_boxes = pred_boxes.float()
    l1 = torch.where(valid, (pred_boxes - boxes).abs().sum(-1), 0)
    giou = torch.where(valid, 1 - generalized_box_iou(pred_boxes, boxes), 0)
    return _mean_of_rows(l1, valid, normalizer), _mean_of_rows(giou, valid, normalizer)


def local_global_loss(
    pooled_embeds: Tensor,
    crop_embeds: Tensor,
    valid: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """1 - cosine between a region's pooled patch features in the full image and the embedding of its crop; no gradient
    flows into the crop side (third branch of PixCLIP, reconstructed).

    Args:
        pooled_embeds, crop_embeds (`(..., D)`): L2-normalized.
        valid (`(...)` bool, *optional*): False for padded regions.
        normalizer (`float`, *optional*): as in [`contrastive_loss`].

    Returns:
        Scalar.
    """
    distances = 1 - (pooled_embeds * crop_embeds.detach()).sum(-1).float()
    if valid is None:
        valid = torch.ones_like(distances, dtype=torch.bool)
    return _mean_of_rows(torch.where(valid, distances, 0), valid, normalizer)


def _plain_losses(
    embeds: Tensor,
    text_embeds: Tensor,
    all_embeds: Tensor,
    all_text_embeds: Tensor,
    logit_scale: Tensor,
    negatives: Negatives,
    offset: int,
) -> Tensor:
    rows = torch.arange(len(embeds), device=embeds.device)
    left_out = negatives.left_out()
    # The positive always stays, so that no row (not even a padded one) is empty.
    left_out[rows, rows + offset] = False
    directions = []
    for queries, keys in ((embeds, all_text_embeds), (text_embeds, all_embeds)):
        logits = (logit_scale * (queries @ keys.T)).masked_fill(left_out, float("-inf"))
        directions.append(F.cross_entropy(logits, rows + offset, reduction="none") / 2)
    return directions[0] + directions[1]


def _negatives(
    texts: Tensor,
    all_texts: Tensor,
    ids: Tensor | None,
    all_ids: Tensor | None,
    valid: Tensor | None,
    all_valid: Tensor | None,
    similarity_threshold: float | None,
    offset: int,
) -> Negatives:
    """Texts without identities are each their own; what is not gathered is that of this rank."""
    all_ids = ids if all_ids is None else all_ids
    all_valid = valid if all_valid is None else all_valid
    if all_ids is None:
        all_ids = torch.arange(len(all_texts), device=texts.device)
        ids = all_ids[offset : offset + len(texts)]
    return Negatives(ids, all_ids, valid, all_valid, texts.detach(), all_texts.detach(), similarity_threshold)


def _tile_size(tile_size: int | None, pairs: int) -> int:
    if tile_size is None:
        return TILE_SIZE if pairs >= TILED_FROM_PAIRS else 0
    return tile_size


def _mean_of_rows(losses: Tensor, valid: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    if normalizer is None:
        normalizer = len(losses) if valid is None else valid.sum()
    return losses.sum() / _at_least_one(normalizer)


def _outside_of_compiled_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Tracing would unroll the tiles. Not a decorator: it would import the compiler with the package.
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _at_least_one(count: float | Tensor) -> float | Tensor:
    # A share of all rows per rank may lie below one; only nothing at all must not divide.
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, 1)
    return count if count > 0 else 1
