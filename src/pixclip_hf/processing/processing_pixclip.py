"""Processor of PixCLIP: images, region masks, crops around regions, and texts."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature

from .image_processing_region import is_batch, load_images
from .processing_geometry import Geometry, crop_geometry, sample_masks
from .processing_regions import Regions, check_call, choose_prompt, pad_regions, read_regions
from .processing_text import TEXT_INPUT_NAMES, OptionalTokenizer, encode_texts


class PixCLIPProcessor(OptionalTokenizer):
    """
    Image processor and tokenizer of PixCLIP in one.

    Args:
        image_processor: a `RegionImageProcessor`.
        tokenizer: the tokenizer of the text tower; None for a model that takes pooled text states.
        text_model_name: the language model that a processor without a tokenizer expects those states from.
        crop_scale: side of the square crop around a region, as a multiple of the longer side of its box, at least 1
            (branch 2 of PixCLIP, arXiv 2511.04601; 1.5 is reconstructed).
    """

    # What may prompt a region: the model takes masks alone.
    prompts = ("mask",)

    def __init__(
        self, image_processor: Any, tokenizer: Any = None, text_model_name: str | None = None, crop_scale: float = 1.5
    ):
        if not 1 <= crop_scale < float("inf"):
            raise ValueError(f"crop_scale must be a number of at least 1, got {crop_scale!r}")
        super().__init__(image_processor, tokenizer)
        self.text_model_name = text_model_name
        self.crop_scale = crop_scale

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        masks: Any = None,
        boxes: Any = None,
        region_text: list | None = None,
        box_format: str = "xyxy",
        normalized: bool = False,
        return_crops: bool = False,
        max_length: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        return_regions: bool = False,
        prompt: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare images, regions and texts for `PixCLIPModel`.

        One bare image takes one list of regions (and of region texts), a list of images takes a list for each image,
        empty for an image without regions. Masks and boxes are in the pixels of the image as stored.

        Args:
            images: PIL image, array, tensor, path or URL, or a list of these (`load_images`).
            text: texts to compare with, one or a list of T.
            masks: the regions, as PIL images, arrays, tensors, RLE dicts or polygons (`read_mask`).
            boxes: the regions as boxes (R, 4); they become rectangular masks. Where masks are given too, the counts
                must match.
            region_text: a text for each region.
            box_format: "xyxy", "xywh" or "cxcywh".
            normalized: boxes are fractions of width and height in place of pixels.
            return_crops: add a square crop around each region, `crop_scale` x the longer side of its box, at the size
                of the processed image. Beyond the image it is 0, the mean colour.
            max_length: most tokens of a text; None is the tokenizer's own limit. What is cut is warned about.
            padding: True, "max_length", or False for texts of one length.
            return_tensors: "pt", "np", or None for numpy arrays.
            return_regions: add `regions`, plain Python: for each image a list of
                `{"box": {"xmin", "ymin", "xmax", "ymax"}, "mask_area": int}` in original pixels.
            prompt: what prompts the model, "mask"; must be said where masks and boxes are both given.
            kwargs: settings of the image processor for this call, such as `size`.

        Returns:
            `BatchFeature` with, as far as given: `pixel_values` (B, 3, H, W) float32, `region_masks` (B, R, H, W)
            bool, `region_attention_mask` (B, R) int64, `crop_pixel_values` (B, R, 3, H, W) float32, `crop_masks`
            (B, R, H, W) bool, `input_ids` and `attention_mask` (T, L), `region_input_ids` and
            `region_text_attention_mask` (B, R, L).

        Raises:
            TypeError, ValueError: bad input; the message names the argument with its index, the value, and what was
                expected.
        """
        region_inputs = {"masks": masks, "boxes": boxes, "region_text": region_text}
        region_outputs = {"return_crops": return_crops, "return_regions": return_regions}
        check_call(self.image_processor, kwargs, images, text, region_inputs, region_outputs)
        data: dict[str, Any] = {}
        batched, counts = is_batch(images), []
        if images is not None:
            loaded = load_images(images, kwargs.get("input_data_format"))
            sizes = [(image.height, image.width) for image in loaded]
            geometries = self.image_processor.get_geometries(sizes, **kwargs)
            prompt = choose_prompt(prompt, masks, boxes, self.prompts)
            use = "masks" if prompt == "mask" else "boxes"
            regions = read_regions(masks, boxes, sizes, batched, use, box_format, normalized)
            data["pixel_values"] = self.image_processor.render(loaded, geometries, **kwargs)
            if regions is not None:
                counts = [len(entry.names) for entry in regions]
                data.update(self._region_inputs(loaded, geometries, regions, return_crops, kwargs))
            if return_regions:
                data["regions"] = [entry.describe() for entry in regions]
        data.update(
            encode_texts(self.tokenizer, self.text_model_name, text, region_text, counts, max_length, padding, batched)
        )
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["regions"])

    def _region_inputs(
        self,
        images: list[Image.Image],
        geometries: list[Geometry],
        regions: list[Regions],
        return_crops: bool,
        kwargs: dict,
    ) -> dict[str, np.ndarray]:
        masks = [entry.get_masks() for entry in regions]
        sampled = [
            sample_masks(rows, geometry, entry.names)
            for rows, geometry, entry in zip(masks, geometries, regions, strict=True)
        ]
        data = {}
        data["region_masks"], data["region_attention_mask"] = pad_regions(sampled)
        if return_crops:
            size = geometries[0].output_size
            sources, placed, cut = [], [], []
            for image, rows, entry in zip(images, masks, regions, strict=True):
                for mask, box, name in zip(rows, entry.get_boxes(), entry.names, strict=True):
                    sources.append(image)
                    placed.append(crop_geometry(box, entry.size, size, self.crop_scale))
                    cut.append(sample_masks([mask], placed[-1], [name])[0])
            ends = np.cumsum([len(rows) for rows in masks])[:-1]
            crops = self.image_processor.render(sources, placed, **kwargs)
            data["crop_pixel_values"], _ = pad_regions(np.split(crops, ends))
            data["crop_masks"], _ = pad_regions(np.split(np.stack(cut), ends))
        return data

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call can return for the model."""
        region_names = ["region_masks", "region_attention_mask", "crop_pixel_values", "crop_masks"]
        return ["pixel_values", *region_names, *TEXT_INPUT_NAMES]

    def post_process_boxes(self, boxes: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Boxes in [0, 1] of the processed images -> original pixels: `RegionImageProcessor.post_process_boxes`."""
        return self.image_processor.post_process_boxes(boxes, target_sizes)

    def post_process_masks(self, masks: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Masks of the processed images -> original pixels: `RegionImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(masks, target_sizes)
