"""Any CLIP or SigLIP of transformers in the same evaluation: regions as crops, blurred or framed images, or pooled
patches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from ..data.collator import region_inputs
from ..modeling.modeling_regions import mask_patch_weights
from ..modeling.modeling_vision import VISION_ADAPTERS
from ..processing.image_processing_region import RegionImageProcessor
from ..processing.processing_pixclip import PixCLIPProcessor
from .encoders import Record, RegionEncoder, batches, text_keys
from .views import blurred, crop, open_image, outlined

REGION_VIEWS = ("crop", "blur", "box", "mask_pooled")


class PeerEncoder:
    """A dual encoder that knows no regions, with the methods of [`RegionEncoder`].

    Whole images go through the model's own image processor. Images with a region in them are resized to the model's
    square, as for CLOC and PixCLIP: the centre crop of a CLIP processor would cut regions off.

    Args:
        model: with `get_image_features`, `get_text_features`, `vision_model` and, as in CLIP, `visual_projection`.
        processor: its processor.
        view: how it sees a region: `"crop"`, a square of 1.5 times the longer side of the box; `"blur"`, the image
            blurred but for the region; `"box"`, the image with a red frame; `"mask_pooled"`, patch features of the
            whole image averaged under the mask and sent through the model's head (as in CLIPSelf).
        batch_size: images and texts at a time.
        max_length: tokens that texts are cut to; the text tower's positions when None.

    Raises:
        ValueError: an unknown view, or a model without these methods.
    """

    takes_masks = True
    prompts = ("mask",)
    grounds = pools = False

    def __init__(
        self, model: Any, processor: Any, view: str = "crop", batch_size: int = 32, max_length: int | None = None
    ):
        if view not in REGION_VIEWS:
            raise ValueError(f"`view` must be one of {', '.join(REGION_VIEWS)}, got {view!r}.")
        if missing := [
            name for name in ("get_image_features", "get_text_features", "vision_model") if not hasattr(model, name)
        ]:
            raise ValueError(f"`model` must be a CLIP or SigLIP, got {type(model).__name__} without {missing[0]}.")
        self.model, self.processor, self.view, self.batch_size = model.eval(), processor, view, batch_size
        own, size = processor.image_processor, model.config.vision_config.image_size
        self.mean_colour = list(own.image_mean)
        image_processor = RegionImageProcessor(
            size={"height": size, "width": size}, image_mean=own.image_mean, image_std=own.image_std
        )
        self.region_processor = PixCLIPProcessor(image_processor)
        text = model.config.text_config
        self.text_limit = max_length or text.max_position_embeddings
        # SigLIP reads the state at the last of all its positions, padding included.
        self.padding = "max_length" if "siglip" in model.config.model_type else True

    @property
    def settings(self) -> str:
        """What beside model and processor decides the embeddings."""
        return f"{self.view} {self.text_limit}"

    def text_keys(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[tuple[int, ...]], int]:
        """As [`RegionEncoder.text_keys`]."""
        return text_keys(self.processor.tokenizer, texts, max_length or self.text_limit)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """L2-normalised `(T, D)`; texts are cut to `max_length` tokens, `text_limit` when None."""
        limit = max_length or self.text_limit
        embeds = []
        for part in batches(list(texts), self.batch_size):
            inputs = self.processor.tokenizer(
                part, padding=self.padding, truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.model.device)
            embeds.append(self.model.get_text_features(**inputs).pooler_output)
        return F.normalize(torch.cat(embeds).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any], unscaled: bool = False) -> Tensor:
        """L2-normalised `(N, D)` of whole images, PIL or paths; without a mask, `unscaled` changes nothing."""
        embeds = []
        for part in batches(images, self.batch_size):
            opened = [open_image(image) for image in part]
            pixels = self.processor.image_processor(images=opened, return_tensors="pt").pixel_values
            embeds.append(self._features(pixels))
        return F.normalize(torch.cat(embeds).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_crops(self, crops: Sequence[Image.Image]) -> Tensor:
        """L2-normalised `(N, D)` of pictures that show a region each, resized to the model's square as they are."""
        embeds = [self._empty(), *map(self._squeezed, batches(crops, self.batch_size))]
        return F.normalize(torch.cat(embeds).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_regions(self, records: Sequence[Record]) -> list[Tensor]:
        """L2-normalised `(R_i, D)` of the regions of each record."""
        if self.view == "mask_pooled":
            rows = [self._pooled(record) for record in records]
        else:
            rows = [self._shown(record) for record in records]
        return [F.normalize(row.float(), dim=-1).cpu() for row in rows]

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype)).pooler_output

    def _shown(self, record: Record) -> Tensor:
        image = open_image(record["image"])
        fill = tuple(round(255 * channel) for channel in self.mean_colour)
        show = {
            "crop": lambda region: crop(image, region, fill)["image"],
            "blur": lambda region: blurred(image, region),
            "box": lambda region: outlined(image, region),
        }[self.view]
        embeds = [self._empty()]
        for part in batches(record["regions"], self.batch_size):
            embeds.append(self._squeezed([show(region) for region in part]))
        return torch.cat(embeds)

    def _squeezed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._features(self.region_processor(images=list(pictures)).pixel_values)

    def _pooled(self, record: Record) -> Tensor:
        if not record["regions"]:
            return self._empty()
        image = open_image(record["image"])
        inputs = self.region_processor(images=[image], **region_inputs([record["regions"]], "mask"))
        pixels = inputs.pixel_values.to(self.model.device, self.model.dtype)
        tower, config = self.model.vision_model, self.model.config.vision_config
        adapter = VISION_ADAPTERS.of(config)
        grid = adapter.patch_grid(config, pixels)
        tokens = adapter.patch_tokens(tower(pixel_values=pixels).last_hidden_state, grid)
        weights = mask_patch_weights(inputs.region_masks.to(pixels.device), grid)
        pooled = adapter.pool_regions(tower, tokens, weights)
        projection = getattr(self.model, "visual_projection", None)
        return (pooled if projection is None else projection(pooled))[0]

    def _empty(self) -> Tensor:
        config = self.model.config
        width = getattr(config, "projection_dim", None) or config.vision_config.hidden_size
        return torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype)


def load_encoder(
    name_or_path: str,
    view: str = "crop",
    batch_size: int = 32,
    max_length: int | None = None,
    revision: str = "main",
    prompt: str | None = None,
    **kwargs: Any,
) -> RegionEncoder | PeerEncoder:
    """The encoder of any checkpoint: CLOC and PixCLIP (converted Alpha-CLIP too) see regions, peers see `view`.

    Args:
        name_or_path: Hub id or folder.
        view, batch_size, max_length: as in [`PeerEncoder`].
        revision: of a Hub id.
        prompt: as in [`RegionEncoder`]; peers have none.
        kwargs: of `AutoModel.from_pretrained`, such as `dtype`.
    """
    model = AutoModel.from_pretrained(name_or_path, revision=revision, **kwargs)
    processor = AutoProcessor.from_pretrained(name_or_path, revision=revision)
    if hasattr(model, "get_region_features"):
        return RegionEncoder(model, processor, batch_size, max_length, prompt)
    if prompt is not None:
        raise ValueError(f"`prompt` must be None for a {type(model).__name__}, which shows a `view`, got {prompt!r}.")
    return PeerEncoder(model, processor, view, batch_size, max_length)
