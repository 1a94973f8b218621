"""LongGRIT, the annotation pipeline of PixCLIP (arXiv 2511.04601): one long, checked caption of every region.

The steps are the paper's; its prompts are not public, and these are our own.
"""

from dataclasses import dataclass, field

from ..chat import BACKEND_HELP, Chat, ChatArguments, model_name, open_chat
from ..stages import Stage
from .captions import (
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
from .prompts import Prompt, load_prompt
from .text_checks import LANGUAGES, TextRules

_BACKEND = f"{BACKEND_HELP}; or `{STAND_IN}`: the source's own texts."


@dataclass
class LongGritArguments(ChatArguments):
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
        metadata={"help": "SAM (folder or Hub id) for the masks of regions that only have a box; without it their "
                  "box cuts them out."},
    )  # fmt: skip
    box_style: str = field(
        default="drawn",
        metadata={"help": "How the whole image shows the region: a `drawn` box, or its `coordinates` in the prompt.",
                  "choices": list(BOX_STYLES)},
    )  # fmt: skip
    prompts: str | None = field(
        default=None, metadata={"help": "Folder of prompts that replace the package's prompts of the same names."}
    )
    language: str = field(default="en", metadata={"help": "Language of the captions.", "choices": list(LANGUAGES)})
    min_words: int = field(
        default=TextRules.min_words, metadata={"help": "Minimum number of words of a long caption."}
    )
    max_words: int = field(
        default=TextRules.max_words, metadata={"help": "Maximum number of words of a long caption."}
    )


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

    def chat(backend: str) -> Chat:
        return open_chat(backend, arguments, seed, stand_in=OwnTexts())

    drawn = arguments.box_style == "drawn"
    look = prompt("object_caption", "language")
    place = prompt(f"context_caption_{arguments.box_style}", "language", *([] if drawn else ["box"]))
    merge = prompt("merge", "object_caption", "context_caption", "language")
    rules = TextRules(
        arguments.min_words, arguments.max_words, arguments.language, tuple(each.text for each in (look, place, merge))
    )
    verifier = chat(arguments.verifier)
    return [
        *([] if arguments.segmenter is None else [SamMasks(arguments.segmenter)]),
        ObjectCaptions(chat(arguments.object_captioner), look, arguments.language),
        Verification(verifier, prompt("verification", "object_caption", "known")),
        ContextCaptions(chat(arguments.context_captioner), place, arguments.box_style, arguments.language),
        Merge(chat(arguments.merger), merge, arguments.language),
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
    return {step: model_name(backend) for step, backend in steps.items()}
