"""The stages of LongGRIT that ask models about regions, and the final checks.

(a) A model that reads images describes each object alone, (b) a language model drops descriptions that are
inconsistent or meaningless, (c) a model that reads images describes the object's place in the whole image, (d) a
language model merges both, (e) the merged caption is checked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import List, Value

from ...images import open_image
from ...processing.processing_regions import decode_rle
from ..chat import Answer, ChatStage, Question
from ..stages import Batch, RowStage, add_counts, add_step, reject_region
from .prompts import Prompt
from .region_views import box_in_thousandths, draw_box, isolate
from .text_checks import LANGUAGES, TextRules, find_echo, is_refusal

TEXTS = List({"region": Value("int64"), "text": Value("string")})
BOX_STYLES = ("drawn", "coordinates")
_CAPTION = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
_VERDICT = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "verdict": {"type": "string", "enum": ["good", "inconsistent", "meaningless"]},
    },
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
_CONTRADICTION = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "contradiction": {"type": "boolean"}},
    "required": ["reason", "contradiction"],
    "additionalProperties": False,
}


def known_texts(region: Mapping[str, Any]) -> str:
    """What a source says about a region, one line per text, for a prompt."""
    lines = [f"{name}: {region[name]}" for name in ("category", "caption") if region[name] is not None]
    return "\n".join(lines) or "nothing"


def _texts(batch: Batch, column: str, row: int) -> dict[int, str]:
    return {entry["region"]: entry["text"] for entry in batch[column][row]}


@dataclass
class RegionQuestions(ChatStage):
    """The base of stages that ask one question about each region.

    Args:
        chat: the model to ask.
        prompt: a template; each stage says what it puts in.
        batch_size: images per call, with all their regions.
    """

    prompt: Prompt
    batch_size: int = field(default=16, repr=False, kw_only=True)

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        """The regions of a row that are asked about, each with its question."""
        raise NotImplementedError

    def ask(self, batch: Batch, rows: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any], Answer]]:
        """Asks about the regions of all rows at once. Yields row, region and answer where there is one that can be
        used; the other regions are rejected."""
        asked = [(row, region, question) for row in rows for region, question in self.questions(batch, row)]
        answers = self.chat.ask([question for _, _, question in asked]) if asked else []
        for row in dict.fromkeys(row for row, _, _ in asked):
            add_step(batch, row, self.name, self.chat.model, self.prompt.label)
        for (row, region, _), answer in zip(asked, answers, strict=True):
            if answer.problem is None:
                yield row, region, answer
            else:
                reject_region(batch, row, region["id"], self.name, answer.problem, answer.raw)

    def ask_captions(self, batch: Batch, rows: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """As [`ask`], for captions: row -> `[{"region", "text"}]`, less refusals and echoes of the prompt."""
        captions: dict[int, list[dict[str, Any]]] = {row: [] for row in rows}
        for row, region, answer in self.ask(batch, rows):
            text = " ".join(answer.value["caption"].split())
            if is_refusal(text):
                reject_region(batch, row, region["id"], self.name, "refusal", answer.raw)
            elif find_echo(text, [self.prompt.text]):
                reject_region(batch, row, region["id"], self.name, "echo of the prompt", answer.raw)
            else:
                captions[row].append({"region": region["id"], "text": text})
        for row, texts in captions.items():
            add_counts(batch, row, self.name, {"captions": len(texts)})
        return captions


@dataclass
class ObjectCaptions(RegionQuestions):
    """(a) The look of each object, from its crop with all else painted gray.

    Args:
        chat: reads images.
        prompt: puts in `$language`.
        language: one of `LANGUAGES`.
    """

    language: str = "en"

    name: ClassVar[str] = "object_caption"
    columns: ClassVar[Mapping[str, Any]] = {"longgrit_object_captions": TEXTS}

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        text = self.prompt.fill(language=LANGUAGES[self.language])
        image = open_image(batch["image"][row])
        for region in batch["regions"][row]:
            mask = None if region["mask"] is None else decode_rle(region["mask"])
            add_counts(batch, row, self.name, {"without a mask, cut out by the box": int(mask is None)})
            about = {"step": self.name, "region": region}
            yield region, Question(text, _CAPTION, (isolate(image, region["box"], mask),), about)

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row, captions in self.ask_captions(batch, rows).items():
            batch["longgrit_object_captions"][row] = captions


@dataclass
class Verification(RegionQuestions):
    """(b) Drops regions whose description is inconsistent or meaningless; the reason is in the raw answer.

    Args:
        chat: reads text.
        prompt: puts in `$object_caption` and `$known`.
    """

    name: ClassVar[str] = "verification"

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        captions = _texts(batch, "longgrit_object_captions", row)
        for region in batch["regions"][row]:
            caption = captions[region["id"]]
            about = {"step": self.name, "region": region, "object_caption": caption}
            prompt = self.prompt.fill(object_caption=caption, known=known_texts(region))
            yield region, Question(prompt, _VERDICT, about=about)

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row, region, answer in self.ask(batch, rows):
            verdict = answer.value["verdict"]
            add_counts(batch, row, self.name, {verdict: 1})
            if verdict != "good":
                caption = _texts(batch, "longgrit_object_captions", row)[region["id"]]
                raw = f"{answer.raw}\n\nabout: {caption}"
                reject_region(batch, row, region["id"], self.name, f"judged {verdict}", raw)


@dataclass
class ContextCaptions(RegionQuestions):
    """(c) Place and surroundings of each object, from the whole image with its box.

    Args:
        chat: reads images.
        prompt: puts in `$language`, and `$box` where the box is not drawn.
        box_style: `"drawn"` for a red rectangle, `"coordinates"` for numbers in the prompt.
        language: one of `LANGUAGES`.
    """

    box_style: str = "drawn"
    language: str = "en"

    name: ClassVar[str] = "context_caption"
    columns: ClassVar[Mapping[str, Any]] = {"longgrit_context_captions": TEXTS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box_style not in BOX_STYLES:
            raise ValueError(f"`box_style` must be one of {', '.join(BOX_STYLES)}, got {self.box_style!r}.")

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        language = LANGUAGES[self.language]
        image = open_image(batch["image"][row])
        for region in batch["regions"][row]:
            if self.box_style == "drawn":
                shown, prompt = draw_box(image, region["box"]), self.prompt.fill(language=language)
            else:
                box = box_in_thousandths(region["box"], *image.size)
                shown, prompt = image, self.prompt.fill(language=language, box=box)
            yield region, Question(prompt, _CAPTION, (shown,), {"step": self.name, "region": region})

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row, captions in self.ask_captions(batch, rows).items():
            batch["longgrit_context_captions"][row] = captions


@dataclass
class Merge(RegionQuestions):
    """(d) One long caption out of both; it becomes the region's `long_caption`.

    Args:
        chat: reads text.
        prompt: puts in `$object_caption`, `$context_caption` and `$language`.
        language: one of `LANGUAGES`.
    """

    language: str = "en"

    name: ClassVar[str] = "merge"

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        objects = _texts(batch, "longgrit_object_captions", row)
        contexts = _texts(batch, "longgrit_context_captions", row)
        for region in batch["regions"][row]:
            texts = {"object_caption": objects[region["id"]], "context_caption": contexts[region["id"]]}
            prompt = self.prompt.fill(language=LANGUAGES[self.language], **texts)
            yield region, Question(prompt, _CAPTION, about={"step": self.name, "region": region, **texts})

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row, captions in self.ask_captions(batch, rows).items():
            texts = {entry["region"]: entry["text"] for entry in captions}
            batch["regions"][row] = [
                {**region, "long_caption": texts[region["id"]]} for region in batch["regions"][row]
            ]


@dataclass
class FinalRules(RowStage):
    """(e) Length, language, refusals, echoes of prompts and repetition of the long caption.

    Args:
        rules: what it must be.
        batch_size: images per call.
    """

    rules: TextRules = TextRules()

    name: ClassVar[str] = "final_rules"

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            for region in batch["regions"][row]:
                if (problem := self.rules.find_problem(region["long_caption"])) is not None:
                    reject_region(batch, row, region["id"], self.name, problem, region["long_caption"])
            add_counts(batch, row, self.name, {"passed": len(batch["regions"][row])})


@dataclass
class CategoryCheck(RegionQuestions):
    """(e) Drops regions whose long caption contradicts their category; those without one are not asked about.

    Args:
        chat: reads text.
        prompt: puts in `$category` and `$long_caption`.
    """

    name: ClassVar[str] = "category_check"

    def questions(self, batch: Batch, row: int) -> Iterator[tuple[Mapping[str, Any], Question]]:
        for region in batch["regions"][row]:
            if region["category"] is None:
                add_counts(batch, row, self.name, {"without a category, not checked": 1})
                continue
            texts = {"category": region["category"], "long_caption": region["long_caption"]}
            about = {"step": self.name, "region": region}
            yield region, Question(self.prompt.fill(**texts), _CONTRADICTION, about=about)

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row, region, answer in self.ask(batch, rows):
            if answer.value["contradiction"]:
                reject_region(batch, row, region["id"], self.name, "contradicts the category", answer.raw)
            else:
                add_counts(batch, row, self.name, {"passed": 1})
