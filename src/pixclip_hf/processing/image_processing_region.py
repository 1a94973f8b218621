"""Image processor of PixCLIP and CLOC: places, resamples and normalizes images, and maps results back."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .processing_geometry import Geometry, clip_boxes
from .processing_images import load_images
from .processing_numbers import as_array, as_float64, most_pixels, read_whole, shown
from .processing_patches import cut_patches, patch_grid
from .processing_regions import is_list


class RegionImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    What a call may say about its images.

    Attributes:
        max_num_patches: the most patches of an image, for a tower of variable resolution; None for one size.
        patch_size: side of a patch in pixels, with `max_num_patches`.
    """

    max_num_patches: int | None
    patch_size: int | None


class RegionImageProcessor(PilBackend):
    """
    Image processor of PixCLIP and CLOC, on PIL.

    By default the whole image is resized to a square of `size`, nothing is cropped, and CLIP's mean and standard
    deviation normalize it. `size={"shortest_edge": n}` with `do_center_crop` gives CLIP's own preprocessing, `do_pad`
    pads below and on the right to `pad_size` or to the largest image of the batch. Every image is converted to RGB,
    unless `do_convert_rgb` is off: then `pixel_values` have the channels of the images, with a mean and a standard
    deviation for each. Canvas beyond the image is 0 in `pixel_values`, which after normalization is the mean color.

    With `max_num_patches` and `patch_size` images keep their aspect and become rows of patches, `(max_num_patches,
    3 * patch_size²)`, for a tower of variable resolution (SigLIP 2, NaFlex); `size` then says nothing.
    """

    valid_kwargs = RegionImagesKwargs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A registration is for the class that it names, as in `RegionTextProcessor`.
        cls._auto_class = None

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = False
    do_pad = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_num_patches = None
    patch_size = None
    model_input_names = ["pixel_values"]

    def _prepare_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        input_data_format: str | None = None,
        do_convert_rgb: bool | None = True,
        **kwargs: Any,
    ) -> list[Image.Image]:
        return load_images(images, input_data_format, do_convert_rgb)

    def read_image(self, image: Any) -> Image.Image:
        """One image, in any form that a call takes, as an RGB PIL image; errors as `load_images`."""
        return load_images([image])[0]

    def _preprocess(self, images: list[Image.Image], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        geometries = _geometries([(image.height, image.width) for image in images], **kwargs)
        data = {"pixel_values": _render(images, geometries, **kwargs), **_patch_inputs(geometries, **kwargs)}
        return BatchFeature(data, tensor_type=return_tensors)

    def get_geometries(self, image_sizes: list[tuple[int, int]], **kwargs: Any) -> list[Geometry]:
        """
        How each image of a batch maps to its processed image.

        Args:
            image_sizes: (height, width) of each image; with `do_pad` and no `pad_size`, of the whole batch.
            kwargs: as in a call, in place of the processor's own settings.

        Raises:
            ValueError: the settings give images of different sizes, or a `size` beside `max_num_patches`.
        """
        patches = kwargs.get("max_num_patches", self.max_num_patches)
        if kwargs.get("size") is not None and patches is not None:
            raise ValueError(
                f"size must be None for images that keep their aspect (max_num_patches={patches}), got "
                f"{kwargs['size']}"
            )
        return _geometries(image_sizes, **self._settings(**kwargs))

    def render(self, images: list[Image.Image], geometries: list[Geometry], **kwargs: Any) -> np.ndarray:
        """Resample images by their geometries (one output size) and normalize: (N, 3, H, W) float32, or as many
        channels as the images have."""
        return _render(images, geometries, **self._settings(**kwargs))

    def patch_inputs(self, geometries: list[Geometry], **kwargs: Any) -> dict[str, np.ndarray]:
        """What a tower of variable resolution takes beside the patches: `pixel_attention_mask` (N, max_num_patches),
        1 for patches that are there, and `spatial_shapes` (N, 2), rows and columns; nothing for other towers."""
        return _patch_inputs(geometries, **self._settings(**kwargs))

    def crop_size_of(self, geometries: list[Geometry], **kwargs: Any) -> tuple[int, int]:
        """(height, width) of crops around regions: that of the images or, where these differ, of the largest square of
        patches."""
        settings = self._settings(**kwargs)
        if settings["max_num_patches"] is None:
            return geometries[0].output_size
        side = math.isqrt(settings["max_num_patches"]) * settings["patch_size"]
        return side, side

    def _settings(self, **kwargs: Any) -> dict[str, Any]:
        for name in self._valid_kwargs_names:
            kwargs.setdefault(name, getattr(self, name, None))
        kwargs = self._standardize_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)
        return kwargs

    def post_process_boxes(self, boxes: Any, target_sizes: Any) -> list[torch.Tensor]:
        """
        Map boxes of the processed images back to the original images, clipped to them.

        Args:
            boxes: (B, R, 4) tensor, or one (R, 4) tensor per image: xyxy in [0, 1] of the processed image.
            target_sizes: (height, width) of each original image, in the order of the batch; list or (B, 2) tensor.

        Returns:
            One (R, 4) float32 tensor per image: xyxy in original pixels. Padding rows are mapped like any other.

        Raises:
            ValueError: the counts differ or a box tensor has another last dimension.
        """
        results = []
        for geometry, values in self._with_geometries(boxes, target_sizes, "boxes"):
            shares = as_float64(values, "boxes")
            if shares.ndim != 2 or shares.shape[-1] != 4:
                raise ValueError(f"boxes must have shape (R, 4) for each image, got {shares.shape}")
            height, width = geometry.output_size
            source = geometry.to_source(shares * np.array([width, height, width, height]))
            results.append(torch.from_numpy(clip_boxes(source, geometry.source_size)).float())
        return results

    def post_process_masks(self, masks: Any, target_sizes: Any) -> list[torch.Tensor]:
        """
        Map masks (or score maps) of the processed images back to the original images.

        Args:
            masks: (B, R, h, w) tensor, or one (R, h, w) tensor per image, of any dtype; h x w is a grid over the
                processed image, of its own resolution or coarser. With `max_num_patches`, masks as large as the image
                or larger are on the canvas of a batch, of which the image is the upper left corner.
            target_sizes: as in `post_process_boxes`.

        Returns:
            One (R, height, width) tensor per image, same dtype: each original pixel takes the cell that its center
            falls in, and 0 where a crop removed it.
        """
        results = []
        for geometry, values in self._with_geometries(masks, target_sizes, "masks"):
            if values.ndim != 3:
                raise ValueError(f"masks must have shape (R, h, w) for each image, got {tuple(values.shape)}")
            height, width = geometry.output_size
            if self.max_num_patches and values.shape[-2] >= height and values.shape[-1] >= width:
                values = values[:, :height, :width]
            cells = geometry.output_cells((values.shape[-2], values.shape[-1]))
            rows, columns = (torch.from_numpy(index).to(values.device) for index in cells)
            result = values[:, rows.clamp(min=0)][:, :, columns.clamp(min=0)]
            result[:, rows < 0] = 0
            result[:, :, columns < 0] = 0
            results.append(result)
        return results

    def _with_geometries(self, values: Any, target_sizes: Any, name: str) -> list[tuple[Geometry, torch.Tensor]]:
        if not is_list(values):
            raise TypeError(f"{name} must be a tensor, or a list with one for each image, got {shown(values)}")
        sizes = _target_sizes(target_sizes, len(values), name)
        tensors = (_as_tensor(value, f"{name}[{i}]") for i, value in enumerate(values))
        return list(zip(self.get_geometries(sizes), tensors, strict=True))


