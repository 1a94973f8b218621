"""Questions to a server with OpenAI's chat completions API, such as vLLM or `transformers serve`."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from urllib3.exceptions import MaxRetryError, ReadTimeoutError
from urllib3.util import Retry

from ..stages import check_at_least_one
from .questions import Answer, Question, Reply, ask_until_usable

# Nothing about one record: with these, as with every 5xx, no other question would fare better.
_REFUSED = (401, 403, 404, 429)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_CONNECT_SECONDS = 10


@dataclass
class ChatEndpoint:
    """Asks a server, several questions at a time, at temperature 0.

    A server that is busy, fails or does not answer in time is asked again, after the time that it names
    (`Retry-After`) or with exponential back-off; an answer that can't be used is asked for again at once. A server
    that stays busy or down ends the run: its records are still to be asked about, not rejected.

    Args:
        model: what the server calls it.
        base_url: up to and with `/v1`.
        api_key_variable: environment variable that holds the key. None for a server that asks for none.
        max_tokens: of an answer.
        seed: of the first attempt; later ones count on from it.
        attempts: answers asked for until one can be used.
        concurrency: questions that are open at a time.
        timeout: seconds to wait for an answer.
        retries: of a request that the server did not answer as it should.
        backoff: seconds before the second retry; each further one waits twice as long.

    Raises:
        ValueError: a value outside its range, or an environment variable that is not set.
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

    num_gpus: ClassVar[float] = 0

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must start with http:// or https://, got {self.base_url!r}.")
        check_at_least_one(self, "max_tokens", "attempts", "concurrency")
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0:
            raise ValueError(
                "`timeout` must be above 0 and `retries` and `backoff` not below, "
                f"got {self.timeout}, {self.retries} and {self.backoff}."
            )
        self._key()
        self._session: requests.Session | None = None

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions.

        Raises:
            RuntimeError: the server refuses the key, knows neither the address nor the model, can't be reached, or
                is busy or fails (429, 5xx) after all retries.
        """
        if self._session is None:
            self._session = self._open()

        def complete(batch: Sequence[Question], attempt: int) -> list[Reply]:
            with ThreadPoolExecutor(self.concurrency) as pool:
                return list(pool.map(lambda question: self._complete(question, attempt), batch))

        return ask_until_usable(complete, questions, self.attempts)

    def _key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise ValueError(f"`api_key_variable` names {self.api_key_variable!r}, which is not set or empty.")
        return key

    def _open(self) -> requests.Session:
        retry = Retry(
            total=self.retries,
            status_forcelist=_RETRIED,
            allowed_methods=None,
            backoff_factor=self.backoff / 2,
            raise_on_status=False,
        )
        session = requests.Session()
        key = self._key()

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key is not None:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        session.auth = authorize  # and not a header: an entry in .netrc would take its place
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=self.concurrency))
        return session

    def _complete(self, question: Question, attempt: int) -> Reply:
        try:
            response = self._session.post(
                f"{self.base_url.rstrip('/')}/chat/completions",
                json=self._request(question, attempt),
                timeout=(_CONNECT_SECONDS, self.timeout),
            )
        except requests.ConnectionError as error:
            cause = error.args[0] if error.args else None
            if isinstance(cause, MaxRetryError):
                cause = cause.reason
            if not isinstance(cause, ReadTimeoutError):
                raise RuntimeError(f"{self.base_url} can't be reached: {error}") from error
            return Reply(problem="timeout", final=True)
        except (ChunkedEncodingError, ContentDecodingError) as error:
            return Reply(text=str(error), problem="response cut off")
        if response.status_code in _REFUSED or response.status_code >= 500:
            raise RuntimeError(
                f"{self.base_url} answers {response.status_code} for the model {self.model!r}: {response.text:.500}"
            )
        if not response.ok:
            return Reply(text=response.text, problem=f"HTTP {response.status_code}", final=True)
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return Reply(text=response.text, problem="response not as the API describes")
        return Reply(text=text, cut=choice.get("finish_reason") == "length")

    def _request(self, question: Question, attempt: int) -> dict[str, Any]:
        content: str | list[dict[str, Any]] = question.prompt
        if question.images:
            pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images]
            content = [*pictures, {"type": "text", "text": question.prompt}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": self.seed + attempt,
            "max_tokens": self.max_tokens,
        }
        if question.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
