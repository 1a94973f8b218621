"""Points as prompts of CLOC: which region slots have any, the soft mask of what lies under them, their encoding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_positions import full_precision
from .modeling_regions import box_coverage
from .modeling_slots import real_slots
from .modeling_text import ScaledLinear

# Labels of points: on the region, beside it, and padding.
POSITIVE, NEGATIVE, PADDING = 1, 0, -1
# The logit of a patch far from every point, to start with: 2 % of it belong to the region.
FAR = -4.0


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
    would reach beyond it: the weights of bilinear interpolation between patch centers.

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


def mean_of(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean (B, R, D) of the rows (B, R, P, D) where `chosen` (B, R, P); zeros where none is."""
    return torch.where(chosen[..., None], rows, 0).sum(-2) / chosen.sum(-1, keepdim=True).clamp(min=1)


class CLOCPointMask(nn.Module):
    """The soft mask of what lies under the points of a region, which then prompts as a given mask does.

    With the position φ_n and the content c_n of patch n, and the means φ and c of both over the positive points of
    region r, φ' and c' over its negative points (zeros where there are none), patch n belongs to the region by

        coverage_rn = sigmoid(b + ((Q φ - Q' φ') · K φ_n + (U c - U' c') · V c_n) / sqrt(d))

    Q, Q' and K start as multiples of the identity, U and U' at zero: a new soft mask lies around its positive points.
    How far an object reaches from there is learned from its texts alone.
    """

    def __init__(self, width: int):
        super().__init__()
        self.position_query, self.negative_position_query = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.content_query, self.negative_content_query = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.position_key = nn.Linear(width, width, bias=False)
        self.content_key = ScaledLinear(width, width, bias=False)
        self.bias = nn.Parameter(torch.tensor(FAR))

    @property
    def identities(self) -> list[Any]:
        """Projections that start as a multiple of the identity."""
        return [self.position_query, self.negative_position_query, self.position_key]

    @property
    def zeros(self) -> list[Any]:
        """Projections that start at zero."""
        return [self.content_query, self.negative_content_query]

    def forward(self, features: Tensor, under: Tensor, labels: Tensor, content: Tensor, positions: Tensor) -> Tensor:
        """Share of each patch that belongs to each region, `(B, R, N)` float32 in (0, 1).

        Args:
            features, under (`(B, R, P, D)`), labels (`(B, R, P)`): Fourier features of the points, the content at
                them, and their labels.
            content (`(B, N, D)`), positions (`(N, D)`): of the patches.
        """
        positive, negative = (
            [mean_of(rows, labels == kind).to(content.dtype) for rows in (features, under)]
            for kind in (POSITIVE, NEGATIVE)
        )
        by_position = self.position_query(positive[0]) - self.negative_position_query(negative[0])
        by_content = self.content_query(positive[1]) - self.negative_content_query(negative[1])
        by_position_key = self.position_key(positions.to(content.dtype))
        keys = [by_position_key.expand_as(content), self.content_key(content)]
        query, key = torch.cat([by_position, by_content], dim=-1).float(), torch.cat(keys, dim=-1).float()
        with full_precision(query):
            logits = query @ key.transpose(-1, -2) * content.shape[-1] ** -0.5
        return (logits + self.bias.float()).sigmoid()


class PointTypes(nn.Embedding):
    """Embeddings of negative and positive points, of the scale of Fourier features from the start."""


class CLOCPointPrompts(nn.Module):
    """What the points of a region say, encoded as in SAM (arXiv 2304.02643, appendix A), and what lies under them: the
    Fourier features of each point, a learned embedding of its type and the content at it, through two layers, averaged
    over the region's points."""

    def __init__(self, width: int):
        super().__init__()
        self.types = PointTypes(2, width)
        self.content_proj = ScaledLinear(width, width, bias=False)
        self.fc1 = ScaledLinear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, features: Tensor, under: Tensor, labels: Tensor) -> Tensor:
        """Fourier features (B, R, P, D) of points, the content (B, R, P, D) at them and their labels (B, R, P) to
        (B, R, D)."""
        encoded = features.to(under.dtype) + self.types(labels.clamp(min=0).long()) + self.content_proj(under)
        return mean_of(self.fc2(F.gelu(self.fc1(encoded))), labels != PADDING)
