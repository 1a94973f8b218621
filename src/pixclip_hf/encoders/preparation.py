"""From lists of images and their regions to what a processor makes of them, part by part, in workers or not."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..images import StoredImage, open_image

# What a bad input raises, and what is raised again with the number of its image.
_NAMED_ERRORS = (FileNotFoundError, OSError, TypeError, ValueError)


def as_images(images: Any) -> tuple[Sequence[Any], bool]:
    """A list of images, and whether `images` was one bare image.

    Raises:
        TypeError: neither an image nor a sequence.
    """
    one = isinstance(images, str | PathLike | Image.Image | Mapping | StoredImage)
    if one or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim != 4):
        return [images], True
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(f"`images` must be an image or a list of images, got {type(images).__name__}.")
    return images, False


class Parts(Sequence):
    """Some images with their regions at a time, taken from their lists when they are asked for.

    Args:
        images: all images.
        regions: name of an argument -> its value for each image.
        numbers: for each part the indices of its images.
    """

    def __init__(self, images: Sequence[Any], regions: Mapping[str, Sequence[Any]], numbers: Sequence[Sequence[int]]):
        self.images, self.regions, self.numbers = images, regions, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> tuple[Sequence[int], list[Any], dict[str, list[Any]]]:
        numbers = self.numbers[index]
        regions = {name: [values[number] for number in numbers] for name, values in self.regions.items()}
        return numbers, [self.images[number] for number in numbers], regions


def prepare_part(call: Callable[..., Any], part: tuple[Sequence[int], list[Any], dict[str, list[Any]]]) -> Any:
    """`call(images=[...], **regions)` of a part of [`Parts`], its images opened.

    Raises:
        OSError, TypeError, ValueError: as `call`; the message names the image by its index.
    """
    numbers, images, regions = part
    try:
        return call(images=[open_image(image) for image in images], **regions)
    except _NAMED_ERRORS:
        for position, number in enumerate(numbers):
            own = {name: values[position] for name, values in regions.items()}
            try:
                call(images=open_image(images[position]), **own)
            except _NAMED_ERRORS as error:
                kind = next(kind for kind in _NAMED_ERRORS if isinstance(error, kind))
                raise kind(f"image {number}: {error}") from error
        raise


def prepared(call: Callable[..., Any], parts: Parts, num_workers: int, show: bool, name: str) -> Iterator[Any]:
    """[`prepare_part`] of each part, in order.

    Args:
        call: see [`prepare_part`]; with workers that start as fresh processes ("spawn") it must be picklable.
        parts: what is prepared.
        num_workers: processes that open and prepare images ahead; 0 for none.
        show: whether to show a progress bar.
        name: what the bar says is encoded.
    """
    prepare = partial(prepare_part, call)
    loaded: Any = parts
    found: Iterable[Any]
    if num_workers:
        # A generator of its own: the loader would draw from the global one, which a training may be using.
        found = DataLoader(
            loaded, batch_size=None, num_workers=num_workers, collate_fn=prepare, generator=torch.Generator()
        )
    else:
        found = map(prepare, parts)
    return iter(tqdm(found, total=len(parts), desc=f"encoding {name}", disable=not show, leave=False))


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """`items` in parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
