"""A new caption of the whole image: by a transformers model that reads images, or from a column of the source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Value
from PIL import Image

from .stages import Batch, active_rows, add_counts, add_step, check_at_least_one, open_batch, open_image, reject

PROMPT = "Describe this image in visual detail: every object, its colour, material, shape, size and place."
_CAPTION_COLUMNS = ("captions", "alt_text")


@dataclass
class CaptionColumn:
    """The caption that the source has: the first of `captions`, or the alt text.

    Args:
        column: `"captions"` or `"alt_text"`.
        model: what the record says made the caption.
        batch_size: images a call.
    """

    column: str = "captions"
    model: str = "the source's caption"
    batch_size: int = field(default=256, repr=False)

    name: ClassVar[str] = "caption"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_caption": Value("string")}
    num_gpus: ClassVar[float] = 0

    def __post_init__(self):
        if self.column not in _CAPTION_COLUMNS:
            raise ValueError(f"`column` must be one of {', '.join(_CAPTION_COLUMNS)}, got {self.column!r}.")

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        for row in active_rows(batch):
            value = batch[self.column][row]
            text = (value[0] if value else None) if self.column == "captions" else value
            if text is None:
                reject(batch, row, self.name, f"the source has nothing in its column {self.column}")
                continue
            batch["vesl_caption"][row] = text
            add_counts(batch, row, self.name, {"captions": 1})
            add_step(batch, row, self.name, self.model)
        return batch


@dataclass
class CaptionModel:
    """Captions by a model of transformers' image-text-to-text (image-to-text) family, greedily, in VeCap's place
    (VESL, arXiv 2410.02746, section 4).

    Args:
        model: folder or Hub id.
        prompt: what is asked; through the chat template where the processor has one, else as the start of the text.
            Empty for a model that takes images alone.
        max_new_tokens: of a caption.
        min_words: a shorter caption is rejected.
        batch_size: images a call of the model.

    Raises:
        ValueError: a number of tokens or images below 1.
    """

    model: str
    prompt: str = PROMPT
    max_new_tokens: int = 256
    min_words: int = 3
    batch_size: int = field(default=8, repr=False)

    name: ClassVar[str] = "caption"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_caption": Value("string")}
    num_gpus: ClassVar[float] = 1

    def __post_init__(self):
        check_at_least_one(self, "max_new_tokens", "batch_size")
        self._loaded = None

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        rows = active_rows(batch)
        if not rows:
            return batch
        texts = self._describe([open_image(batch["image"][row]) for row in rows])
        for row, text in zip(rows, texts, strict=True):
            caption = " ".join(text.split())
            add_step(batch, row, self.name, self.model)
            if len(caption.split()) < self.min_words:
                reject(batch, row, self.name, f"fewer than {self.min_words} words", text)
            else:
                batch["vesl_caption"][row] = caption
                add_counts(batch, row, self.name, {"captions": 1})
        return batch

    @torch.inference_mode()
    def _describe(self, images: Sequence[Image.Image]) -> list[str]:
        model, processor = self._load()
        if getattr(processor, "chat_template", None):
            chats = [
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}],
                    }
                ]
                for image in images
            ]
            inputs = processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        else:
            texts = {"text": [self.prompt] * len(images), "padding": True} if self.prompt else {}
            inputs = processor(images=list(images), return_tensors="pt", **texts)
        inputs = inputs.to(model.device, model.dtype)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        prompt = inputs.get("input_ids")
        # Most decoders give their prompt back in front of the answer: as it was, or, as BLIP, as text in lower case.
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
        given = self.prompt.casefold()
        return [text[len(given) :] if given and text.casefold().startswith(given) else text for text in texts]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForImageTextToText.from_pretrained(self.model, dtype="auto").to(device).eval()
            processor = AutoProcessor.from_pretrained(self.model)
            if getattr(processor, "tokenizer", None) is not None and not model.config.is_encoder_decoder:
                # The answer follows the prompt: padding stands in front.
                processor.tokenizer.padding_side = "left"
            self._loaded = model, processor
        return self._loaded
