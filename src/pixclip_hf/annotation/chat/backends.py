"""What a model to ask is called on the command line, and the settings that all of them share."""

import re
from dataclasses import dataclass, field

from .endpoint import OMITTABLE, TOKEN_PARAMETERS, ChatEndpoint
from .local import LocalChat
from .questions import Chat

BACKEND_HELP = (
    "`MODEL` (folder or Hub id) for transformers on this machine, or `MODEL@http://HOST:PORT/v1` for a server with "
    "OpenAI's chat API"
)


@dataclass
class ChatArguments:
    """How models are asked, wherever they run."""

    max_tokens: int = field(default=1024, metadata={"help": "Maximum number of tokens of an answer."})
    attempts: int = field(
        default=3, metadata={"help": "How many times a question is asked until its answer can be used."}
    )
    model_batch_size: int = field(default=8, metadata={"help": "Questions per call of a model on this machine."})
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable that holds the key of the servers."}
    )
    concurrency: int = field(default=8, metadata={"help": "Questions that each server is asked at the same time."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for a server's answer."})
    retries: int = field(
        default=6, metadata={"help": "How many times a request that a server did not answer is sent again."}
    )
    max_wait: float = field(
        default=120.0,
        metadata={"help": "Maximum number of seconds to wait before a retry, whatever the server asks for."},
    )
    token_parameter: str = field(
        default="max_tokens",
        metadata={"help": "What the servers call the limit of tokens.", "choices": list(TOKEN_PARAMETERS)},
    )
    omit_parameters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parameters to leave out of requests because the servers refuse them.",
            "choices": list(OMITTABLE),
        },
    )


def _split(backend: str) -> tuple[str, str | None]:
    """(model, address of its server or None)."""
    model, at, rest = backend.partition("@http")
    return model, f"http{rest}" if at else None


def model_name(backend: str) -> str:
    """The model of a backend, for records and cards, without the address of its server."""
    return _split(backend)[0]


def open_chat(backend: str, arguments: ChatArguments, seed: int = 0, stand_in: Chat | None = None) -> Chat:
    """A model to ask, by its name; it is loaded or connected to on the first question.

    Args:
        backend: `MODEL`, or `MODEL@URL` with a URL up to and with `/v1`.
        arguments: how it is asked.
        seed: the seed of a server's answers.
        stand_in: what answers where the backend is its `model`.

    Raises:
        ValueError: a backend without a model, or a value outside its range.
    """
    if stand_in is not None and backend == stand_in.model:
        return stand_in
    model, url = _split(backend)
    if not model:
        forms = "MODEL or MODEL@URL" if stand_in is None else f"MODEL, MODEL@URL or {stand_in.model}"
        shown = re.sub(r"//[^/@]*@", "//", backend)  # without a password
        raise ValueError(f"A backend must be {forms}, got {shown!r}.")
    if url is None:
        return LocalChat(model, arguments.max_tokens, arguments.attempts, batch_size=arguments.model_batch_size)
    return ChatEndpoint(
        model,
        url,
        arguments.api_key_variable,
        max_tokens=arguments.max_tokens,
        seed=seed,
        attempts=arguments.attempts,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
        max_wait=arguments.max_wait,
        token_parameter=arguments.token_parameter,
        omit_parameters=tuple(arguments.omit_parameters),
    )
