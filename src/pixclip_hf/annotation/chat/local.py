"""Questions to a transformers model on this machine: one that reads images and text, or text alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch

from ..stages import check_at_least_one, load_model
from .questions import Answer, Question, Reply, ask_until_usable


@lru_cache(maxsize=4)
def _load(name: str) -> tuple[Any, Any, bool]:
    """Model, processor (or tokenizer) and whether it reads images; stages with the same model share it."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    reads_images = AutoConfig.from_pretrained(name).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    processor = (AutoProcessor if reads_images else AutoTokenizer).from_pretrained(name)
    if not reads_images and not processor.chat_template:
        raise ValueError(f"`model` must have a chat template, got {name!r}, which has none.")
    model = load_model(AutoModelForImageTextToText if reads_images else AutoModelForCausalLM, name)
    tokenizer = getattr(processor, "tokenizer", None) if reads_images else processor
    if tokenizer is not None:
        if not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # the answer follows the prompt
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return model, processor, reads_images


@dataclass
class LocalChat:
    """Asks a model of transformers' image-text-to-text or text-generation family, greedily.

    Questions go through its chat template. A model of images without one, such as BLIP, is shown the images with the
    prompt as the start of its text, or the images alone where the prompt is empty, and answers in text, once.

    Args:
        model: folder or Hub id.
        max_new_tokens: most tokens of an answer.
        attempts: answers asked for until one can be used.
        batch_size: questions per call of the model.

    Raises:
        ValueError: a value outside its range; on the first call, a model of text without a chat template.
    """

    model: str
    max_new_tokens: int = 1024
    attempts: int = 3
    batch_size: int = field(default=8, repr=False)

    num_gpus: ClassVar[float] = 1

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_new_tokens", "attempts", "batch_size")

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions.

        Raises:
            ValueError: a question with an image, and a model of text alone; or one for JSON, and a model without a
                chat template.
        """

        def complete(batch: Sequence[Question], attempt: int) -> list[Reply]:
            parts = (batch[start : start + self.batch_size] for start in range(0, len(batch), self.batch_size))
            return [reply for part in parts for reply in self._complete(part)]

        return ask_until_usable(complete, questions, self.attempts)

    @torch.inference_mode()
    def _complete(self, questions: Sequence[Question]) -> list[Reply]:
        model, processor, _ = _load(self.model)
        inputs = self._prepare(questions)
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        prompt = inputs.get("input_ids")
        # Decoders give their prompt back in front of the answer, unless they are shown it in another way.
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        ends = _end_tokens(model)
        cut = [tokens.shape[1] >= self.max_new_tokens and last not in ends for last in tokens[:, -1].tolist()]
        # Without a template there is no other way to ask.
        final = not getattr(processor, "chat_template", None)
        return [Reply(text, cut=too_long, final=final) for text, too_long in zip(texts, cut, strict=True)]

    def _prepare(self, questions: Sequence[Question]) -> Any:
        """What the model is shown."""
        _, processor, reads_images = _load(self.model)
        images = [image for question in questions for image in question.images]
        if not reads_images and images:
            raise ValueError(f"`model` must read images for this step, got {self.model!r}, which reads text alone.")
        if not getattr(processor, "chat_template", None):
            if any(question.schema is not None for question in questions):
                raise ValueError(f"`model` must have a chat template, got {self.model!r}, which has none.")
            prompts = [question.prompt for question in questions]
            texts = {"text": prompts, "padding": True} if any(prompts) else {}
            return processor(images=images, return_tensors="pt", **texts)
        if reads_images:
            chats: list[Any] = [
                [*({"type": "image", "image": image} for image in question.images),
                 {"type": "text", "text": question.prompt}]
                for question in questions
            ]  # fmt: skip
            padding: dict[str, Any] = {"processor_kwargs": {"padding": True}}
        else:
            chats = [question.prompt for question in questions]
            padding = {"padding": True}
        return processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padding,
        )


def _end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer, and the one that fills the row of a shorter one."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {*ends, config.pad_token_id}
