"""What the processors of both models are: images, regions and texts read into one batch."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature

from .image_processing_region import RegionImageProcessor
from .processing_geometry import Geometry, place_boxes, sample_masks
from .processing_images import is_batch, load_images
from .processing_regions import Regions, check_call, choose_prompt, pad_regions, read_regions
from .processing_text import TEXT_INPUT_NAMES, OptionalTokenizer, encode_texts, position_limit

# What carries the regions of a batch, by what prompts.
REGION_INPUT_NAMES = {"box": "region_boxes", "mask": "region_masks"}


class RegionTextProcessor(OptionalTokenizer):
    """
    Image processor and tokenizer in one.

    Args:
        image_processor: a `RegionImageProcessor`.
        tokenizer: the tokenizer of the text tower; None for a model that takes pooled text states.
        text_model_name: the language model that a processor without a tokenizer expects those states from.
    """

    # What may prompt a region, the usual one first.
    prompts: ClassVar[tuple[str, ...]] = ()
    # Whether a call takes `return_crops`, for a model that trains on crops around its regions.
    has_crops: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A registration is for the class that it names: saving a subclass from elsewhere would copy its module and die
        # on what that imports.
        cls._auto_class = None

    def __init__(self, image_processor: Any, tokenizer: Any = None, text_model_name: str | None = None):
        super().__init__(image_processor, tokenizer)
        self.text_model_name = text_model_name

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        image_size: int | None = None,
        max_position_embeddings: int | None = None,
        revision: str = "main",
        vision_revision: str | None = None,
        text_revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        The processor of a model made of two towers, for the same arguments as the model's own
        `from_vision_text_pretrained`: whole images in the square that the tower takes, resampled and normalized as
        `vision`'s image processor does it, and `text`'s tokenizer with the limit of the text tower.

        Args:
            vision: CLIP or SigLIP checkpoint, Hub id or folder, with its image processor.
            text: text model with its tokenizer.
            image_size: side of the images in pixels; the tower's own when None.
            max_position_embeddings: tokens that a stretched text tower takes; the tower's own when None.
            revision, vision_revision, text_revision: the revision of both repositories, or of each.
            kwargs: other Hub arguments (`token`, `cache_dir`, `local_files_only`).

        Raises:
            ValueError: `vision` has no image size of its own.
        """
        vision_kwargs = kwargs | {"revision": vision_revision or revision}
        text_kwargs = kwargs | {"revision": text_revision or revision}
        config = AutoConfig.from_pretrained(vision, **vision_kwargs)
        config = getattr(config, "vision_config", config)
        if not isinstance(getattr(config, "image_size", None), int):
            raise ValueError(
                f"vision must name a checkpoint with one image size, got {vision!r}, a {config.model_type!r} tower"
            )
        # As the model has it: whole patches.
        side = image_size or config.image_size // config.patch_size * config.patch_size
        source = AutoImageProcessor.from_pretrained(vision, **vision_kwargs)
        names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(source, name) for name in names if getattr(source, name, None) is not None}
        image_processor = RegionImageProcessor(size={"height": side, "width": side}, **settings)

        config = AutoConfig.from_pretrained(text, **text_kwargs)
        config = getattr(config, "text_config", None) or config
        tokenizer = AutoTokenizer.from_pretrained(text, **text_kwargs)
        if max_position_embeddings is not None:
            tokenizer.model_max_length = max_position_embeddings
        elif (limit := position_limit(config)) is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(image_processor=image_processor, tokenizer=tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        masks: Any = None,
        boxes: Any = None,
        region_text: list | None = None,
        box_format: str = "xyxy",
        normalized: bool = False,
        max_length: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        return_regions: bool = False,
        prompt: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare images, regions and texts for the model.

        One bare image takes one list of regions (and of region texts). A list of images takes a list for each image,
        which is empty for an image without regions. Masks and boxes are in the pixels of the image as stored.

        Args:
            images: PIL image, array, tensor, path or URL, or a list of these (`load_images`).
            text: texts to compare with, one or a list of T.
            masks: the regions, as PIL images, arrays, tensors, RLE dicts or polygons (`read_mask`).
            boxes: the regions as boxes (R, 4). Where masks are given too, the counts must match.
            region_text: a text for each region.
            box_format: "xyxy", "xywh" or "cxcywh".
            normalized: boxes are fractions of width and height in place of pixels.
            max_length: most tokens of a text; None is the tokenizer's own limit. A warning says how many were cut.
            padding: True, "max_length", or False for texts of equal length.
            return_tensors: "pt", "np", or None for numpy arrays.
            return_regions: add `regions`, plain Python: for each image a list of
                `{"box": {"xmin", "ymin", "xmax", "ymax"}, "mask_area": int}` in original pixels.
            prompt: what prompts the model, one of `prompts`: "box" (a mask becomes its tight box) or "mask" (a box
                becomes a rectangle). May be left out where only masks or only boxes are given.
            kwargs: settings of the image processor for this call, such as `size`.

        Returns:
            `BatchFeature` with, as far as given: `pixel_values` (B, 3, H, W) float32; `region_boxes` (B, R, 4)
            float32, xyxy in [0, 1] of the processed image, or `region_masks` (B, R, H, W) bool;
            `region_attention_mask` (B, R) int64; `input_ids` and `attention_mask` (T, L); `region_input_ids` and
            `region_text_attention_mask` (B, R, L).

        Raises:
            TypeError, ValueError: bad input; the message names the argument with its index, the value, and what was
                expected.
        """
        asked = {"return_regions": return_regions}
        if self.has_crops:
            asked["return_crops"] = kwargs.pop("return_crops", False)
        region_inputs = {"masks": masks, "boxes": boxes, "region_text": region_text}
        check_call(self.image_processor, kwargs, images, text, region_inputs, asked)
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
                data.update(self._region_inputs(loaded, geometries, regions, prompt, asked, kwargs))
            if asked["return_regions"] and regions is not None:
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
        prompt: str,
        asked: dict[str, bool],
        settings: dict[str, Any],
    ) -> dict[str, np.ndarray]:
        """The regions of each image in the form that prompts, padded to one number of slots."""
        placed = [
            place_boxes(entry.get_boxes(), geometry, entry.names)
            if prompt == "box"
            else sample_masks(entry.get_masks(), geometry, entry.names)
            for geometry, entry in zip(geometries, regions, strict=True)
        ]
        rows, is_real = pad_regions(placed)
        return {REGION_INPUT_NAMES[prompt]: rows, "region_attention_mask": is_real}

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call can return for the model."""
        region_names = [REGION_INPUT_NAMES[prompt] for prompt in self.prompts]
        return ["pixel_values", *region_names, "region_attention_mask", *TEXT_INPUT_NAMES]

    def post_process_boxes(self, boxes: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Boxes in [0, 1] of the processed images -> original pixels: `RegionImageProcessor.post_process_boxes`."""
        return self.image_processor.post_process_boxes(boxes, target_sizes)

    def post_process_masks(self, masks: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Masks of the processed images -> original pixels: `RegionImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(masks, target_sizes)
