"""A stand-in for the models of LongGRIT: it answers with the texts that the source itself has of a region."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..chat import Answer, Question
from .text_checks import words_of

STAND_IN = "scenes-stand-in"


@dataclass
class OwnTexts:
    """Captioner and checker for sources with a short and a long caption of each region, such as scenes.

    The object's description is the region's caption, or else its category; that of its surroundings the long caption.
    Merging is putting one after the other. A description is good, and does not contradict, when it names the category.
    """

    model: ClassVar[str] = STAND_IN
    num_gpus: ClassVar[float] = 0

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return [_answer(**question.about) for question in questions]


def _answer(step: str, region: dict, object_caption: str = "", context_caption: str = "") -> Answer:
    if step == "object_caption":
        return _caption(region["caption"] or region["category"], "caption")
    if step == "context_caption":
        return _caption(region["long_caption"], "long caption")
    if step == "merge":
        opening = object_caption[:1].upper() + object_caption[1:]
        return _caption(f"{opening.rstrip('.')}. {context_caption}", "caption")
    category = region["category"]
    text = region["long_caption"] if step == "category_check" else object_caption
    named = category is None or set(words_of(category)) <= set(words_of(text))
    reason = "the category is named" if named else "the category is not named"
    if step == "category_check":
        return Answer({"reason": reason, "contradiction": not named}, raw=reason)
    return Answer({"reason": reason, "verdict": "good" if named else "inconsistent"}, raw=reason)


def _caption(text: str | None, what: str) -> Answer:
    if text is None:
        return Answer(problem=f"the source has no {what} of this region")
    return Answer({"caption": text}, raw=text)
