"""CLOC and PixCLIP as encoders: regions, whole images and texts in one space."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from ..data.collator import region_inputs
from ..modeling.modeling_patches import extent
from ..pipelines.region_batches import IMAGE_KEYS
from ..pipelines.text_embeddings import embed_texts, input_device
from ..processing.processing_text import UNLIMITED
from .base import BaseEncoder
from .protocol import Record


class RegionEncoder(BaseEncoder):
    """Embeds regions, whole images and texts with a [`CLOCModel`] or [`PixCLIPModel`]; names and defaults are those of
    sentence-transformers.

    ```python
    encoder = RegionEncoder.from_pretrained("org/cloc")
    regions = encoder.encode_regions(images, boxes=boxes)            # a list of (R, D), one for each image
    labels = encoder.encode_texts(["mug", "dog"], templates=["a photo of a {}.", "a close-up of a {}."])
    encoder.similarity(regions[0], labels)                           # (R, 2)
    ```

    Args:
        model: moved to evaluation mode.
        processor: its processor.
        prompt: what prompts regions unless a call says otherwise, `"box"`, `"mask"` or, for a CLOC that takes them,
            `"point"`; when None the usual prompt of the model: `"box"` for CLOC, `"mask"` for PixCLIP.
        max_length: tokens that texts are cut to; the tokenizer's own limit when None.

    Raises:
        ValueError: a `prompt` that the model does not take.
    """

    def __init__(self, model: Any, processor: Any, prompt: str | None = None, max_length: int | None = None):
        if not hasattr(model, "get_region_features"):
            raise ValueError(
                f"`model` must take regions, as CLOC and PixCLIP do, got {type(model).__name__}: a ViewEncoder shows "
                "regions to any CLIP or SigLIP."
            )
        self.prompts, self.modes = model.config.prompts, model.region_modes
        super().__init__(model, processor, prompt, max_length)
        self.mean_color = list(processor.image_processor.image_mean)
        self.width = model.config.projection_dim

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        prompt: str | None = None,
        max_length: int | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> "RegionEncoder":
        """The encoder of a saved model.

        Args:
            name: Hub id or folder.
            device: where the model goes; when None the accelerator if there is one, and where `device_map` says if
                that is given.
            dtype: precision of the model; `"auto"` is that of the checkpoint.
            prompt, max_length: as in the constructor.
            revision: branch, tag or commit of a Hub id.
            kwargs: other arguments of `AutoModel.from_pretrained`, such as `device_map`.

        Raises:
            ValueError: a model that takes no regions.
        """
        model = load_model(name, device, dtype, revision, **kwargs)
        return cls(model, AutoProcessor.from_pretrained(name, revision=revision), prompt, max_length)

    @property
    def settings(self) -> str:
        """What decides the embeddings beside model and processor."""
        return f"{self.max_length}, {self.prompt}"

    @property
    def text_limit(self) -> int | None:
        """Tokens that texts are cut to, None without a limit."""
        own = getattr(self.processor.tokenizer, "model_max_length", UNLIMITED)
        return self.max_length or (own if own < UNLIMITED else None)

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
        """Embeds the regions of records: `(R, D)` for each.

        Args:
            records: with `image` and `regions`, each region with `box` and `mask`, as in the record schema. A region
                without a mask prompts by the rectangle of its box where masks prompt. Where points prompt, it is one
                inside each region, see [`point_of`].
            prompt, batch_size, num_workers, show_progress_bar, convert_to_tensor, normalize_embeddings, mode: as in
                [`RegionEncoder.encode_regions`].
        """
        self._check("prompt", prompt, self.prompts)
        prompt = prompt or self.prompt
        regions: dict[str, Any] = region_inputs([record["regions"] for record in records], prompt)
        rows: Any = self.encode_regions(
            [record["image"] for record in records],
            **regions,
            prompt=prompt,
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress_bar=show_progress_bar,
            convert_to_tensor=convert_to_tensor,
            normalize_embeddings=normalize_embeddings,
            mode=mode,
        )
        return rows

    @property
    def grounds(self) -> bool:
        """Whether [`RegionEncoder.find_boxes`] can be called."""
        return getattr(self.model, "can_ground", False)

    def find_boxes(self, image: Image.Image, texts: Sequence[str]) -> Tensor:
        """Where CLOC's grounding head finds each text in an image: `(T, 4)`, xyxy in pixels."""
        return self._ground(image, texts, steady_scores=False)[0]

    def find_scored_boxes(self, image: Image.Image, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[`RegionEncoder.find_boxes`], and the similarity `(T,)` of each text to the region in its box (the
        `steady_scores` of [`CLOCModel.ground`]), which is lower where the text is absent."""
        return self._ground(image, texts, steady_scores=True)

    @torch.no_grad()
    def _ground(self, image: Image.Image, texts: Sequence[str], steady_scores: bool) -> tuple[Tensor, Tensor]:
        inputs = self.processor(images=image, text=list(texts), max_length=self.max_length, return_tensors="pt")
        found = self.model.ground(**self._moved(inputs), steady_scores=steady_scores)
        boxes = self.processor.post_process_boxes(found.pred_boxes.float(), [image.size[::-1]])[0]
        return boxes, found.scores[0].float().cpu()

    def _images_per_part(self, batch_size: int) -> int:
        return batch_size

    def _region_call(self, prompt: str) -> Callable[..., Any]:
        return partial(self.processor, prompt=prompt, normalized=False, return_tensors="pt")

    def _region_arguments(self) -> Callable[..., Any]:
        return partial(region_inputs, prompt=self.prompt)

    def _joint_features(self, inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = self.model(**self._moved(inputs))
        return outputs.region_embeds, outputs.image_embeds

    def _image_call(self) -> Callable[..., Any]:
        return partial(self.processor, return_tensors="pt")

    def _region_features(self, inputs: Any, batch_size: int, mode: str | None) -> Tensor:
        options = {} if mode is None else {"mode": mode}
        return self.model.get_region_features(**self._moved(inputs), **options).pooler_output

    def _image_features(self, inputs: Any, unscaled_mask: bool) -> Tensor:
        images = {name: inputs[name].to(input_device(self.model)) for name in IMAGE_KEYS if name in inputs}
        images["pixel_values"] = images["pixel_values"].to(self.model.dtype)
        config = self.model.config
        if not (unscaled_mask and hasattr(config, "mask_mean")):
            return self.model.get_image_features(**images).pooler_output
        pixels = images["pixel_values"]
        height, width = pixels.shape[-2:]
        if self.model.takes_patches:
            height, width = extent(images["spatial_shapes"], config.vision_config.patch_size)
        mask = pixels.new_full((len(pixels), 1, height, width), config.mask_mean + config.mask_std)
        return self.model.get_region_features(region_masks=mask, **images).pooler_output[:, 0]

    def _text_features(self, texts: Sequence[str], limit: int | None, batch_size: int, show: bool) -> Tensor:
        progress = partial(tqdm, desc="encoding texts", disable=not show, leave=False)
        return embed_texts(self.model, self.processor, texts, limit, batch_size, progress)

    def _moved(self, inputs: Any) -> Any:
        inputs = inputs.to(input_device(self.model), non_blocking=True)
        # Boxes and masks keep their own dtype: half precision has too few digits for a coordinate.
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs


def load_model(
    name: str, device: str | torch.device | None, dtype: str | torch.dtype, revision: str, **kwargs: Any
) -> Any:
    """A model of transformers, where an encoder has it. Arguments as in [`RegionEncoder.from_pretrained`]."""
    model = AutoModel.from_pretrained(name, dtype=dtype, revision=revision, **kwargs)
    if device is None and "device_map" not in kwargs:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model if device is None else model.to(device)
