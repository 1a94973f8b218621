"""Images of any aspect as rows of patches, as SigLIP 2 of variable resolution (NaFlex) takes them."""

import math

import numpy as np

# Vision towers that take images of any aspect as rows of patches.
PATCH_TOWERS = ("siglip2_vision_model",)
# How finely the scale is searched, and the most that an image is enlarged.
SCALE_STEP, LARGEST_SCALE = 1e-5, 100.0


def patch_grid(size: tuple[int, int], patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """(rows, columns) of the largest grid of at most `max_num_patches` patches that an image of `size` (height, width)
    fills with its aspect kept, to the next whole patch on either side; as transformers' `Siglip2ImageProcessor` finds
    it."""

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in size)
        return rows, columns

    low, high = SCALE_STEP / 10, LARGEST_SCALE
    while high - low >= SCALE_STEP:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= max_num_patches else (low, middle)
    return grid(low)


def cut_patches(image: np.ndarray, patch_size: int, length: int) -> np.ndarray:
    """An image (C, H, W) as its patches, row by row: (length, patch² * C), the channels of a pixel side by side; zeros
    behind the last patch."""
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    cells = image.reshape(channels, rows, patch_size, columns, patch_size).transpose(1, 3, 2, 4, 0)
    patches = np.zeros((length, patch_size**2 * channels), dtype=image.dtype)
    patches[: rows * columns] = cells.reshape(rows * columns, -1)
    return patches


def on_one_canvas(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Masks (R_i, H_i, W_i) of several images at the size of the largest, zeros below and on the right."""
    height, width = (max(rows.shape[axis] for rows in masks) for axis in (1, 2))
    return [np.pad(rows, ((0, 0), (0, height - rows.shape[1]), (0, width - rows.shape[2]))) for rows in masks]
