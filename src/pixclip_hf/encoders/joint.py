"""Regions and whole images of a batch embedded together: prepared in workers, read by the model in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

Regions = Sequence[Mapping[str, Any]]


@dataclass
class PreparedBatch:
    """What a model takes for some images.

    Attributes:
        counts: the number of regions of each image.
        parts: for some of the images at a time their indices, each with at least one region, and the inputs of their
            regions.
        images: the inputs of all whole images; None where they are not asked for or come with the regions.
        joint: whether the inputs of the one part are those of all whole images too.
    """

    counts: list[int]
    parts: list[tuple[list[int], Any]]
    images: Any = None
    joint: bool = False

    def pin_memory(self) -> "PreparedBatch":
        """Moves all tensors to where a GPU fetches them from directly; a `DataLoader` calls it."""
        for inputs in [inputs for _, inputs in self.parts] + ([] if self.images is None else [self.images]):
            for name, value in inputs.items():
                if isinstance(value, torch.Tensor):
                    inputs[name] = value.pin_memory()
        return self


@dataclass
class Preparation:
    """Makes a [`PreparedBatch`]; picklable, for workers.

    Args:
        arguments: from the regions of each image to the arguments of `region_call`.
        region_call, image_call: what an encoder prepares with; None for what is not asked for.
        by_image: `region_call` takes one image at a time.
        shared: the inputs of regions serve whole images too.
    """

    arguments: Callable[[Sequence[Regions]], Mapping[str, Any]]
    region_call: Callable[..., Any] | None
    image_call: Callable[..., Any] | None
    by_image: bool
    shared: bool

    def __call__(self, images: Sequence[Image.Image], regions: Sequence[Regions]) -> PreparedBatch:
        """
        Args:
            images: RGB.
            regions: the regions of each image, with `box` and `mask`; none are read where only images are asked for.

        Raises:
            TypeError, ValueError: regions that the processor refuses.
        """
        if self.region_call is None:
            regions = [[] for _ in images]
        filled = [number for number, rows in enumerate(regions) if rows]
        joint = self.shared and self.image_call is not None and bool(filled)
        # In one go the images without regions are along, with nothing but padding.
        numbers = list(range(len(images))) if joint else filled
        groups = [[number] for number in numbers] if self.by_image else [numbers] if numbers else []
        parts = [
            (
                group,
                self.region_call(
                    images=[images[number] for number in group],
                    **self.arguments([regions[number] for number in group]),
                ),
            )
            for group in groups
            if self.region_call is not None
        ]
        whole = self.image_call(images=list(images)) if self.image_call is not None and not joint else None
        return PreparedBatch([len(rows) for rows in regions], parts, whole, joint)


def boxes_and_masks(regions: Sequence[Regions]) -> dict[str, Any]:
    """The arguments of a view, which looks at box and mask."""
    return {
        "boxes": [[region["box"] for region in rows] for rows in regions],
        "masks": [[region.get("mask") for region in rows] for rows in regions],
    }
