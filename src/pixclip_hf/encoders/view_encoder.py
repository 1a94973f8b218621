"""Any CLIP or SigLIP of transformers as an encoder of regions: crops, blurred or framed images, or pooled patches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ..data.collator import region_inputs
from ..modeling.modeling_vision import VISION_ADAPTERS
from ..pipelines.region_batches import IMAGE_KEYS
from ..pipelines.text_embeddings import input_device
from ..processing.image_processing_region import RegionImageProcessor
from ..processing.processing_pixclip import PixCLIPProcessor
from ..processing.processing_regions import mask_box, read_mask
from ..processing.processing_text import lowers_in_name_only
from .base import BaseEncoder
from .joint import boxes_and_masks
from .preparation import batches
from .protocol import Record
from .region_encoder import RegionEncoder, load_model
from .views import Region, blurred, crop, outlined

REGION_VIEWS = ("crop", "blur", "box", "mask_pooled")


class ViewEncoder(BaseEncoder):
    """A dual encoder that knows no regions, with the methods of [`RegionEncoder`].

    Whole images go through the model's own image processor. Images with a region in them are resized to the model's
    square, as for CLOC and PixCLIP: the center crop of a CLIP processor would cut regions off. A SigLIP 2 of variable
    resolution (NaFlex) sees images and views in their own aspect. A region given by its mask alone has the tight box
    of the mask, one given by its box alone the rectangle as its mask; where both are given, a mask may be None.

    Args:
        model: with `get_image_features`, `get_text_features`, `vision_model` and, as in CLIP, `visual_projection`.
        processor: its processor.
        view: how it sees a region: `"crop"`, a square of 1.5 times the longer side of the box; `"blur"`, the image
            blurred but for the region; `"box"`, the image with a red frame; `"mask_pooled"`, patch features of the
            whole image averaged under the mask and sent through the model's head (as in CLIPSelf).
        max_length: tokens that texts are cut to; the text tower's positions when None.

    Raises:
        ValueError: an unknown view, or a model without these methods.
    """

    prompts: tuple[str, ...] = ("mask",)

    def __init__(self, model: Any, processor: Any, view: str = "crop", max_length: int | None = None):
        if view not in REGION_VIEWS:
            raise ValueError(f"`view` must be one of {', '.join(REGION_VIEWS)}, got {view!r}.")
        if missing := [
            name for name in ("get_image_features", "get_text_features", "vision_model") if not hasattr(model, name)
        ]:
            raise ValueError(f"`model` must be a CLIP or SigLIP, got {type(model).__name__} without {missing[0]}.")
        super().__init__(model, processor, max_length=max_length)
        self.view = view
        own, config = processor.image_processor, model.config
        self.mean_color = list(own.image_mean)
        names = ("resample", "image_mean", "image_std")
        settings: dict[str, Any] = {name: getattr(own, name) for name in names}
        if VISION_ADAPTERS.of(config.vision_config).takes_patches:
            settings |= {"max_num_patches": own.max_num_patches, "patch_size": own.patch_size}
        else:
            size = config.vision_config.image_size
            settings["size"] = {"height": size, "width": size}
        self.region_processor = PixCLIPProcessor(RegionImageProcessor(**settings))
        self.width = getattr(config, "projection_dim", None) or config.vision_config.hidden_size
        # SigLIP reads the state at the last of all its positions, padding included.
        siglip = "siglip" in config.model_type
        self.padding = "max_length" if siglip else True
        self.lowercase_texts = siglip and lowers_in_name_only(processor.tokenizer)

    @property
    def settings(self) -> str:
        """What decides the embeddings beside model and processor."""
        return f"{self.view} {self.text_limit}" + (" lower-cased" if self.lowercase_texts else "")

    @property
    def text_limit(self) -> int:
        """Tokens that texts are cut to."""
        return self.max_length or self.model.config.text_config.max_position_embeddings

    def encode_records(
        self,
        records: Sequence[Record],
        prompt: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        mode: str | None = None,
    ) -> list[Any]:
        """As [`RegionEncoder.encode_records`]; a view looks at box and mask."""
        rows: Any = self.encode_regions(
            [record["image"] for record in records],
            boxes=[[region["box"] for region in record["regions"]] for record in records],
            masks=[[region.get("mask") for region in record["regions"]] for record in records],
            prompt=prompt,
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress_bar=show_progress_bar,
            convert_to_tensor=convert_to_tensor,
            normalize_embeddings=normalize_embeddings,
            mode=mode,
        )
        return rows

    @torch.no_grad()
    def encode_shown(self, records: Sequence[Record], batch_size: int = 32) -> Tensor:
        """As [`RegionEncoder.encode_shown`]; an encoder that looks at crops has one before it, squeezed to the model's
        square if it is none."""
        if self.view != "crop":
            return super().encode_shown(records, batch_size)
        embeds = [torch.zeros(0, self.width)]
        for part in batches(records, batch_size):
            inputs = self.region_processor(images=[record["image"] for record in part])
            embeds.append(self._image_features(inputs).float().cpu())
        return F.normalize(torch.cat(embeds), dim=-1)

    def find_boxes(self, image: Image.Image, texts: Sequence[str]) -> Tensor:
        """
        Raises:
            NotImplementedError: always; `grounds` is False.
        """
        raise NotImplementedError(f"{type(self.model).__name__} has no grounding head.")

    def find_scored_boxes(self, image: Image.Image, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """
        Raises:
            NotImplementedError: always; `grounds` is False.
        """
        raise NotImplementedError(f"{type(self.model).__name__} has no grounding head.")

    def _images_per_part(self, batch_size: int) -> int:
        return 1  # is prepared at a time; `batch_size` views of regions share a pass

    def _region_call(self, prompt: str) -> Callable[..., Any]:
        fill = tuple(round(255 * channel) for channel in self.mean_color)
        view: Any = self.view
        return partial(show_regions, self.region_processor, view, fill)

    def _region_arguments(self) -> Callable[..., Any]:
        return boxes_and_masks

    def _image_call(self) -> Callable[..., Any]:
        return partial(self.processor.image_processor, return_tensors="pt")

    def _region_features(self, inputs: Any, batch_size: int, mode: str | None) -> Tensor:
        """Of `"mask_pooled"`; other views go through `_features_of_views`."""
        images = self._images(inputs)
        tower, config = self.model.vision_model, self.model.config.vision_config
        adapter = VISION_ADAPTERS.of(config)
        states, shapes = tower(**images).last_hidden_state, images.get("spatial_shapes")
        tokens = adapter.image_tokens(config, states, images["pixel_values"], shapes)
        pooled = adapter.pool_masks(tower, tokens, inputs["region_masks"].to(states.device))
        projection = getattr(self.model, "visual_projection", None)
        return pooled if projection is None else projection(pooled)

    def _features_of_parts(self, parts: Iterable[Any], batch_size: int, mode: str | None) -> Iterator[Tensor]:
        if self.view == "mask_pooled":
            yield from super()._features_of_parts(parts, batch_size, mode)
            return
        held: list[Any] = []
        for inputs in parts:
            number = sum(len(own["pixel_values"]) for own in held)
            if held and number + len(inputs["pixel_values"]) > batch_size:
                yield from self._features_of_views(held, batch_size)
                held = []
            held.append(inputs)
        if held:
            yield from self._features_of_views(held, batch_size)

    def _features_of_views(self, views: Sequence[Any], batch_size: int) -> Iterator[Tensor]:
        """`(1, R, D)` for the R views of each of some images, which share passes of the model."""
        names = [name for name in IMAGE_KEYS if name in views[0]]
        split = [torch.cat([own[name] for own in views]).split(batch_size) for name in names]
        features = torch.cat(
            [self._image_features(dict(zip(names, part, strict=True))) for part in zip(*split, strict=True)]
        )
        return (rows[None] for rows in features.split([len(own["pixel_values"]) for own in views]))

    def _image_features(self, inputs: Any, unscaled_mask: bool = False) -> Tensor:
        return self.model.get_image_features(**self._images(inputs)).pooler_output

    def _images(self, inputs: Any) -> dict[str, Tensor]:
        images = {name: inputs[name].to(input_device(self.model)) for name in IMAGE_KEYS if name in inputs}
        return images | {"pixel_values": images["pixel_values"].to(self.model.dtype)}

    def _text_features(self, texts: Sequence[str], limit: int | None, batch_size: int, show: bool) -> Tensor:
        embeds = []
        for part in tqdm(batches(texts, batch_size), desc="encoding texts", disable=not show, leave=False):
            read = [text.lower() for text in part] if self.lowercase_texts else part
            inputs = self.processor.tokenizer(
                read, padding=self.padding, truncation=True, max_length=limit, return_tensors="pt"
            ).to(input_device(self.model))
            embeds.append(self.model.get_text_features(**inputs).pooler_output.float())
        return torch.cat(embeds)


def show_regions(
    processor: PixCLIPProcessor,
    view: str,
    fill: tuple[int, int, int],
    images: Any,
    boxes: Any = None,
    masks: Any = None,
) -> Any:
    """The pixels `(R, 3, H, W)` of the R views of one image's regions; for `"mask_pooled"` those of the image
    `(1, 3, H, W)` and its masks.

    Args:
        processor: the processor of the views.
        view, fill: how regions are shown, and the color beyond the image.
        images, boxes, masks: an image and its regions, or lists of one.
    """
    if isinstance(images, list):
        (images,) = images
        boxes, masks = (None if regions is None else regions[0] for regions in (boxes, masks))
    regions = _joined(images, boxes, masks)
    if view == "mask_pooled":
        inputs: dict[str, Any] = region_inputs([regions], "mask")
        return processor(images=[images], **inputs, return_tensors="pt")
    show: Callable[[Region], Image.Image] = {
        "crop": lambda region: crop(images, region, fill)["image"],
        "blur": lambda region: blurred(images, region),
        "box": lambda region: outlined(images, region),
    }[view]
    return processor(images=[show(region) for region in regions], return_tensors="pt")


def _joined(image: Image.Image, boxes: Any, masks: Any) -> list[dict[str, Any]]:
    """Regions with a box and, where it was given, a mask."""
    if boxes is not None and masks is not None and len(boxes) != len(masks):
        raise ValueError(f"`boxes` and `masks` must be as many, got {len(boxes)} and {len(masks)}.")
    if boxes is None:
        shape = image.size[::-1]
        boxes = [mask_box(read_mask(mask, shape, f"masks[{i}]") != 0).tolist() for i, mask in enumerate(masks)]
    boxes = [[float(edge) for edge in box] for box in boxes]
    masks = [None] * len(boxes) if masks is None else masks
    return [{"box": box, "mask": mask} for box, mask in zip(boxes, masks, strict=True)]


def load_encoder(
    name: str,
    view: str = "crop",
    max_length: int | None = None,
    revision: str = "main",
    prompt: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> RegionEncoder | ViewEncoder:
    """The encoder of any checkpoint: CLOC and PixCLIP (converted Alpha-CLIP too) see regions, others `view`.

    Args:
        name: Hub id or folder.
        view: as in [`ViewEncoder`]; not for a model that sees regions.
        prompt: as in [`RegionEncoder`]; a view has none.
        max_length, revision, device, dtype, kwargs: as in [`RegionEncoder.from_pretrained`].

    Raises:
        ValueError: a `prompt` for a model that shows a view, or a model that is neither.
    """
    model = load_model(name, device, dtype, revision, **kwargs)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    if hasattr(model, "get_region_features"):
        return RegionEncoder(model, processor, prompt, max_length)
    if prompt is not None:
        raise ValueError(f"`prompt` must be None for a {type(model).__name__}, which shows a `view`, got {prompt!r}.")
    return ViewEncoder(model, processor, view, max_length)
