"""What both models do with a batch: checks of its shapes, region texts, and losses over the rows of all ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import TransformersKwargs

from .modeling_losses import contrastive_loss, text_ids

Gather = Callable[[Tensor], tuple[Tensor, int]]

TOWER_ARGUMENTS = {*TransformersKwargs.__annotations__, "interpolate_pos_encoding", "return_dict"}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses what no tower takes: towers swallow any keyword, and a misspelt argument would go unnoticed.

    Raises:
        TypeError: an argument that neither the model nor its towers know.
    """
    if unknown := sorted(set(kwargs) - TOWER_ARGUMENTS):
        raise TypeError(f"Unknown arguments: {', '.join(unknown)}.")


def unit(embeds: Tensor) -> Tensor:
    """L2-normalised along the last dimension; zeros stay zeros in every precision."""
    return F.normalize(embeds, dim=-1, eps=torch.finfo(embeds.dtype).tiny)


def scatter(rows: Tensor, real: Tensor) -> Tensor:
    """Rows of the real regions `(n, D)` into their slots `(B, R, D)`, zeros elsewhere."""
    slots = rows.new_zeros(*real.shape, rows.shape[-1])
    slots[real] = rows
    return slots


def at_least_one(real: Tensor) -> Tensor:
    """`real`, or its first slot where no region is real: a tower then runs on every rank, and its parameters take part
    in every step of data parallelism. Multiply what comes out by `real`."""
    if real.any():
        return real
    first = torch.zeros_like(real)
    first[:1, :1] = True
    return first