def _target_sizes(target_sizes: Any, number: int, name: str) -> list[tuple[int, int]]:
    rows = as_array(target_sizes, "target_sizes")
    if not len(rows.shape) or len(rows) != number or (number and rows.shape != (number, 2)):
        raise ValueError(
            f"target_sizes must hold a (height, width) for each of the {number} images of {name}, "
            f"got {shown(target_sizes)}"
        )
    sizes = []
    for i, row in enumerate(rows):
        sides = (int(side) if isinstance(side, np.floating) and side.is_integer() else side for side in row)
        height, width = (read_whole(side, f"target_sizes[{i}][{j}]", 1) for j, side in enumerate(sides))
        if height * width > most_pixels():
            raise ValueError(f"target_sizes[{i}] must be of at most {most_pixels()} pixels, got {height} x {width}")
        sizes.append((height, width))
    return sizes


def _as_tensor(values: Any, name: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor) and not values.is_meta:
        return values
    found = as_array(values, name)
    try:
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, got {shown(values)}: {error}") from error


def _geometries(image_sizes: list[tuple[int, int]], **settings: Any) -> list[Geometry]:
    placed = [_place(size, **settings) for size in image_sizes]
    canvases = [canvas for canvas, _ in placed]
    if settings["max_num_patches"] is not None:
        pass  # each image has a grid of its own
    elif settings["do_pad"]:
        pad = settings["pad_size"]
        target = (pad.height, pad.width) if pad else tuple(max(sides) for sides in zip(*canvases, strict=True))
        for i, canvas in enumerate(canvases):
            if canvas[0] > target[0] or canvas[1] > target[1]:
                raise ValueError(f"pad_size {target} is smaller than image {i} after resizing, {canvas}")
        _check_canvas(*target)
        canvases = [target] * len(canvases)
    elif len(set(canvases)) > 1:
        raise ValueError(
            f"the images come out in different sizes {sorted(set(canvases))}: give size a height and a width, or set "
            "do_center_crop or do_pad"
        )
    return [
        Geometry((height, width), canvas, (0, 0, width, height), box)
        for (height, width), canvas, (_, box) in zip(image_sizes, canvases, placed, strict=True)
    ]


