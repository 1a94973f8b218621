"""Images of any aspect as rows of patches (SigLIP 2, NaFlex): the grid of each image, and masks cut up alike.

A batch holds the patches of each image row by row, `(B, N, 3 * patch²)`, filled up at the end; `pixel_attention_mask`
`(B, N)` is 1 for patches that are there, and `spatial_shapes` `(B, 2)` counts the rows and columns of each image.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def grids(spatial_shapes: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Each grid (rows, columns) that occurs in a batch, and the indices of its images, in the memory of the CPU."""
    # There the indices fit tensors on any device: parts of a model may lie on several.
    shapes, which = torch.unique(spatial_shapes.cpu(), dim=0, return_inverse=True)
    for number, (rows, columns) in enumerate(shapes.tolist()):
        yield (which == number).nonzero()[:, 0], (rows, columns)


def by_grid(spatial_shapes: Tensor, read: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """`read(images, grid)` for the images of each grid, together in the order of the batch."""
    groups = list(grids(spatial_shapes))
    parts = [read(images, grid) for images, grid in groups]
    order = torch.cat([images for images, _ in groups]).argsort()
    return torch.cat(parts)[order]


class ImageTokens(NamedTuple):
    """Patch tokens (B, N, D) of an image pass, as they leave the tower, and their grid; or, where images differ, the
    grid of each, (B, 2), with which N is filled up. `patch` is the side of a patch in pixels."""

    states: Tensor
    grid: tuple[int, int] | Tensor
    patch: int

    def per_grid(self, read: Callable[[Tensor, tuple[int, int], Any], Tensor]) -> Tensor:
        """`read(states, grid, images)` for the images of each grid, together in the order of the batch."""
        if not isinstance(self.grid, Tensor):
            return read(self.states, self.grid, slice(None))
        return by_grid(self.grid, lambda images, grid: read(self.states[images, : grid[0] * grid[1]], grid, images))

    def masks_on(self, images: Any, grid: tuple[int, int], masks: Tensor) -> Tensor:
        """The masks `(B, R, H, W)` of some images, which have this grid, as far as they lie on these."""
        return cut_masks(masks[images], grid, self.patch) if isinstance(self.grid, Tensor) else masks


def extent(spatial_shapes: Tensor, patch: int) -> tuple[int, int]:
    """(height, width) in pixels of the canvas that holds every image of a batch."""
    rows, columns = spatial_shapes.amax(0).tolist()
    return rows * patch, columns * patch


def cut_masks(masks: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The part of masks `(..., H, W)` that lies on images of this grid; what is behind it only fills up the batch."""
    return masks[..., : grid[0] * patch, : grid[1] * patch]


def patches_of_masks(masks: Tensor, spatial_shapes: Tensor, patch: int, length: int) -> Tensor:
    """Masks `(B, H, W)` in the layout of the pixels: `(B, length, patch²)`, zeros behind an image's last patch."""

    def read(images: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        cut = cut_masks(masks[images], grid, patch)
        cells = cut.reshape(-1, rows, patch, columns, patch).transpose(2, 3).reshape(-1, rows * columns, patch**2)
        return F.pad(cells, (0, 0, 0, length - rows * columns))

    return by_grid(spatial_shapes, read)


def scale_boxes(boxes: Tensor, spatial_shapes: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Boxes `(B, R, 4)` in [0, 1] of a canvas of `size` (height, width) as boxes in [0, 1] of each image on it."""
    sides = (spatial_shapes.to(boxes) * patch).flip(-1)
    canvas = boxes.new_tensor([size[1], size[0]])
    return boxes * (canvas / sides).repeat(1, 2)[:, None]


def check_patches(takes_patches: bool, model_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a tower takes beside the pixels, of the `pixel_attention_mask` and `spatial_shapes` that are given.

    Raises:
        ValueError: they are missing for a tower that takes patches, or given for one that takes images.
    """
    for name, value in given.items():
        if (value is not None) != takes_patches:
            expected = "given" if takes_patches else "None"
            raise ValueError(f"`{name}` must be {expected} for a {model_type!r} tower.")
    return given if takes_patches else {}
