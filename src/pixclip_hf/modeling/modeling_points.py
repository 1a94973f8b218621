"""Points as prompts of CLOC: which region slots have any, where they lie on the patch grid, and their encoding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_regions import box_coverage
from .modeling_slots import real_slots
from .modeling_text import ScaledLinear

# Labels of points: on the region, beside it, and padding.
POSITIVE, NEGATIVE, PADDING = 1, 0, -1


def point_slots(
    points: Tensor | None, labels: Tensor | None, attention_mask: Tensor | None, pixel_values: Tensor, alone: bool
) -> Tensor:
    """Which region slots are real: `(B, R)` bool, all of them without an `attention_mask`.

    Args:
        points (`(B, R, P, 2)`), labels (`(B, R, P)`): the batch's `region_points` and `region_point_labels`.
        attention_mask (`(B, R)`): 1 for real regions.
        pixel_values (`(B, 3, H, W)`).
        alone: whether nothing but points prompts, so that every real region needs some.

    Raises:
        ValueError: no points or no labels, shapes that do not fit each other, labels other than 1, 0 and -1, or a
            region without a positive point.
    """
    if points is None or labels is None:
        missing = "region_points" if points is None else "region_point_labels"
        raise ValueError(f"`{missing}` must be given to embed regions by points, got None.")
    real = real_slots("region_points", points, attention_mask, pixel_values, trailing=(*points.shape[2:-1], 2))
    if points.ndim != 4 or labels.shape != points.shape[:-1]:
        raise ValueError(
            f"`region_points` must have shape (B, R, P, 2) and `region_point_labels` (B, R, P), got "
            f"{tuple(points.shape)} and {tuple(labels.shape)}."
        )
    if ((labels < PADDING) | (labels > POSITIVE)).any():
        raise ValueError(f"`region_point_labels` must be 1, 0 or -1 (padding), got {labels.unique().tolist()}.")
    needs = real.to(labels.device)
    if not alone:
        needs = needs & has_points(labels)
    lacking = needs & ~(labels == POSITIVE).any(-1)
    if lacking.any():
        image, region = lacking.nonzero()[0].tolist()
        raise ValueError(
            f"`region_point_labels[{image}, {region}]` must hold a positive point (1), got "
            f"{labels[image, region].tolist()}."
        )
    return real


def has_points(labels: Tensor) -> Tensor:
    """Which regions have points: labels (B, R, P) to (B, R) bool."""
    return (labels != PADDING).any(-1)


def point_windows(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch inside a window of one patch's size around a point, which moves into the image where it
    would reach beyond it.

    Args:
        points (`(..., 2)`): xy in [0, 1].
        grid: (rows, columns) of patches.

    Returns:
        `(..., rows * columns)` float32 in [0, 1], of sum 1.
    """
    rows, columns = grid
    half = torch.tensor([0.5 / columns, 0.5 / rows], device=points.device)
    centers = torch.minimum(torch.maximum(points.float(), half), 1 - half)
    return box_coverage(torch.cat([centers - half, centers + half], dim=-1), grid)


def sum_of(rows: Tensor, chosen: Tensor) -> Tensor:
    """Sum (B, R, D) of the rows (B, R, P, D) where `chosen` (B, R, P)."""
    return torch.where(chosen[..., None], rows, 0).sum(-2)


def mean_of(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean (B, R, D) of the rows (B, R, P, D) where `chosen` (B, R, P); zeros where none is."""
    return sum_of(rows, chosen) / chosen.sum(-1, keepdim=True).clamp(min=1)


class PointTypes(nn.Embedding):
    """Embeddings of negative and positive points, of the scale of Fourier features from the start."""


class CLOCPointPrompts(nn.Module):
    """What the points of a region say, encoded as in SAM (arXiv 2304.02643, appendix A): the Fourier features of each
    point and a learned embedding of its type, through two layers, averaged over the region's points."""

    def __init__(self, width: int):
        super().__init__()
        self.types = PointTypes(2, width)
        self.fc1 = ScaledLinear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Fourier features (B, R, P, D) of points and their labels (B, R, P) to (B, R, D)."""
        encoded = features.to(self.fc1.weight.dtype) + self.types(labels.clamp(min=0).long())
        return mean_of(self.fc2(F.gelu(self.fc1(encoded))), labels != PADDING)