def _place(
    image_size: tuple[int, int],
    do_resize: bool,
    size: Any,
    do_center_crop: bool,
    crop_size: Any,
    max_num_patches: int | None,
    patch_size: int | None,
    **kwargs: Any,
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Canvas size and the box that the whole image takes on it, by transformers' rules for resize and center crop."""
    height, width = image_size
    if max_num_patches is not None:
        if not patch_size or not do_resize or do_center_crop or kwargs["do_pad"]:
            raise ValueError(
                "max_num_patches needs a patch_size and do_resize, without do_center_crop and do_pad, got "
                f"patch_size={patch_size!r}, do_resize={do_resize}, do_center_crop={do_center_crop}, "
                f"do_pad={kwargs['do_pad']}"
            )
        rows, columns = patch_grid(image_size, patch_size, max_num_patches)
        height, width = rows * patch_size, columns * patch_size
        return (height, width), (0, 0, width, height)
    if do_resize and size.height and size.width:
        height, width = size.height, size.width
    elif do_resize and size.shortest_edge and not size.longest_edge:
        edge, short, long = size.shortest_edge, min(height, width), max(height, width)
        other = int(edge * long / short)
        height, width = (other, edge) if width <= height else (edge, other)
    elif do_resize:
        raise ValueError(f"size must have 'height' and 'width', or 'shortest_edge', got {dict(size)}")
    _check_canvas(height, width)
    if not do_center_crop:
        return (height, width), (0, 0, width, height)
    _check_canvas(crop_size.height, crop_size.width)
    top, left = (height - crop_size.height) // 2, (width - crop_size.width) // 2
    return (crop_size.height, crop_size.width), (-left, -top, width - left, height - top)


def _patch_inputs(
    geometries: list[Geometry], max_num_patches: int | None, patch_size: int | None, **kwargs: Any
) -> dict[str, np.ndarray]:
    if max_num_patches is None or patch_size is None:
        return {}
    shapes = np.array([geometry.output_size for geometry in geometries], dtype=np.int64) // patch_size
    there = np.arange(max_num_patches) < shapes.prod(1, keepdims=True)
    return {"pixel_attention_mask": there.astype(np.int64), "spatial_shapes": shapes}


def _check_canvas(height: int, width: int) -> None:
    """
    Raises:
        ValueError: an image would be resized, cropped or padded to no pixels, or to more than an image may have.
    """
    if min(height, width) < 1 or height * width > most_pixels():
        raise ValueError(
            f"size, crop_size and pad_size must give between 1 and {most_pixels()} pixels, got {height} x {width}"
        )


def _render(
    images: list[Image.Image],
    geometries: list[Geometry],
    max_num_patches: int | None,
    patch_size: int | None,
    **settings: Any,
) -> np.ndarray:
    if max_num_patches is None or patch_size is None:
        return _render_one_size(images, geometries, **settings)
    rendered = (
        _render_one_size([image], [geometry], **settings)[0]
        for image, geometry in zip(images, geometries, strict=True)
    )
    return np.stack([cut_patches(pixels, patch_size, max_num_patches) for pixels in rendered])


def _render_one_size(
    images: list[Image.Image],
    geometries: list[Geometry],
    resample: int,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **kwargs: Any,
) -> np.ndarray:
    channels = len(images[0].getbands())
    for i, image in enumerate(images):
        if len(image.getbands()) != channels:
            raise ValueError(
                f"image {i} has PIL mode {image.mode!r}, image 0 {images[0].mode!r}: the images of a batch must have "
                "the same number of channels, which do_convert_rgb=True gives them"
            )
    mean = _per_channel("image_mean", image_mean if do_normalize else 0, channels)
    std = _per_channel("image_std", image_std if do_normalize else 1, channels)
    scale = ((rescale_factor if do_rescale else 1) / std).astype(np.float32)[:, None, None]
    shift = (-mean / std).astype(np.float32)[:, None, None]
    height, width = geometries[0].output_size
    pixel_values = np.zeros((len(images), channels, height, width), dtype=np.float32)
    for canvas, image, geometry in zip(pixel_values, images, geometries, strict=True):
        part = _resample(image, geometry, resample)
        if part is None:
            continue
        pixels, (left, top) = part
        target = canvas[:, top : top + pixels.height, left : left + pixels.width]
        target[:] = np.asarray(pixels).reshape(pixels.height, pixels.width, channels).transpose(2, 0, 1)
        target *= scale
        target += shift
    return pixel_values


def _per_channel(name: str, values: Any, channels: int) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim > 1 or rows.size not in (1, channels):
        raise ValueError(f"{name} must hold one number, or one for each of the {channels} channels, got {values!r}")
    return np.broadcast_to(rows, channels)


def _resample(image: Image.Image, geometry: Geometry, resample: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """
    The part of the canvas that shows the image, and its upper left corner; None where no pixel center is on the image.

    Where an edge of the image falls inside a canvas pixel (only in crops around regions), it moves to that pixel's
    nearer edge: the content shifts by half a canvas pixel at most.
    """
    height, width = geometry.source_size
    source_box = clip_boxes(np.array(geometry.source_box), geometry.source_size)
    left, top, right, bottom = (int(value) for value in np.ceil(geometry.to_output(source_box) - 0.5))
    if right <= left or bottom <= top:
        return None
    box = clip_boxes(geometry.to_source(np.array([left, top, right, bottom])), geometry.source_size)
    resized_size = (right - left, bottom - top)
    if resized_size != image.size or tuple(box) != (0, 0, width, height):
        image = image.resize(resized_size, resample, box=tuple(box))
    canvas_height, canvas_width = geometry.output_size
    crop = (max(-left, 0), max(-top, 0), min(canvas_width - left, image.width), min(canvas_height - top, image.height))
    if crop != (0, 0, image.width, image.height):
        image = image.crop(crop)
    return image, (max(left, 0), max(top, 0))
