"""The contrastive loss of a rank's rows against those of all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .modeling_losses import contrastive_loss, sigmoid_loss

# A tensor's rows of all ranks, and the index of this rank's first row among them.
Gather = Callable[[Tensor], tuple[Tensor, int]]


def gathered_contrastive_loss(
    embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    ids: Tensor,
    valid: Tensor | None = None,
    similarity_threshold: float | None = None,
    gather: Gather | None = None,
    ranks: int = 1,
    tile_size: int | None = None,
    logit_bias: Tensor | None = None,
    equal_texts: str = "left_out",
) -> Tensor:
    """[`contrastive_loss`] of this rank's rows against the rows of all ranks, or, with a `logit_bias`,
    [`sigmoid_loss`]; on the device of `embeds`."""
    text_embeds, logit_scale, ids = (part.to(embeds.device) for part in (text_embeds, logit_scale, ids))
    if valid is None:
        valid = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
    valid = valid.to(embeds.device)
    options: dict[str, Any] = {
        "ids": ids,
        "valid": valid,
        "similarity_threshold": similarity_threshold,
        "tile_size": tile_size,
    }
    if gather is not None:
        options["all_text_embeds"], offset = gather(text_embeds)
        all_valid = gather(valid)[0]
        options |= {
            "all_ids": gather(ids)[0],
            "all_valid": all_valid,
            "offset": offset,
            "normalizer": all_valid.sum() / ranks,
        }
    if logit_bias is not None:
        bias = logit_bias.to(embeds.device)
        return sigmoid_loss(embeds, text_embeds, logit_scale, bias, equal_texts=equal_texts, **options)
    if gather is not None:
        options["all_embeds"] = gather(embeds)[0]
    return contrastive_loss(embeds, text_embeds, logit_scale, **options)


def rows_per_rank(valid: Tensor, gather: Gather | None, ranks: int) -> Tensor:
    """What a rank's sum over its valid rows is divided by, so that the ranks' mean is the mean over all valid rows."""
    if gather is not None:
        valid, _ = gather(valid)
    return valid.sum() / ranks
