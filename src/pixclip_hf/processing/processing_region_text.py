"""What the processors of both models are: images, regions and texts read into one batch."""

from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ImageProcessingMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs

from .image_processing_region import RegionImageProcessor
from .processing_geometry import Geometry, place_boxes, sample_masks
from .processing_images import is_batch, is_nested, load_images
from .processing_patches import PATCH_TOWERS, on_one_canvas
from .processing_points import MixedRegions, read_mixed
from .processing_regions import Regions, check_call, choose_prompt, flatten_like, pad_regions, read_regions
from .processing_text import (
    PADDING_READERS,
    TEXT_INPUT_NAMES,
    UNLIMITED,
    OptionalTokenizer,
    RegionTextKwargs,
    encode_texts,
    lowers_in_name_only,
    position_limit,
)

# What carries the regions of a batch, by what prompts.
REGION_INPUT_NAMES = {"box": "region_boxes", "mask": "region_masks", "point": "region_points"}


class RegionTextProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """
    What a call may say beside its images, texts and regions.

    Attributes:
        text_kwargs: see `RegionTextKwargs`; `images_kwargs`: settings of the image processor, such as `size`. Both may
            be given flat as well, and what both know, `return_tensors`, in `common_kwargs`.
        box_format: "xyxy" (the default), "xywh" or "cxcywh".
        normalized: boxes are fractions of width and height (True) or pixels (False). By default they are pixels too,
            but boxes none of which has a value above 1 are refused, because they look like fractions.
        prompt: what prompts the model, one of the processor's `prompts`: "box" (a mask becomes its tight box), "mask"
            (a box becomes a rectangle) or "point". May be left out where only masks or only boxes are given, and where
            each region has these or points, not both.
        return_regions: add `regions`, plain Python: for each image a list of
            `{"box": {"xmin", "ymin", "xmax", "ymax"}, "mask_area": int}` in original pixels, or of
            `{"points": [[x, y], ...], "point_labels": [...]}` where points prompt.
    """

    text_kwargs: RegionTextKwargs
    box_format: str
    normalized: bool | None
    prompt: str | None
    return_regions: bool


