"""Questions to a server with OpenAI's chat completions API, such as vLLM or `transformers serve`."""

import base64
import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from math import inf
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit

import requests
from PIL import Image
from requests.exceptions import InvalidURL

from ...processing.processing_addresses import shown_address
from ..stages import check_at_least_one
from .questions import Answer, Question, Reply, ask_until_usable
from .transport import Response, open_session, post

logger = logging.getLogger(__name__)

TOKEN_PARAMETERS = ("max_tokens", "max_completion_tokens")
OMITTABLE = ("temperature", "seed", "response_format", *TOKEN_PARAMETERS)
# Nothing about one record: with these, as with every 5xx, no other question would fare better.
_REFUSED = (401, 403, 404, 429)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_TOO_LARGE = 413  # about the question by its very meaning
_MOST_REFUSALS = 3
_LEAST_SECRET = 12  # characters
_WORDS, _RAW = 500, 10_000  # characters of what a server says, in an error and in a record


@dataclass
class ChatEndpoint:
    """Asks a server, several questions at a time, at temperature 0.

    A server that is busy, fails or does not answer in time is asked again, after the time that it names
    (`Retry-After`) or with exponential back-off; an answer that can't be used is asked for again at once. A server
    that stays busy or down ends the run: its records are still to be asked about, not rejected. So does one that
    refuses the parameters of every question. It is told from one that refuses a single question, which is rejected,
    by a short question with the same parameters.

    Keys and passwords appear in no message, even where the server repeats them. Redirects are not followed.

    Args:
        model: what the server calls it.
        base_url: up to and with `/v1`. A user name and a password in it are sent as Basic authorization.
        api_key_variable: environment variable that holds the key. None for a server that asks for none.
        max_tokens: most tokens of an answer.
        seed: the seed of the first attempt; later ones count on from it.
        attempts: answers asked for until one can be used.
        concurrency: questions that are open at a time.
        timeout: seconds to wait for the whole of an answer.
        retries: how often a request is repeated that the server did not answer as it should.
        backoff: seconds before the second retry; each further one waits twice as long.
        max_wait: most seconds before a retry, whatever the server names.
        token_parameter: what the server calls the limit of tokens; one of [`TOKEN_PARAMETERS`].
        omit_parameters: parameters that are not sent, of [`OMITTABLE`], for a server that refuses them.

    Raises:
        ValueError: a value outside its range, an address with a query, or an environment variable that is not set.
    """

    model: str
    base_url: str = field(repr=False)
    api_key_variable: str | None = field(default=None, repr=False)
    max_tokens: int = 1024
    seed: int = 0
    attempts: int = 3
    concurrency: int = field(default=8, repr=False)
    timeout: float = field(default=120.0, repr=False)
    retries: int = field(default=6, repr=False)
    backoff: float = field(default=2.0, repr=False)
    max_wait: float = field(default=120.0, repr=False)
    # A run does not depend on how a server wants to be asked, nor on its address: a run that a server ended continues.
    token_parameter: str = field(default="max_tokens", repr=False)
    omit_parameters: Sequence[str] = field(default=(), repr=False)

    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        self._address, self._user = _read_address(self.base_url)
        check_at_least_one(self, "max_tokens", "attempts", "concurrency")
        # Written so that NaN fails too.
        if not (0 < self.timeout < inf and self.retries >= 0 and 0 <= self.backoff < inf and 0 <= self.max_wait < inf):
            raise ValueError(
                "`timeout` must be above 0 and `retries`, `backoff` and `max_wait` not below, "
                f"got {self.timeout}, {self.retries}, {self.backoff} and {self.max_wait}."
            )
        if self.token_parameter not in TOKEN_PARAMETERS:
            raise ValueError(
                f"`token_parameter` must be one of {', '.join(TOKEN_PARAMETERS)}, got {self.token_parameter!r}."
            )
        if unknown := sorted(set(self.omit_parameters) - set(OMITTABLE)):
            raise ValueError(f"`omit_parameters` must be among {', '.join(OMITTABLE)}, got {unknown[0]!r}.")
        self._authorization()
        self._session: requests.Session | None = None
        self._secrets: tuple[str, ...] = ()
        # By kind of question: what was ever accepted, and how often it was refused before that.
        self._accepted: set[str] = set()
        self._refusals: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_secrets": ()}

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions.

        Raises:
            RuntimeError: the server refuses the key or the parameters, sends elsewhere, knows neither the address nor
                the model, can't be reached, or is busy or fails (429, 5xx) after all retries.
        """
        if self._session is None:
            authorization = self._authorization()
            self._secrets = _forms([*(self._user or ())[1:], *(authorization or "").split()[1:]])
            self._session = open_session(authorization, self.concurrency)
        accepted: set[str] = set()

        def complete(batch: Sequence[Question], attempt: int) -> list[Reply]:
            with ThreadPoolExecutor(self.concurrency) as pool:
                found = list(pool.map(lambda question: self._complete(question, attempt), batch))
            asked = list(zip(batch, found, strict=True))
            accepted.update(_kind(question) for question, (status, _) in asked if 200 <= status < 300)
            self._accepted |= accepted
            for question, (status, reply) in asked:
                if _is_refusal(status) and _kind(question) not in accepted:
                    self._check_refused(question, status, reply)
                    accepted.add(_kind(question))
            return [reply for _, reply in found]

        answers = ask_until_usable(complete, questions, self.attempts)
        return [answer if answer.raw is None else replace(answer, raw=self._hide(answer.raw)) for answer in answers]

    def _complete(self, question: Question, attempt: int) -> tuple[int, Reply]:
        """Status of the response, 0 for none in time, and what it says."""
        response = self._send(self._request(question, attempt))
        if response is None:
            return 0, Reply(problem="timeout", final=True)
        status = response.status
        if 300 <= status < 400:
            elsewhere = self._hide(shown_address(response.location or ""))
            raise RuntimeError(
                f"{self._address} answers {status} and sends to {elsewhere}: redirects are not followed, for they "
                "would carry images and keys elsewhere. Name the right address."
            )
        if status in _REFUSED or status >= 500:
            raise RuntimeError(
                f"{self._address} answers {status} for the model {self.model!r}: {self._words(response.text)}"
            )
        if status >= 400:
            return status, Reply(text=self._words(response.text, _RAW), problem=f"HTTP {status}", final=True)
        raw = self._hide(response.text)[:_RAW]  # hidden before it is cut, or a part of a key would stay
        if response.problem is not None:
            return status, Reply(text=raw, problem=response.problem)
        try:
            choice = json.loads(response.text.removeprefix("\ufeff"), strict=False)["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text = _read_content(message["content"])
            refusal = message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return status, Reply(text=raw, problem="response not as the API describes")
        if text is None and isinstance(refusal, str):
            return status, Reply(text=refusal, problem="refusal")
        # Not the short ones: a password may well be a word of a caption.
        text = None if text is None else self._hide(text, _LEAST_SECRET)
        if reason == "content_filter":
            return status, Reply(text=text, problem="stopped by the server's content filter")
        return status, Reply(text=text, cut=reason == "length")

    def _send(self, content: dict[str, Any]) -> Response | None:
        """The response after all retries, None where the last one took too long."""
        wait = 0.0
        for retry in range(self.retries + 1):
            if wait:
                time.sleep(wait)
            wait = min(self.backoff * 2 ** (retry - 1), self.max_wait) if retry else 0.0
            last = retry == self.retries
            try:
                response = post(self._session, f"{self._address}/chat/completions", content, self.timeout)
            except TimeoutError:
                continue
            except requests.ConnectionError as error:
                if last:
                    message = f"{self._address} can't be reached: {self._hide(str(error))}"
                    raise RuntimeError(message) from error
                continue
            if response.status not in _RETRIED or last:
                return response
            if asked := _seconds(response.retry_after):
                wait = min(asked, self.max_wait)
                if wait < asked:
                    logger.warning(
                        f"{self._address} answers {response.status} and asks to wait {asked:g} s; it is asked again "
                        f"after {wait:g} s (`max_wait`)."
                    )
        return None

    def _check_refused(self, question: Question, status: int, reply: Reply) -> None:
        """Ends the run where it is not the question that is refused, but whatever is asked with its parameters."""
        kind = _kind(question)
        self._refusals[kind] += 1
        if _is_refusal(self._complete(_short(question), 0)[0]):
            what = "every question"
        elif kind not in self._accepted and self._refusals[kind] >= _MOST_REFUSALS:
            what = f"the first {_MOST_REFUSALS} batches of questions"
        else:
            return
        raise RuntimeError(
            f"{self._address} refuses {what} to the model {self.model!r} with {status}: {self._words(reply.text)} "
            "(`omit_parameters` leaves a refused parameter out, `token_parameter` renames the limit of tokens.)"
        )

    def _request(self, question: Question, attempt: int) -> dict[str, Any]:
        content: str | list[dict[str, Any]] = question.prompt
        if question.images:
            images = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images]
            content = [*images, {"type": "text", "text": question.prompt}]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": self.seed + attempt,
            self.token_parameter: self.max_tokens,
        }
        if question.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {name: value for name, value in request.items() if name not in self.omit_parameters}

    def _key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key:
            raise ValueError(f"`api_key_variable` names {self.api_key_variable!r}, which is not set or empty.")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"`api_key_variable` names {self.api_key_variable!r}, whose value holds characters that no key has."
            )
        return key

    def _authorization(self) -> str | None:
        key = self._key()
        if key is not None and self._user is not None:
            raise ValueError("`base_url` must hold no user name where `api_key_variable` names a key.")
        if self._user is not None:
            return "Basic " + base64.b64encode(":".join(self._user).encode()).decode("ascii")
        return None if key is None else f"Bearer {key}"

    def _hide(self, text: str, least: int = 1) -> str:
        """A text of a server without the key and the password, which some repeat, where they have `least` characters
        or more."""
        for form in self._secrets:
            if len(form) >= least:
                text = text.replace(form, "[hidden]")
        return text

    def _words(self, text: str | None, most: int = _WORDS) -> str:
        """What a server says about an error, in a line of so many characters."""
        text = text or ""
        try:
            content = json.loads(text)
            error = content.get("error", content)
            said = error if isinstance(error, str) else error.get("message") or error.get("detail")
            if isinstance(said, list):  # of FastAPI, which repeats the request behind each
                said = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in said)
            text = said if isinstance(said, str) else text
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            pass  # no JSON, or of another shape: as it is
        return " ".join(self._hide(text).split())[:most]


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_address(base_url: str) -> tuple[str, tuple[str, str] | None]:
    """The address without user and password, and these two. No message repeats what may be secret."""
    if not base_url.startswith(("http://", "https://")):
        shown = base_url.rpartition("@")[2].partition("?")[0]
        raise ValueError(f"`base_url` must start with http:// or https://, got {shown!r}.")
    unreadable = "`base_url` can't be read: special characters of a user name or password must be percent-encoded."
    try:
        parts = urlsplit(base_url)
        parts.port  # noqa: B018 (raises for one that is no number)
    except ValueError:
        raise ValueError(unreadable) from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(unreadable)
    if not parts.hostname:
        raise InvalidURL("`base_url` must name a host, got none.")
    if parts.query or parts.fragment:
        raise ValueError(
            "`base_url` must end with its path, such as /v1, and have no query: a key belongs in the environment "
            f"variable of `api_key_variable`; got {shown_address(base_url)!r} and more."
        )
    user = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return shown_address(base_url).rstrip("/"), user


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that the header names, as a number or a date; None for another form."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", text, re.ASCII):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        return max((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _read_content(content: Any) -> str | None:
    """The text of a message: a text, a list of parts, of which only those of text count, or a parsed object.

    Raises:
        TypeError: something else.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(filter(None, map(_read_content, content)))
    if not isinstance(content, Mapping):
        raise TypeError(f"the content is a {type(content).__name__}")
    if "type" not in content:
        return json.dumps(content, ensure_ascii=False)
    # Other parts are thoughts, images and the like.
    return _read_content(content["text"]) if content["type"] in ("text", "output_text") else None


def _forms(secrets: Sequence[str]) -> tuple[str, ...]:
    """Secrets as a server may repeat them: as they are, in JSON, in an address. The longest first."""
    forms: set[str] = set()
    for secret in secrets:
        escaped = json.dumps(secret)[1:-1]
        forms |= {secret, escaped, escaped.replace("/", "\\/"), quote(secret), quote(secret, safe="")}
    return tuple(sorted(forms - {""}, key=len, reverse=True))


def _is_refusal(status: int) -> bool:
    return 400 <= status < 500 and status not in _REFUSED and status != _TOO_LARGE


def _kind(question: Question) -> str:
    """Questions of one kind are sent with the same parameters."""
    return json.dumps([question.schema, len(question.images)], sort_keys=True)


def _short(question: Question) -> Question:
    """A harmless question of the same kind."""
    prompt = "Say hello." if question.schema is None else "Say hello in JSON that fits the schema."
    gray = Image.new("RGB", (224, 224), (127, 127, 127))
    return Question(prompt, question.schema, (gray,) * len(question.images))
