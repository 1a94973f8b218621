"""Questions to a language model and its answers: text, or JSON that is checked against a schema."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jsonschema import Draft202012Validator
from PIL import Image

from ...record import is_text

_OBJECT_START = re.compile(r'\{(?=\s*["}])')
_READINGS, _LEAST_READ = 64, 4_000_000
_RETRY = "\n\nAn earlier answer could not be used: {problem}. Answer with the {form} alone."


@dataclass(frozen=True)
class Question:
    """One user turn.

    Attributes:
        prompt: text, after the images.
        schema: JSON schema of the answer, an object. None where the answer is plain text, which may then be cut at the
            limit of tokens.
        images: RGB.
        about: what the question is made of; for stand-ins, which read no prompts.
    """

    prompt: str
    schema: Mapping[str, Any] | None = None
    images: tuple[Image.Image, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """`value` fits the schema, or is the text where none was given; or `problem` says why there is no value. `raw` is
    what came back."""

    value: Any = None
    problem: str | None = None
    raw: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a model gave back, not yet read.

    Attributes:
        text: the answer, or what an endpoint said instead.
        problem: why there is nothing to read.
        final: asking again is of no use.
        cut: the text ends where the limit of tokens was reached.
    """

    text: str | None = None
    problem: str | None = None
    final: bool = False
    cut: bool = False


class Chat(Protocol):
    """The shape of what answers questions; nothing inherits from it. As with a stage, its repr tells what its answers
    depend on, and it loads on the first call."""

    @property
    def model(self) -> str:
        """In records and cards."""
        ...

    @property
    def num_gpus(self) -> float:
        """GPUs that a stage which asks it needs."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions.

        Raises:
            RuntimeError: nothing about one question: no other would fare better.
        """
        ...


def read_reply(reply: Reply, schema: Mapping[str, Any] | None) -> Answer:
    """The first JSON object of a reply that fits the schema: alone, in a code fence, or after thoughts. Without a
    schema the text, less the thoughts."""
    # Lone surrogates, which JSON can escape, can't be stored.
    raw = None if reply.text is None else reply.text.encode("utf-8", "replace").decode("utf-8")
    if reply.problem is not None:
        return Answer(problem=reply.problem, raw=raw)
    text = (raw or "").rpartition("</think>")[2]
    if schema is None and text.lstrip().startswith("<think>"):
        text = ""  # cut before the answer began
    if schema is not None and reply.cut:
        return Answer(problem="answer longer than the limit of tokens", raw=raw)
    if not text.strip():
        return Answer(problem="empty answer", raw=raw)
    if schema is None:
        return Answer(value=text, raw=raw)
    problem = "answer without a JSON object"
    validator = Draft202012Validator(dict(schema))
    for value in _json_objects(text):
        problem = "answer not as its schema asks"
        if validator.is_valid(value):
            if all(map(is_text, filter(lambda part: isinstance(part, str), value.values()))):
                return Answer(value=value, raw=raw)
            problem = "answer with an empty or broken text"
    return Answer(problem=problem, raw=raw)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, except those inside others. Line breaks may stand in their strings as they are.

    In a text of broken objects, an attempt at every brace would take the square of its length: the search ends when
    it has read the text `_READINGS` times, or a short one until `_LEAST_READ` characters were read.
    """
    decoder = json.JSONDecoder(strict=False)
    end, left = 0, max(_READINGS * len(text), _LEAST_READ)
    while left > 0 and (begin := _OBJECT_START.search(text, end)):
        start = begin.start()
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            end = start + 1
            # To name its line, the error counts the line breaks of all that is before it, only faster than reading.
            left -= error.pos - start + error.pos // 16
        except (ValueError, RecursionError):  # a number of too many digits, or too deep
            end = start + 1
            left -= len(text) - start
        else:
            yield value


def ask_until_usable(
    complete: Callable[[Sequence[Question], int], Sequence[Reply]], questions: Sequence[Question], attempts: int
) -> list[Answer]:
    """Asks again, with the reason, where an answer can't be used.

    Args:
        complete: questions and the number of the attempt -> a reply to each.
        questions: to ask.
        attempts: the number of attempts per question.
    """
    answers = [Answer()] * len(questions)
    waiting = list(range(len(questions)))
    for attempt in range(attempts):
        if not waiting:
            break
        asked = [_with_reason(questions[i], answers[i].problem) for i in waiting]
        replies = complete(asked, attempt)
        left = []
        for i, reply in zip(waiting, replies, strict=True):
            answers[i] = read_reply(reply, questions[i].schema)
            if answers[i].problem is not None and not reply.final:
                left.append(i)
        waiting = left
    return answers


def _with_reason(question: Question, problem: str | None) -> Question:
    """The question to ask again, with the reason why its last answer could not be used."""
    if problem is None:
        return question
    form = "text" if question.schema is None else "JSON object"
    # In the one user turn: not every chat template takes two in a row.
    return replace(question, prompt=question.prompt + _RETRY.format(problem=problem, form=form))
