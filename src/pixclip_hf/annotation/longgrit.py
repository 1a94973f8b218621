"""LongGRIT, the annotation pipeline of PixCLIP (arXiv 2511.04601): one long, checked caption of every region.

The steps are the paper's; its prompts are not public, and these are our own.
"""

from dataclasses import dataclass, field

from .chat import ChatEndpoint
from .local_chat import LocalChat
from .long_captions import (
    BOX_STYLES,
    CategoryCheck,
    ContextCaptions,
    FinalRules,
    Merge,
    ObjectCaptions,
    Verification,
)
from .masks import SamMasks
from .own_texts import STAND_IN, OwnTexts
from .questions import Chat, Prompt, load_prompt
from .stages import Stage
from .text_checks import LANGUAGES, TextRules

_BACKEND = (
    "`MODEL` (folder or Hub id) for transformers on this machine, `MODEL@http://HOST:PORT/v1` for a server with "
    f"OpenAI's chat API, or `{STAND_IN}`: the source's own texts."
)


@dataclass
class LongGritArguments:
    """The stages of LongGRIT; by default all models are a stand-in."""

    object_captioner: str = field(
        default=STAND_IN, metadata={"help": f"Describes the object, cut out by its mask. {_BACKEND}"}
    )
    verifier: str = field(
        default=STAND_IN, metadata={"help": "Checks that description, and the long caption; forms as above."}
    )
    context_captioner: str = field(
        default=STAND_IN, metadata={"help": "Describes place and surroundings from the whole image; forms as above."}
    )
    merger: str = field(default=STAND_IN, metadata={"help": "Merges both descriptions; forms as above."})
    segmenter: str | None = field(
        default=None,
        metadata={"help": "SAM (folder or Hub id) for the masks of regions that have a box alone; without it their "
                  "box cuts them out."},
    )  # fmt: skip
    box_style: str = field(
        default="drawn",
        metadata={"help": "How the whole image shows the region: a `drawn` box, or its `coordinates` in the prompt.",
                  "choices": list(BOX_STYLES)},
    )  # fmt: skip
    prompts: str | None = field(
        default=None, metadata={"help": "Folder of own prompts in place of the package's, by the same names."}
    )
    language: str = field(default="en", metadata={"help": "Language of the captions.", "choices": list(LANGUAGES)})
    min_words: int = field(default=TextRules.min_words, metadata={"help": "Least words of a long caption."})
    max_words: int = field(default=TextRules.max_words, metadata={"help": "Most words of a long caption."})
    max_tokens: int = field(default=1024, metadata={"help": "Most tokens of an answer."})
    attempts: int = field(default=3, metadata={"help": "Answers asked for until one can be used."})
    model_batch_size: int = field(default=8, metadata={"help": "Questions a call of a model on this machine."})
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable that holds the key of the servers."}
    )
    concurrency: int = field(default=8, metadata={"help": "Questions that a server is asked at a time."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for a server's answer."})
    retries: int = field(default=6, metadata={"help": "Retries of a request that a server did not answer."})


def _chat(backend: str, arguments: LongGritArguments, seed: int) -> Chat:
    if backend == STAND_IN:
        return OwnTexts()
    model, at, rest = backend.partition("@http")
    if not model:
        raise ValueError(f"A backend must be MODEL, MODEL@URL or {STAND_IN}, got {backend!r}.")
    if at:
        return ChatEndpoint(
            model,
            f"http{rest}",
            arguments.api_key_variable,
            max_tokens=arguments.max_tokens,
            seed=seed,
            attempts=arguments.attempts,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
    return LocalChat(model, arguments.max_tokens, arguments.attempts, batch_size=arguments.model_batch_size)


def longgrit_stages(arguments: LongGritArguments, seed: int = 0) -> list[Stage]:
    """The stages after the source.

    Raises:
        ValueError: a value outside its range, or a prompt that does not put in what it should.
        FileNotFoundError: the folder of prompts does not exist.
    """
    if arguments.box_style not in BOX_STYLES:
        raise ValueError(f"`box_style` must be one of {', '.join(BOX_STYLES)}, got {arguments.box_style!r}.")

    def prompt(name: str, *names: str) -> Prompt:
        return load_prompt(name, names, arguments.prompts)

    drawn = arguments.box_style == "drawn"
    look = prompt("object_caption", "language")
    place = prompt(f"context_caption_{arguments.box_style}", "language", *([] if drawn else ["box"]))
    merge = prompt("merge", "object_caption", "context_caption", "language")
    rules = TextRules(
        arguments.min_words, arguments.max_words, arguments.language, tuple(each.text for each in (look, place, merge))
    )
    verifier = _chat(arguments.verifier, arguments, seed)
    return [
        *([] if arguments.segmenter is None else [SamMasks(arguments.segmenter)]),
        ObjectCaptions(_chat(arguments.object_captioner, arguments, seed), look, arguments.language),
        Verification(verifier, prompt("verification", "object_caption", "known")),
        ContextCaptions(
            _chat(arguments.context_captioner, arguments, seed), place, arguments.box_style, arguments.language
        ),
        Merge(_chat(arguments.merger, arguments, seed), merge, arguments.language),
        FinalRules(rules),
        CategoryCheck(verifier, prompt("category_check", "category", "long_caption")),
    ]


def longgrit_models(arguments: LongGritArguments) -> dict[str, str]:
    """Step -> model, for the card of the dataset; addresses of servers are left out."""
    steps = {
        "masks": arguments.segmenter or "the source's",
        "object caption": arguments.object_captioner,
        "verification": arguments.verifier,
        "context caption": arguments.context_captioner,
        "merge": arguments.merger,
        "category check": arguments.verifier,
    }
    return {step: model.partition("@http")[0] for step, model in steps.items()}