def _image_settings(vision: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """How the image processor of a checkpoint resamples and normalizes, and how many patches it makes at most.

    Raises:
        ValueError: a processor that this installation cannot build, whose file does not say how it normalizes.
    """
    names = (
        *("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
        "max_num_patches",
    )
    try:
        source = AutoImageProcessor.from_pretrained(vision, **hub_kwargs)
    except ImportError as error:
        # DINOv3's needs torchvision. What it would do is written in its file.
        content, _ = ImageProcessingMixin.get_image_processor_dict(vision, **hub_kwargs)
        if missing := [name for name in ("image_mean", "image_std", "resample") if content.get(name) is None]:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"`vision` ({vision!r}) has an image processor that cannot be built here ({reason}), and its file "
                f"does not say {', '.join(missing)}."
            ) from error
        return {name: content[name] for name in names if content.get(name) is not None}
    return {name: getattr(source, name) for name in names if getattr(source, name, None) is not None}


class RegionTextProcessor(OptionalTokenizer):
    """
    Image processor and tokenizer in one.

    Args:
        image_processor: a `RegionImageProcessor`.
        tokenizer: the tokenizer of the text tower; None for a model that takes pooled text states.
        text_model_name: the language model that a processor without a tokenizer expects those states from.
        reads_padding: the text tower reads the padding behind a text too (SigLIP): every text is filled up to the
            tokenizer's limit, and the tokens that fill it up count as its own.
        lowercase_texts: texts are lower-cased before the tokenizer sees them.
    """

    valid_processor_kwargs = RegionTextProcessorKwargs
    # Settings of a call where it says nothing.
    box_format: ClassVar[str] = "xyxy"
    normalized: ClassVar[bool | None] = None
    return_regions: ClassVar[bool] = False
    # What may prompt a region, the usual one first.
    prompts: ClassVar[tuple[str, ...]] = ()
    # Whether a call takes `return_crops`, for a model that trains on crops around its regions.
    has_crops: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A registration is for the class that it names: saving a subclass from elsewhere would copy its module and die
        # on what that imports.
        cls._auto_class = None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any = None,
        text_model_name: str | None = None,
        reads_padding: bool = False,
        lowercase_texts: bool = False,
    ):
        if reads_padding and (tokenizer is None or tokenizer.model_max_length >= UNLIMITED):
            given = "no tokenizer" if tokenizer is None else f"{tokenizer.model_max_length}"
            raise ValueError(
                f"reads_padding=True needs a tokenizer whose model_max_length is the tower's, got {given}"
            )
        super().__init__(image_processor, tokenizer)
        self.text_model_name = text_model_name
        self.reads_padding, self.lowercase_texts = reads_padding, lowercase_texts

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
            vision: CLIP, SigLIP, DINO or ViT checkpoint, Hub id or folder, with its image processor.
            text: text model with its tokenizer.
            image_size: side of the images in pixels; the tower's own when None.
            max_position_embeddings: tokens that a stretched text tower takes; the tower's own when None.
            revision, vision_revision, text_revision: the revision of both repositories, or of each.
            kwargs: other Hub arguments (`token`, `cache_dir`, `local_files_only`).

        Raises:
            ValueError: `vision` has no image size of its own, or takes images of any and `image_size` is given;
                `max_position_embeddings` for a text tower whose positions are not stretched.
        """
        vision_kwargs = kwargs | {"revision": vision_revision or revision}
        text_kwargs = kwargs | {"revision": text_revision or revision}
        config = AutoConfig.from_pretrained(vision, **vision_kwargs)
        config = getattr(config, "vision_config", config)
        takes_patches = config.model_type in PATCH_TOWERS
        if not takes_patches and not isinstance(getattr(config, "image_size", None), int):
            raise ValueError(
                f"vision must name a checkpoint with one image size, got {vision!r}, a {config.model_type!r} tower"
            )
        if takes_patches and image_size is not None:
            raise ValueError(f"image_size must be None for a {config.model_type!r} tower, got {image_size}")
        settings = _image_settings(vision, vision_kwargs)
        if not takes_patches:
            # As the model has it: whole patches.
            side = image_size or config.image_size // config.patch_size * config.patch_size
            settings["size"] = {"height": side, "width": side}
        elif "max_num_patches" in settings:
            settings["patch_size"] = config.patch_size
        else:
            raise ValueError(
                f"vision must name a checkpoint whose image processor has max_num_patches, got {vision!r}"
            )
        image_processor = RegionImageProcessor(**settings)

        config = AutoConfig.from_pretrained(text, **text_kwargs)
        config = getattr(config, "text_config", None) or config
        tokenizer = AutoTokenizer.from_pretrained(text, **text_kwargs)
        if max_position_embeddings is not None and config.model_type in PADDING_READERS:
            raise ValueError(
                f"max_position_embeddings must be None for a {config.model_type!r} tower, got "
                f"{max_position_embeddings}"
            )
        if max_position_embeddings is not None:
            tokenizer.model_max_length = max_position_embeddings
        elif (limit := position_limit(config)) is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.model_type not in PADDING_READERS:
            return cls(image_processor=image_processor, tokenizer=tokenizer)
        # The tokenizer's own limit may lie below the length that the tower was trained at, and is not its padding.
        tokenizer.model_max_length = config.max_position_embeddings
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            reads_padding=True,
            lowercase_texts=lowers_in_name_only(tokenizer),
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        masks: Any = None,
        boxes: Any = None,
        region_text: list | None = None,
        points: Any = None,
        point_labels: Any = None,
        **kwargs: Unpack[RegionTextProcessorKwargs],  # type: ignore[misc]
    ) -> BatchFeature:
        """
        Prepare images, regions and texts for the model.

        One bare image takes one list of regions (and of region texts). A list of images takes a list for each image,
        which is empty for an image without regions. Images in a list of lists take their regions and region texts
        nested alike; the batch, and the indices of regions in messages, count them through. Masks and boxes are in the
        pixels of the image as stored.

        Args:
            images: PIL image, array, tensor, path or URL, or a list of these (`load_images`).
            text: texts to compare with, one or a list of T.
            masks: the regions, as PIL images, arrays, tensors, RLE dicts or polygons (`read_mask`).
            boxes: the regions as boxes (R, 4). Where masks are given too, the counts must match.
            region_text: a text for each region.
            points: the points of each region, nested as in SAM: for one image R regions of P points [x, y] each, where
                P may differ. For a model that points may prompt. Where boxes or masks are given too, the counts must
                match, and a region has None among those that it lacks.
            point_labels: nested alike, 1 for a point on the region, 0 for one beside it; all 1 when None.
            kwargs: settings of this call, see the class in `valid_processor_kwargs`: of boxes, texts and the image
                processor, flat or by kind in `text_kwargs`, `images_kwargs` and `common_kwargs`.

        Returns:
            `BatchFeature` with, as far as given: `pixel_values` (B, 3, H, W) float32, or patches with their
            `pixel_attention_mask` and `spatial_shapes` (`RegionImageProcessor`); `region_boxes` (B, R, 4)
            float32, xyxy in [0, 1] of the processed image, or `region_masks` (B, R, H, W) bool; `region_points`
            (B, R, P, 2) float32, xy in [0, 1], and `region_point_labels` (B, R, P) int64, -1 for padding;
            `region_attention_mask` (B, R) int64; `input_ids` and `attention_mask` (T, L); `region_input_ids` and
            `region_text_attention_mask` (B, R, L).

        Raises:
            TypeError, ValueError: bad input; the message names the argument with its index, the value, and what was
                expected.
        """
        settings, tensor_type = self._merge_settings(**kwargs)
        image_settings = settings["images_kwargs"]
        asked = {name: settings[name] for name in self._returns()}
        given = {"masks": masks, "boxes": boxes, "region_text": region_text}
        given |= {"points": points, "point_labels": point_labels}
        check_call(images, text, given, asked)
        data: dict[str, Any] = {}
        batched, counts = is_batch(images), []
        if images is not None:
            convert = image_settings.get("do_convert_rgb", self.image_processor.do_convert_rgb)
            # First, because it names an image among lists of them.
            loaded = load_images(images, image_settings.get("input_data_format"), convert)
            if is_nested(images):
                flat = {name: flatten_like(images, values, name) for name, values in given.items()}
                masks, boxes, region_text, points, point_labels = flat.values()
            sizes = [(image.height, image.width) for image in loaded]
            geometries = self.image_processor.get_geometries(sizes, **image_settings)
            prompt = choose_prompt(settings.get("prompt"), masks, boxes, self.prompts, points)
            form = settings["box_format"], settings["normalized"]
            mixed = None
            if points is not None:
                said = settings.get("prompt")
                mixed = read_mixed(points, point_labels, boxes, masks, sizes, batched, said, *form)
                boxes, masks = mixed.boxes, mixed.masks
                if prompt == "point":
                    prompt = "box" if masks is None else "mask"
            use = "masks" if prompt == "mask" else "boxes"
            regions = read_regions(masks, boxes, sizes, batched, use, *form)
            data["pixel_values"] = self.image_processor.render(loaded, geometries, **image_settings)
            data.update(self.image_processor.patch_inputs(geometries, **image_settings))
            if regions is not None:
                counts = [len(entry.names) for entry in regions]
                data.update(self._region_inputs(loaded, geometries, regions, prompt, asked, image_settings))
            if mixed is not None:
                counts = [len(entry.rows) for entry in mixed.points]
                self._add_points(data, mixed, geometries)
            if asked["return_regions"] and (regions is not None or mixed is not None):
                data["regions"] = _describe(regions, mixed)
        data.update(
            encode_texts(
                self.tokenizer,
                self.text_model_name,
                text,
                region_text,
                counts,
                batched,
                settings["text_kwargs"],
                self.reads_padding,
                self.lowercase_texts,
            )
        )
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=["regions"])

    @classmethod
    def _own_settings(cls) -> list[str]:
        """Names of the settings that are neither of the texts nor of the image processor."""
        return [
            name for name in cls.valid_processor_kwargs.__annotations__ if name not in ProcessingKwargs.__annotations__
        ]

    @classmethod
    def _returns(cls) -> list[str]:
        """Those of them that ask for something of the regions."""
        return [name for name in cls._own_settings() if name.startswith("return_")]

    def _merge_settings(self, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
        """
        The settings of a call by kind, as every processor of transformers merges them with those of the tokenizer, and
        the type of the batch.

        Raises:
            TypeError: a name that is no setting.
            ValueError: a value of the wrong type, a setting given flat and by kind, or two types for one batch.
        """
        known = {
            "text_kwargs": set(RegionTextKwargs.__annotations__),
            "images_kwargs": set(self.image_processor.valid_kwargs.__annotations__),
        }
        known["common_kwargs"] = known["text_kwargs"] & known["images_kwargs"]
        flat = {*self._own_settings(), *known["text_kwargs"], *known["images_kwargs"]}
        unknown = sorted(set(kwargs) - flat - set(known))
        for kind in known:
            given = kwargs.get(kind, {})
            if not isinstance(given, dict):
                raise TypeError(f"{kind} must be a dict of settings, got {given!r:.80}")
            unknown += [f"{kind}[{name!r}]" for name in sorted(set(given) - known[kind])]
        if unknown:
            raise TypeError(f"unknown argument {', '.join(unknown)}: it is no argument or image processor setting")
        initial = {} if self.tokenizer is None else self.tokenizer.init_kwargs
        try:
            settings = self._merge_kwargs(tokenizer_init_kwargs=initial, **kwargs)
            validate_typed_dict(RegionTextKwargs, settings["text_kwargs"])  # type: ignore[type-var]
        except StrictDataclassFieldValidationError as error:
            raise ValueError(" ".join(str(error).split())) from error
        types = {
            kind: settings[kind].pop("return_tensors")
            for kind in ("text_kwargs", "images_kwargs")
            if "return_tensors" in settings[kind]
        }
        if len(set(types.values())) > 1:
            raise ValueError(f"return_tensors must be one type for the whole batch, got {types}")
        return settings, next(iter(types.values()), "pt")

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
        if prompt == "mask":
            placed = on_one_canvas(placed)
        rows, is_real = pad_regions(placed)
        return {REGION_INPUT_NAMES[prompt]: rows, "region_attention_mask": is_real}

    def _add_points(self, data: dict[str, np.ndarray], mixed: MixedRegions, geometries: list[Geometry]) -> None:
        """Puts the points into a batch, and zeros into it where a region has no box or mask."""
        if any(chosen.any() for chosen in mixed.by_point):
            data["region_points"], data["region_point_labels"] = mixed.place(geometries)
        has_other, data["region_attention_mask"] = pad_regions(mixed.has_other)
        for name in REGION_INPUT_NAMES.values():
            if name in data and name != "region_points":
                data[name][~has_other] = 0

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call can return for the model."""
        region_names = [REGION_INPUT_NAMES[prompt] for prompt in self.prompts]
        labels = ["region_point_labels"] if "point" in self.prompts else []
        patches = ["pixel_attention_mask", "spatial_shapes"] if self.image_processor.max_num_patches else []
        return ["pixel_values", *patches, *region_names, *labels, "region_attention_mask", *TEXT_INPUT_NAMES]

    def post_process_boxes(self, boxes: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Boxes in [0, 1] of the processed images -> original pixels: `RegionImageProcessor.post_process_boxes`."""
        return self.image_processor.post_process_boxes(boxes, target_sizes)

    def post_process_masks(self, masks: Any, target_sizes: Any) -> list[torch.Tensor]:
        """Masks of the processed images -> original pixels: `RegionImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(masks, target_sizes)


def _describe(regions: list[Regions] | None, mixed: MixedRegions | None) -> list[list[dict]]:
    """For each image what its regions are in original pixels: points where these prompt."""
    described = [] if regions is None else [entry.describe() for entry in regions]
    if mixed is None:
        return described
    described = described or [[{}] * len(entry.rows) for entry in mixed.points]
    return [
        [entry.describe(j) if by_point else row[j] for j, by_point in enumerate(chosen)]
        for entry, chosen, row in zip(mixed.points, mixed.by_point, described, strict=True)
    ]