def region_mask(
    name: str, regions: Tensor | None, attention_mask: Tensor | None, pixel_values: Tensor, trailing: tuple[int, ...]
) -> Tensor:
    """Which region slots are real: `(B, R)` bool, all of them without an `attention_mask`.

    Args:
        name: of the argument `regions`, for messages.
        regions (`(B, R, *trailing)`): boxes or masks.
        attention_mask (`(B, R)`): 1 for real regions.
        pixel_values (`(B, 3, H, W)`).
        trailing: what `regions` must have behind its first two dimensions.

    Raises:
        ValueError: no regions, or shapes that do not fit each other.
    """
    if regions is None:
        raise ValueError(f"`{name}` must be given to embed regions, got None.")
    # Not `len`, which an export takes for a constant.
    images = pixel_values.shape[0]
    if regions.ndim != 2 + len(trailing) or regions.shape[2:] != trailing or regions.shape[0] != images:
        expected = ", ".join(map(str, (images, "R", *trailing)))
        raise ValueError(f"`{name}` must have shape ({expected}), got {tuple(regions.shape)}.")
    if attention_mask is None:
        return torch.ones(regions.shape[:2], dtype=torch.bool, device=regions.device)
    if attention_mask.shape != regions.shape[:2]:
        raise ValueError(
            f"`region_attention_mask` must have shape {tuple(regions.shape[:2])} as `{name}`, "
            f"got {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def region_text_features(
    model: Any,
    real: Tensor,
    region_input_ids: Tensor | None,
    region_text_attention_mask: Tensor | None,
    region_text_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalised embeddings `(B, R, D)` and identities `(B, R)` of the region texts; zeros in padded slots, which
    never reach the text tower.

    Args:
        real (`(B, R)` bool): see [`region_mask`].
        region_input_ids, region_text_attention_mask (`(B, R, L)`), region_text_states (`(B, R, D_text)`): the texts.

    Raises:
        ValueError: tokens and states at once, texts for another number of regions, or a real region whose text is all
            padding.
    """
    if region_input_ids is not None and region_text_states is not None:
        raise ValueError("One of `region_input_ids` and `region_text_states` must be given, got both.")
    name = "region_text_states" if region_input_ids is None else "region_input_ids"
    texts = region_text_states if region_input_ids is None else region_input_ids
    if texts.shape[:2] != real.shape:
        raise ValueError(
            f"`{name}` must hold one text a region, shape ({', '.join(map(str, real.shape))}, …), "
            f"got {tuple(texts.shape)}."
        )
    rows = at_least_one(real)
    if not rows.any():
        empty = texts.new_zeros(*real.shape, dtype=torch.long)
        return empty[..., None].expand(*real.shape, model.config.projection_dim).to(model.dtype), empty
    if region_input_ids is None:
        ids = text_ids(texts[rows])
        states = model.get_text_features(text_states=texts[rows], return_dict=True).pooler_output
    else:
        mask = torch.ones_like(texts) if region_text_attention_mask is None else region_text_attention_mask
        if not mask[real].any(-1).all():
            raise ValueError("`region_text_attention_mask` marks the text of a real region as all padding.")
        mask = mask[rows] if rows is real else torch.ones_like(texts[rows])
        ids = text_ids(texts[rows], mask)
        states = model.get_text_features(texts[rows], mask, return_dict=True).pooler_output
    embeds = scatter(unit(states), rows) * real[..., None]
    return embeds, scatter(ids[:, None], rows)[..., 0] * real


def wants_loss(
    return_loss: bool | None, pixel_values: Tensor, texts: Tensor | None, region_texts: Tensor | None
) -> bool:
    """Whether to compute the loss: as asked, or when there are region texts.

    Args:
        return_loss: what the caller asked for.
        texts, region_texts: token ids or states of the image captions and of the region texts.

    Raises:
        ValueError: a loss is asked for without any texts, or the texts are not one caption an image.
    """
    if return_loss is None:
        return_loss = region_texts is not None
    if not return_loss:
        return False
    if region_texts is None and texts is None:
        raise ValueError(
            "`return_loss=True` needs texts: `region_input_ids` or `region_text_states` with their regions, or "
            "`input_ids` or `text_states` with one caption an image."
        )
    if texts is not None and len(texts) != len(pixel_values):
        raise ValueError(
            f"For the loss `input_ids` or `text_states` must hold one caption an image: got {len(texts)} texts for "
            f"{len(pixel_values)} images. Pass `return_loss=False` to compare with any texts."
        )
    return True


def real_slots(attention_mask: Tensor | None, embeds: Tensor) -> Tensor:
    """Which rows of flattened region embeddings `(B, R, D)` are real: `(B * R,)` bool."""
    if attention_mask is None:
        return torch.ones(embeds.shape[0] * embeds.shape[1], dtype=torch.bool, device=embeds.device)
    return attention_mask.bool().flatten()


def set_losses(output: Any, parts: dict[str, Tensor], weights: dict[str, float]) -> None:
    """Puts the parts of a loss and their weighted sum into a model's output."""
    if not parts:
        raise ValueError(
            f"No part of the loss can be computed: inputs are missing or their weight is 0, of {weights}."
        )
    output.loss_parts = parts
    output.loss = sum(weights[name] * part for name, part in parts.items())


def rows_per_rank(valid: Tensor, gather: Gather | None, ranks: int) -> Tensor:
    """What a rank's sum over its valid rows is divided by, so that the ranks' mean is the mean over all valid rows."""
    if gather is not None:
        valid, _ = gather(valid)
    return valid.sum() / ranks


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
) -> Tensor:
    """[`contrastive_loss`] of this rank's rows against the rows of all ranks."""
    if valid is None:
        valid = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
    over_ranks = {}
    if gather is not None:
        all_embeds, offset = gather(embeds)
        all_valid = gather(valid)[0]
        over_ranks = {
            "all_embeds": all_embeds,
            "all_text_embeds": gather(text_embeds)[0],
            "all_ids": gather(ids)[0],
            "all_valid": all_valid,
            "offset": offset,
            "normalizer": all_valid.sum() / ranks,
        }
    return contrastive_loss(
        embeds,
        text_embeds,
        logit_scale,
        ids=ids,
        valid=valid,
        similarity_threshold=similarity_threshold,
        tile_size=tile_size,
        **over_ranks,
    )
