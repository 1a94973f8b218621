"""Embeddings of images, regions and texts by CLOC and PixCLIP."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.collator import region_inputs
from ..processing.processing_text import UNLIMITED

Record = Mapping[str, Any]


@torch.no_grad()
def embed_texts(
    model: Any, processor: Any, texts: Sequence[str], max_length: int | None = None, batch_size: int = 128
) -> Tensor:
    """L2-normalised embeddings `(T, D)` of texts, equal texts sharing one; cut to `max_length` tokens if given."""
    unique = list(dict.fromkeys(texts))
    inputs = processor(text=unique, max_length=max_length, return_tensors="pt")
    # Texts that a cut makes equal must tie exactly: they, too, are embedded once.
    keys = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)
    ]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = torch.tensor(sorted(first.values()))
    embeds = [
        model.get_text_features(
            inputs.input_ids[part].to(model.device), inputs.attention_mask[part].to(model.device)
        ).pooler_output
        for part in rows.split(batch_size)
    ]
    by_row = dict(zip(rows.tolist(), F.normalize(torch.cat(embeds).float(), dim=-1).cpu(), strict=True))
    by_text = {text: by_row[first[key]] for text, key in zip(unique, keys, strict=True)}
    return torch.stack([by_text[text] for text in texts])


@torch.no_grad()
def embed_images(model: Any, processor: Any, images: Sequence[Any], batch_size: int = 64) -> Tensor:
    """L2-normalised embeddings `(N, D)` of whole images."""
    embeds = [
        model.get_image_features(pixel_values(model, processor, part)).pooler_output
        for part in batches(images, batch_size)
    ]
    return F.normalize(torch.cat(embeds).float(), dim=-1).cpu()


@torch.no_grad()
def embed_regions(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    batch_size: int = 64,
    prompt: str | None = None,
    **options: Any,
) -> list[Tensor]:
    """L2-normalized embeddings `(R_i, D)` of the regions of each record, prompted by `"box"` or `"mask"` (the usual
    prompt of the model when None); `options` are of the model's `get_region_features`."""
    prompt = prompt or processor.prompts[0]
    embeds = []
    for part in batches(records, batch_size):
        inputs = processor(
            images=[record["image"] for record in part],
            return_tensors="pt",
            **region_inputs([record["regions"] for record in part], prompt),
        ).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        features = F.normalize(model.get_region_features(**inputs, **options).pooler_output.float(), dim=-1).cpu()
        embeds += [rows[: len(record["regions"])] for rows, record in zip(features, part, strict=True)]
    return embeds


def text_keys(tokenizer: Any, texts: Sequence[str], limit: int | None) -> tuple[list[tuple[int, ...]], int]:
    """The tokens of each text, cut to `limit`: equal for texts that a model cannot tell apart; and how many were cut.

    Raises:
        ValueError: no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("The processor has no tokenizer: its model takes text states, and no texts.")
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    cut = 0 if limit is None else sum(len(row) > limit for row in rows)
    if cut:
        rows = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    return [tuple(row) for row in rows], cut


class RegionEncoder:
    """A [`CLOCModel`] or [`PixCLIPModel`] as the evaluation sees it: three kinds of input, one space.

    Args:
        model: moved to evaluation mode.
        processor: its processor.
        batch_size: images, crops and texts at a time.
        max_length: tokens that texts are cut to; the tokenizer's own limit when None.
        prompt: what prompts the regions, `"box"` or `"mask"`; the usual prompt of the model when None.

    Raises:
        ValueError: a `prompt` that the model does not take.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 32,
        max_length: int | None = None,
        prompt: str | None = None,
    ):
        if prompt not in (None, *processor.prompts):
            raise ValueError(
                f"`prompt` of {type(model).__name__} must be one of {', '.join(map(repr, processor.prompts))}, "
                f"got {prompt!r}."
            )
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.max_length = batch_size, max_length
        self.prompts = processor.prompts
        self.prompt = prompt or processor.prompts[0]
        self.takes_masks = self.prompt == "mask"
        self.mean_colour = list(processor.image_processor.image_mean)

    @property
    def settings(self) -> str:
        """What beside model and processor decides the embeddings."""
        return f"{self.max_length}, {self.prompt}"

    @property
    def text_limit(self) -> int | None:
        """Tokens that texts are cut to, None without a limit."""
        own = getattr(self.processor.tokenizer, "model_max_length", UNLIMITED)
        return self.max_length or (own if own < UNLIMITED else None)

    def text_keys(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[tuple[int, ...]], int]:
        """As the function of this name; texts are cut to `max_length` tokens, `text_limit` when None."""
        return text_keys(self.processor.tokenizer, texts, max_length or self.text_limit)

    def embed_texts(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """L2-normalised `(T, D)`; texts are cut to `max_length` tokens, `text_limit` when None."""
        return embed_texts(self.model, self.processor, texts, max_length or self.max_length, self.batch_size)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any], unscaled: bool = False) -> Tensor:
        """L2-normalised `(N, D)` of whole images, PIL or paths.

        Args:
            images: PIL or paths.
            unscaled: a model with mask prompts gets a mask of 1.0 *behind* its scaling, as in PixCLIP's published
                retrieval scripts, in place of all ones before it (1.92 behind it).
        """
        if not (unscaled and hasattr(self.model.config, "mask_mean")):
            return embed_images(self.model, self.processor, images, self.batch_size)
        config, embeds = self.model.config, []
        for part in batches(images, self.batch_size):
            pixels = pixel_values(self.model, self.processor, part)
            mask = torch.full_like(pixels[:, :1], config.mask_mean + config.mask_std)
            embeds.append(self.model.get_region_features(pixels, mask).pooler_output[:, 0])
        return F.normalize(torch.cat(embeds).float(), dim=-1).cpu()

    def embed_regions(self, records: Sequence[Record], prompt: str | None = None, **options: Any) -> list[Tensor]:
        """L2-normalized `(R_i, D)` of the regions of each record, by `prompt` or the encoder's own; `options` are of
        the model's `get_region_features`."""
        width = self.model.config.projection_dim
        filled = [record for record in records if record["regions"]]
        rows = iter(
            embed_regions(self.model, self.processor, filled, self.batch_size, prompt or self.prompt, **options)
        )
        return [next(rows) if record["regions"] else torch.zeros(0, width) for record in records]

    @property
    def pools(self) -> bool:
        """Whether the model also pools regions from one pass of the image: `mode="pooled"` of PixCLIP."""
        return self.model.config.model_type == "pixclip"

    @property
    def grounds(self) -> bool:
        """Whether [`RegionEncoder.find_boxes`] can be called."""
        return getattr(self.model, "box_head", None) is not None

    @torch.no_grad()
    def find_boxes(self, image: Image.Image, texts: Sequence[str]) -> Tensor:
        """Where CLOC's grounding head finds each text in an image: `(T, 4)`, xyxy in pixels."""
        inputs = self.processor(images=image, text=list(texts), max_length=self.max_length, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        found = self.model.ground(**inputs)
        return self.processor.post_process_boxes(found.pred_boxes.float(), [image.size[::-1]])[0]


def pixel_values(model: Any, processor: Any, images: Sequence[Any]) -> Tensor:
    """Processed images `(N, 3, H, W)` where and as the model takes them."""
    return processor(images=list(images), return_tensors="pt").pixel_values.to(model.device, model.dtype)


def square_crop(image: Any, box: Sequence[float], scale: float) -> Any:
    """Square of `scale` times the longer side of a box (xyxy pixels) around it; black beyond the image."""
    x0, y0, x1, y1 = box
    half = scale * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """`items` in parts of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
