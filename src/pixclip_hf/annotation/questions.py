"""Questions to a chat model, prompts from versioned files, and answers as JSON, checked against a schema."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Protocol

from jsonschema import Draft202012Validator
from PIL import Image

_RETRY = "\n\nAn earlier answer could not be used: {problem}. Answer with the JSON object alone."


@dataclass(frozen=True)
class Question:
    """One user turn.

    Attributes:
        prompt: text, after the images.
        schema: JSON schema of the answer, an object.
        images: RGB.
        about: what the question is made of; for stand-ins, which read no prompts.
    """

    prompt: str
    schema: Mapping[str, Any]
    images: tuple[Image.Image, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """`value` fits the schema, or `problem` says why there is none. `raw` is what came back."""

    value: dict[str, Any] | None = None
    problem: str | None = None
    raw: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a model gave back, not yet read.

    Attributes:
        text: the answer, or what an endpoint said instead.
        problem: why there is nothing to read.
        final: asking again is of no use.
    """

    text: str | None = None
    problem: str | None = None
    final: bool = False


class Chat(Protocol):
    """The shape of what answers questions; nothing inherits from it. As with a stage, its repr tells what its answers
    depend on, and it loads on the first call."""

    model: str
    """In records and cards."""
    num_gpus: float

    def ask(self, questions: Sequence[Question]) -> list[Answer]: ...


def read_reply(reply: Reply, schema: Mapping[str, Any]) -> Answer:
    """The first JSON object of a reply that fits the schema: alone, in a code fence, or after thoughts."""
    # Lone surrogates, which JSON can escape, can't be stored.
    raw = None if reply.text is None else reply.text.encode("utf-8", "replace").decode("utf-8")
    if reply.problem is not None:
        return Answer(problem=reply.problem, raw=raw)
    text = (raw or "").rpartition("</think>")[2]
    if not text.strip():
        return Answer(problem="empty answer", raw=raw)
    problem = "answer without a JSON object"
    validator = Draft202012Validator(dict(schema))
    start = text.find("{")
    while start >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            problem = "answer not as its schema asks"
            if validator.is_valid(value):
                if all(map(_is_text, filter(lambda part: isinstance(part, str), value.values()))):
                    return Answer(value=value, raw=raw)
                problem = "answer with an empty or broken text"
        start = text.find("{", end)
    return Answer(problem=problem, raw=raw)


def _is_text(value: str) -> bool:
    return bool(value.strip()) and not any("\ud800" <= character <= "\udfff" for character in value)


def ask_until_usable(
    complete: Callable[[Sequence[Question], int], Sequence[Reply]], questions: Sequence[Question], attempts: int
) -> list[Answer]:
    """Asks again, with the reason, where an answer can't be used.

    Args:
        complete: questions and the number of the attempt -> a reply to each.
        questions: to ask.
        attempts: of each question.
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
    if problem is None:
        return question
    # In the one user turn: not every chat template takes two in a row.
    prompt = question.prompt + _RETRY.format(problem=problem)
    return Question(prompt, question.schema, question.images, question.about)


@dataclass(frozen=True)
class Prompt:
    """A prompt from a file: its first line is `version: …`, the rest a template with `$name` for what is put in.

    Attributes:
        name: of the file, without `.txt`.
        version: from the file.
        digest: start of the SHA-256 of the text, which tells an edited file from the original.
        text: the template.
    """

    name: str
    version: str
    digest: str
    text: str = field(repr=False)

    @property
    def label(self) -> str:
        """What a record says: `object_caption 1 (5f0c1b2a)`."""
        return f"{self.name} {self.version} ({self.digest})"

    def fill(self, **values: str) -> str:
        return Template(self.text).substitute(values)


def load_prompt(name: str, names: Sequence[str], folder: str | None = None) -> Prompt:
    """Reads `NAME.txt`, from `folder` where it is given and has the file, else from the package.

    Args:
        name: of the prompt.
        names: what its template must put in, and all that it may.
        folder: of the user's own prompts.

    Raises:
        ValueError: no version line, or a template with other names.
        FileNotFoundError: `folder` does not exist.
    """
    path = files(__package__) / "prompts" / f"{name}.txt"
    if folder is not None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"`prompts` must be a folder, got {folder!r}, which does not exist.")
        if (own := Path(folder, f"{name}.txt")).exists():
            path = own
    head, _, text = path.read_text(encoding="utf-8").partition("\n")
    key, _, version = head.partition(":")
    if key.strip() != "version" or not version.strip():
        raise ValueError(f"{path}: the first line must be `version: …`, got {head!r}.")
    text = text.strip()
    template = Template(text)
    if not template.is_valid() or set(template.get_identifiers()) != set(names):
        wanted = ", ".join(f"${name}" for name in names)
        raise ValueError(f"{path}: the template must hold {wanted} and no other name, got {text!r:.200}.")
    return Prompt(name, version.strip(), hashlib.sha256(text.encode()).hexdigest()[:8], text)
