"""Geometry of regions on tensors: boxes and masks against the patch grid.

Boxes are xyxy in [0, 1] of the model's input image; a patch grid is counted (rows, columns), its patches row by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_centers(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centers (x, y) of the patches of a (rows, columns) grid: `(rows * columns, 2)` in [0, 1]."""
    rows, columns = grid
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1)


def mask_patch_weights(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that a mask covers.

    Args:
        masks (`(..., H, W)`): 1 inside the region.
        grid: (rows, columns) of patches, which divide H and W.

    Returns:
        `(..., rows * columns)` float32 in [0, 1]. A mask with any pixel has a weight above zero.
    """
    lead = masks.shape[:-2]
    weights = F.adaptive_avg_pool2d(masks.reshape(-1, 1, *masks.shape[-2:]).float(), grid)
    return weights.reshape(*lead, grid[0] * grid[1])


def box_coverage(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that a box covers, exactly.

    Args:
        boxes (`(..., 4)`): xyxy in [0, 1].
        grid: (rows, columns) of patches.

    Returns:
        `(..., rows * columns)` float32 in [0, 1].
    """
    rows, columns = grid
    boxes = boxes.float()
    shares = []
    for patches, low, high in ((rows, boxes[..., 1:2], boxes[..., 3:4]), (columns, boxes[..., 0:1], boxes[..., 2:3])):
        edges = torch.arange(patches, device=boxes.device, dtype=torch.float32)
        overlap = torch.minimum(high * patches, edges + 1) - torch.maximum(low * patches, edges)
        shares.append(overlap.clamp(0, 1))
    return (shares[0][..., :, None] * shares[1][..., None, :]).flatten(-2)


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks.

    Args:
        masks (`(..., H, W)`): non-zero inside the region.

    Returns:
        `(..., 4)` float32, xyxy in [0, 1]; zeros for an empty mask.
    """
    inside = masks != 0
    sides = []
    for present in (inside.any(-2), inside.any(-1)):
        places = torch.arange(present.shape[-1], device=masks.device)
        first = torch.where(present, places, present.shape[-1]).amin(-1)
        behind = torch.where(present, places + 1, 0).amax(-1)
        sides += [torch.minimum(first, behind).float() / present.shape[-1], behind.float() / present.shape[-1]]
    left, right, top, bottom = sides
    return torch.stack([left, top, right, bottom], dim=-1)


def boxes_around(boxes: Tensor) -> Tensor:
    """Each box, the one of 0.8 of its sides in it, and the box moved by 0.12 of its sides left, right, up and down,
    cut at the border of the image: `(..., 4)`, xyxy in [0, 1], to `(..., 6, 4)`."""
    corner, opposite = boxes.unflatten(-1, (2, 2)).unbind(-2)
    center, extent = (corner + opposite) / 2, opposite - corner
    moves = boxes.new_tensor([[0, 0], [0, 0], [-0.12, 0], [0.12, 0], [0, -0.12], [0, 0.12]])
    halves = boxes.new_tensor([0.5, 0.4, 0.5, 0.5, 0.5, 0.5])[:, None] * extent[..., None, :]
    centers = center[..., None, :] + moves * extent[..., None, :]
    return torch.cat([centers - halves, centers + halves], dim=-1).clamp(0, 1)


def weighted_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean of tokens `(B, N, D)` under weights `(B, R, N)`: `(B, R, D)` on the device of the tokens; zeros where all
    weights are zero."""
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return weights.to(tokens) @ tokens


def roi_align(tokens: Tensor, boxes: Tensor, grid: tuple[int, int], size: int = 7, samples: int = 2) -> Tensor:
    """RoIAlign (He et al. 2017, section 3): bilinear samples of a patch grid on a regular grid inside each box.

    Args:
        tokens (`(B, rows * columns, D)`): patch features, row by row.
        boxes (`(B, R, 4)`): xyxy in [0, 1].
        grid: (rows, columns).
        size: bins per side.
        samples: samples per side of each bin, which are averaged.

    Returns:
        `(B, R, size * size, D)`.
    """
    batch, regions = boxes.shape[:2]
    features = tokens.transpose(1, 2).reshape(batch, tokens.shape[-1], *grid)
    steps = (torch.arange(size * samples, device=boxes.device, dtype=torch.float32) + 0.5) / (size * samples)
    corner, extent = boxes[..., None, :2].float(), (boxes[..., 2:] - boxes[..., :2])[..., None, :].float()
    points = corner + steps[:, None] * extent  # (B, R, S, 2)
    shape = (batch, regions, len(steps), len(steps))
    positions = torch.stack(
        [points[:, :, None, :, 0].expand(shape), points[:, :, :, None, 1].expand(shape)], dim=-1
    ).reshape(batch, regions * len(steps), len(steps), 2)
    sampled = F.grid_sample(
        features, (positions * 2 - 1).to(features.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    width = tokens.shape[-1]
    sampled = sampled.reshape(batch, width, regions, size, samples, size, samples).mean((4, 6))
    return sampled.permute(0, 2, 3, 4, 1).reshape(batch, regions, size * size, width)


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Center and size `(..., 4)` to corners."""
    center, extent = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - extent / 2, center + extent / 2], dim=-1)


def _intersection_and_union(boxes: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.minimum(boxes[..., 2:], other[..., 2:]) - torch.maximum(boxes[..., :2], other[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (boxes, other)]
    return intersection, areas[0] + areas[1] - intersection


def box_iou(boxes: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes pair by pair: `(..., 4)` and `(..., 4)` to `(...)`; 0 for two empty boxes."""
    intersection, union = _intersection_and_union(boxes, other)
    return intersection / union.clamp(min=1e-9)


def generalized_box_iou(boxes: Tensor, other: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019) pair by pair, in [-1, 1]: `(..., 4)` and `(..., 4)` to `(...)`."""
    intersection, union = _intersection_and_union(boxes, other)
    extent = torch.maximum(boxes[..., 2:], other[..., 2:]) - torch.minimum(boxes[..., :2], other[..., :2])
    hull = extent.clamp(min=0).prod(-1).clamp(min=1e-9)
    return intersection / union.clamp(min=1e-9) - (hull - union) / hull
