"""Checks of a generated caption that need no model: length, language, refusals, echoes of the prompt, repetition."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module

LANGUAGES = {
    "en": "English",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pt": "Portuguese",
}
# A sentence has about half of its words on its language's stop list, one of another language seldom a fifth.
_STOP_WORD_SHARE = 0.15
_ECHO_WORDS = 8
_REPEATED_WORDS, _NEW_SHARE = 5, 0.5
_REFUSAL = re.compile(
    r"\b(i('m| am) (very |so )?(sorry|unable|not able|afraid)|i apologi[sz]e|"
    r"i (can't|can ?not|could not|couldn't|don't|do not|am not able to|won't) "
    r"(see|view|assist|help|describe|provide|determine|identify|access|process|fulfill|comply)|"
    r"as an ai\b|(ai|large) language model|no image (was|is|has been) (provided|attached|given)|"
    r"(provide|upload|share) (me )?(with )?(an|the|your) image)"
)
_MARK = re.compile(r"\bbounding box|\b(marked|highlighted|outlined|enclosed|indicated) (by|with|in) (a|the) red\b")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, with apostrophes, without punctuation and numbers."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.replace("’", "'").lower())


def is_refusal(text: str) -> bool:
    """Whether a model speaks of itself instead of what it was shown, in English."""
    return _REFUSAL.search(text.replace("’", "'").lower()) is not None


def find_echo(text: str, prompts: Sequence[str]) -> bool:
    """Whether the text has eight words in a row of a prompt, or speaks of the mark that was drawn on the image."""
    if _MARK.search(text.lower()):
        return True
    given = set().union(*(_runs(words_of(prompt), _ECHO_WORDS) for prompt in prompts))
    return not given.isdisjoint(_runs(words_of(text), _ECHO_WORDS))


def repeats_itself(text: str) -> bool:
    """Whether over half of all runs of five words stood in the text before, as when a model is caught in a loop."""
    words = words_of(text)
    number = len(words) - _REPEATED_WORDS + 1
    return number > 0 and len(_runs(words, _REPEATED_WORDS)) < _NEW_SHARE * number


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@lru_cache(maxsize=1)
def _stop_words() -> dict[str, frozenset[str]]:
    return {
        language: frozenset(import_module(f"spacy.lang.{language}.stop_words").STOP_WORDS) for language in LANGUAGES
    }


def guess_language(text: str) -> str | None:
    """The language of `LANGUAGES` on whose stop list (spaCy's) most of the words stand, None below 15 % of them.

    A heuristic for whole sentences: keywords have no stop words, and a language that is not on the list can pass for
    its nearest relative there.
    """
    words = words_of(text)
    shares = {
        language: sum(word in stop_words for word in words) / max(len(words), 1)
        for language, stop_words in _stop_words().items()
    }
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= _STOP_WORD_SHARE else None


@dataclass(frozen=True)
class TextRules:
    """What a finished caption must be.

    Attributes:
        min_words, max_words: its length.
        language: one of `LANGUAGES`.
        prompts: texts that it must not repeat.
    """

    min_words: int = 20
    max_words: int = 400
    language: str = "en"
    prompts: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"`min_words` must lie between 1 and `max_words`, got {self.min_words} and {self.max_words}."
            )
        if self.language not in LANGUAGES:
            raise ValueError(f"`language` must be one of {', '.join(LANGUAGES)}, got {self.language!r}.")

    def find_problem(self, text: str) -> str | None:
        """The first rule that the text breaks, as a reason, or None."""
        number = len(text.split())
        if is_refusal(text):
            return "refusal"
        if find_echo(text, self.prompts):
            return "echo of the prompt"
        if number < self.min_words:
            return f"fewer than {self.min_words} words"
        if number > self.max_words:
            return f"more than {self.max_words} words"
        if repeats_itself(text):
            return "repeats itself"
        if guess_language(text) != self.language:
            return f"not {LANGUAGES[self.language]}"
        return None
