"""A new caption of the whole image: by a language model that reads images, or from a column of the source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Value

from ...images import open_image
from ..chat import ChatStage, Question
from ..stages import Batch, RowStage, add_counts, add_step, reject

PROMPT = "Describe this image in visual detail: every object, its colour, material, shape, size and place."
_CAPTION_COLUMNS = ("captions", "alt_text")


@dataclass
class CaptionColumn(RowStage):
    """The caption that the source has: the first of `captions`, or the alt text.

    Args:
        column: `"captions"` or `"alt_text"`.
        model: what the record says made the caption.
        batch_size: images per call.
    """

    column: str = "captions"
    model: str = "the source's caption"
    batch_size: int = field(default=256, repr=False, kw_only=True)

    name: ClassVar[str] = "caption"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_caption": Value("string")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column not in _CAPTION_COLUMNS:
            raise ValueError(f"`column` must be one of {', '.join(_CAPTION_COLUMNS)}, got {self.column!r}.")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            value = batch[self.column][row]
            text = (value[0] if value else None) if self.column == "captions" else value
            if text is None:
                reject(batch, row, self.name, f"the source has nothing in its column {self.column}")
                continue
            batch["vesl_caption"][row] = text
            add_counts(batch, row, self.name, {"captions": 1})
            add_step(batch, row, self.name, self.model)


@dataclass
class ImageCaptions(ChatStage):
    """Captions by a language model, in VeCap's place (VESL, arXiv 2410.02746, section 4).

    Args:
        chat: reads images.
        prompt: what is asked. Empty for a model that takes images alone.
        min_words: a shorter caption is rejected.
        batch_size: images per call.

    Raises:
        ValueError: a batch size below 1.
    """

    prompt: str = PROMPT
    min_words: int = 3
    batch_size: int = field(default=8, repr=False, kw_only=True)

    name: ClassVar[str] = "caption"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_caption": Value("string")}

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        questions = [Question(self.prompt, images=(open_image(batch["image"][row]),)) for row in rows]
        for row, answer in zip(rows, self.chat.ask(questions), strict=True):
            add_step(batch, row, self.name, self.chat.model)
            if answer.problem is not None:
                reject(batch, row, self.name, answer.problem, answer.raw)
                continue
            text = _without(self.prompt, answer.value.strip())
            caption = " ".join(text.split())
            if len(caption.split()) < self.min_words:
                reject(batch, row, self.name, f"fewer than {self.min_words} words", text)
            else:
                batch["vesl_caption"][row] = caption
                add_counts(batch, row, self.name, {"captions": 1})


def _without(prompt: str, text: str) -> str:
    """A text without the prompt in front of it, which some models give back, as BLIP in lower case."""
    given = prompt.casefold()
    return text[len(given) :] if given and text.casefold().startswith(given) else text
