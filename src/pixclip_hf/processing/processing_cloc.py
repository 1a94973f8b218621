"""Processor of CLOC: images, region boxes or masks, and texts."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

from .image_processing_region import is_batch, load_images
from .processing_geometry import place_boxes, sample_masks
from .processing_regions import check_call, choose_prompt, pad_regions, read_regions
from .processing_text import TEXT_INPUT_NAMES, OptionalTokenizer, encode_texts


class CLOCProcessor(OptionalTokenizer):
    """
    Image processor and tokenizer of CLOC in one.

    Args:
        image_processor: a `RegionImageProcessor`.
        tokenizer: the tokenizer of the text tower; None for a model that takes pooled text states.
        text_model_name: the language model that a processor without a tokenizer expects those states from.
    """

    # What may prompt a region, the usual one first.
    prompts = ("box", "mask")

    def __init__(self, image_processor: Any, tokenizer: Any = None, text_model_name: str | None = None):
        super().__init__(image_processor, tokenizer)
        self.text_model_name = text_model_name

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
        Prepare images, regions and texts for `CLOCModel`.

        One bare image takes one list of regions (and of region texts), a list of images takes a list for each image,
        empty for an image without regions. Masks and boxes are in the pixels of the image as stored.

        Args:
            images: PIL image, array, tensor, path or URL, or a list of these (`load_images`).
            text: texts to compare with, one or a list of T.
            masks: the regions, as PIL images, arrays, tensors, RLE dicts or polygons (`read_mask`).
            boxes: the regions as boxes (R, 4). Where masks are given too, the counts must match.
            region_text: a text for each region.
            box_format: "xyxy", "xywh" or "cxcywh".
            normalized: boxes are fractions of width and height in place of pixels.
            return_crops: refused; CLOC has no crop branch. It stands here so that both processors take one call.
            max_length: most tokens of a text; None is the tokenizer's own limit. What is cut is warned about.
            padding: True, "max_length", or False for texts of one length.
            return_tensors: "pt", "np", or None for numpy arrays.
            return_regions: add `regions`, plain Python: for each image a list of
                `{"box": {"xmin", "ymin", "xmax", "ymax"}, "mask_area": int}` in original pixels.
            prompt: what prompts the model: "box" (a mask becomes its tight box) or "mask" (a box becomes a rectangle).
                May be left out where only masks or only boxes are given.
            kwargs: settings of the image processor for this call, such as `size`.

        Returns:
            `BatchFeature` with, as far as given: `pixel_values` (B, 3, H, W) float32; `region_boxes` (B, R, 4)
            float32, xyxy in [0, 1] of the processed image, or `region_masks` (B, R, H, W) bool, by what prompts;
            `region_attention_mask` (B, R) int64; `input_ids` and `attention_mask` (T, L); `region_input_ids` and
            `region_text_attention_mask` (B, R, L).

        Raises:
            TypeError, ValueError: bad input; the message names the argument with its index, the value, and what was
                expected.
        """
        region_inputs = {"masks": masks, "boxes": boxes, "region_text": region_text}
        if return_crops:
            raise ValueError("return_crops must be False: CLOC reads its regions from the whole image")
        check_call(self.image_processor, kwargs, images, text, region_inputs, {"return_regions": return_regions})
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
                placed = [
                    place_boxes(entry.get_boxes(), geometry, entry.names)
                    if prompt == "box"
                    else sample_masks(entry.get_masks(), geometry, entry.names)
                    for geometry, entry in zip(geometries, regions, strict=True)
                ]
                name = "region_boxes" if prompt == "box" else "region_masks"
                data[name], data["region_attention_mask"] = pad_regions(placed)
            if return_regions:
                data["regions"] = [entry.describe() for entry in regions]
        data.update(
            encode_texts(self.tokenizer, self.text_model_name, text, region_text, counts, max_length, padding, batched)
        )
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["regions"])

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call can return for the model."""
        return ["pixel_values", "region_boxes", "region_masks", "region_attention_mask", *TEXT_INPUT_NAMES]

    def post_process_boxes(self, boxes: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Boxes in [0, 1] of the processed images -> original pixels: `RegionImageProcessor.post_process_boxes`."""
        return self.image_processor.post_process_boxes(boxes, target_sizes)

    def post_process_masks(self, masks: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Masks of the processed images -> original pixels: `RegionImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(masks, target_sizes)
