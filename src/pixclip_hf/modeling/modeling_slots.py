"""Region slots of a padded batch: which of them hold a region, and rows put into them."""

import torch
from torch import Tensor


def scatter(rows: Tensor, real: Tensor) -> Tensor:
    """Rows of the real regions `(n, D)` into their slots `(B, R, D)`, zeros elsewhere."""
    slots = rows.new_zeros(*real.shape, rows.shape[-1])
    slots[real.to(rows.device)] = rows
    return slots


def only_real(rows: Tensor, real: Tensor) -> Tensor:
    """Rows of region slots `(B, R, ...)`, zeros where no region is real `(B, R)`."""
    return rows * real.to(rows.device)[..., None]


def at_least_one(real: Tensor) -> Tensor:
    """`real`, or its first slot where no region is real: a tower then runs on every rank, and its parameters take part
    in every step of data parallelism. Multiply what comes out by `real`."""
    if real.any():
        return real
    first = torch.zeros_like(real)
    first[:1, :1] = True
    return first


def real_slots(
    name: str, regions: Tensor | None, attention_mask: Tensor | None, pixel_values: Tensor, trailing: tuple[int, ...]
) -> Tensor:
    """Which region slots are real: `(B, R)` bool, all of them without an `attention_mask`.

    Args:
        name: the name of the argument `regions`, for messages.
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


def slots_of(embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which slots of region embeddings `(B, R, D)` are real: `(B, R)` bool, all without an `attention_mask`."""
    if attention_mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return attention_mask.bool()
