"""Random Fourier features of points, boxes and masks on an image."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_regions import patch_centers


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Keeps matrix products in the precision of their inputs, where autocast would take them to half."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class FourierPositions(nn.Module):
    """Random Fourier features of points in [0, 1]² (Tancik et al. 2020), shared by patch centers and box corners."""

    frequencies: Tensor

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", torch.randn(2, width // 2) * scale)

    def forward(self, points: Tensor, extents: Tensor | None = None) -> Tensor:
        """(..., 2) to (..., width), float32: features of points, or their means over boxes of these extents around
        them."""
        frequencies = self.frequencies.float()
        # Not a matrix product, which autocast would take to half precision.
        angles = ((2 * points.float() - 1)[..., None] * frequencies).sum(-2) * (2 * math.pi)
        # Sine and cosine of a frequency side by side: a head's slice of them holds both.
        features = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        if extents is None:
            return features
        fall_off = torch.sinc(2 * extents[..., None] * frequencies).prod(-2)
        return features * fall_off.repeat_interleave(2, dim=-1)

    def over_boxes(self, boxes: Tensor) -> Tensor:
        """Mean of the features over each box, at the length of a point's: xyxy (..., 4) to (..., width), float32.

        Its product with a point's features is large inside the box and falls off around it.
        """
        corner, opposite = boxes.float().unflatten(-1, (2, 2)).unbind(-2)
        return self.as_point(self((corner + opposite) / 2, opposite - corner))

    def over_patches(self, coverage: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean of the features of the patch centers under coverage (..., N), at the length of a point's: (..., width),
        float32; zeros where nothing is covered."""
        centers = self(patch_centers(grid, coverage.device))
        with full_precision(coverage):
            return self.as_point(coverage.float().to(centers.device) @ centers)

    def as_point(self, means: Tensor) -> Tensor:
        """Means (..., width) of features at the length of a point's."""
        return F.normalize(means, dim=-1) * (means.shape[-1] / 2) ** 0.5
