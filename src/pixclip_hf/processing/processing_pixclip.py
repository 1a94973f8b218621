"""Processor of PixCLIP: images, region masks, crops around regions, and texts."""

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from .processing_geometry import Geometry, crop_geometry, sample_masks
from .processing_region_text import RegionTextProcessor, RegionTextProcessorKwargs
from .processing_regions import Regions, pad_regions

# Side of the square crop around a region, as a multiple of the longer side of its box.
CROP_SCALE = 1.5


class PixCLIPProcessorKwargs(RegionTextProcessorKwargs, total=False):  # type: ignore[call-arg]
    """
    What a call may say beside its images, texts and regions: see [`RegionTextProcessorKwargs`].

    Attributes:
        return_crops: add a square crop around each region, `crop_scale` x the longer side of its box, at the size of
            the processed image: `crop_pixel_values` (B, R, 3, H, W) float32 and `crop_masks` (B, R, H, W) bool. Beyond
            the image a crop is 0, the mean color.
    """

    return_crops: bool


class PixCLIPProcessor(RegionTextProcessor):
    """
    Image processor and tokenizer of PixCLIP in one. Masks prompt the model; boxes become rectangular masks.

    Args:
        image_processor, tokenizer, text_model_name, reads_padding, lowercase_texts: see [`RegionTextProcessor`].
        crop_scale: side of the square crop around a region, as a multiple of the longer side of its box, at least 1
            (branch 2 of PixCLIP, arXiv 2511.04601; 1.5 is reconstructed).
    """

    valid_processor_kwargs = PixCLIPProcessorKwargs
    prompts = ("mask",)
    has_crops = True
    return_crops: ClassVar[bool] = False

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any = None,
        text_model_name: str | None = None,
        crop_scale: float = CROP_SCALE,
        reads_padding: bool = False,
        lowercase_texts: bool = False,
    ):
        if not 1 <= crop_scale < float("inf"):
            raise ValueError(f"crop_scale must be a number of at least 1, got {crop_scale!r}")
        super().__init__(image_processor, tokenizer, text_model_name, reads_padding, lowercase_texts)
        self.crop_scale = crop_scale

    def _region_inputs(
        self,
        images: list[Image.Image],
        geometries: list[Geometry],
        regions: list[Regions],
        prompt: str,
        asked: dict[str, bool],
        settings: dict[str, Any],
    ) -> dict[str, np.ndarray]:
        data = super()._region_inputs(images, geometries, regions, prompt, asked, settings)
        if not asked["return_crops"]:
            return data
        size = self.image_processor.crop_size_of(geometries, **settings)
        sources, placed, cut = [], [], []
        for image, entry in zip(images, regions, strict=True):
            for mask, box, name in zip(entry.get_masks(), entry.get_boxes(), entry.names, strict=True):
                sources.append(image)
                placed.append(crop_geometry(box, entry.size, size, self.crop_scale))
                cut.append(sample_masks([mask], placed[-1], [name])[0])
        ends = np.cumsum([len(entry.names) for entry in regions])[:-1]
        crops = self.image_processor.render(sources, placed, **settings)
        data["crop_pixel_values"], _ = pad_regions(np.split(crops, ends))
        data["crop_masks"], _ = pad_regions(np.split(np.stack(cut), ends))
        return data

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call can return for the model."""
        return [*super().model_input_names, "crop_pixel_values", "crop_masks"]
