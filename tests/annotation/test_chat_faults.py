"""What chat servers do that their API does not say: other shapes, refusals, slowness, redirects, and repeated keys."""

import json
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote

import pytest
from chat_server import serving
from datasets import load_dataset
from PIL import Image

from pixclip_hf.annotation.chat import Answer, ChatEndpoint, Question, Reply, open_chat, read_reply
from pixclip_hf.annotation.chat.transport import MOST_BYTES
from pixclip_hf.annotation.longgrit import LongGritArguments, longgrit_stages
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.vesl.phrases import PhraseCandidates

SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
GOOD = '{"caption": "a red star"}'
KEY = "sk-a/b+c=0123456789"
IMAGE = Image.new("RGB", (8, 8), (200, 30, 30))


def endpoint(server, **options):
    return ChatEndpoint("tiny", server.url, **{"backoff": 0, "retries": 1, "timeout": 20, "attempts": 1, **options})


def ask(fault, **options):
    """The answer of a server with a fault at every request, and the server."""
    with serving(lambda asked: GOOD, lambda asked, number: fault) as server:
        (answer,) = endpoint(server, **options).ask([Question("What?", SCHEMA)])
    return answer, server


def send(handler, body, status=200, length=None, **headers):
    """Answers with these bytes; without a length they end with the connection."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(body)


def sends(body, status=200, length=None, **headers):
    return lambda handler: send(handler, body, status, length, **headers)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": GOOD}],
        [
            {"type": "thinking", "thinking": "{"},
            {"type": "text", "text": GOOD[:9]},
            {"type": "text", "text": GOOD[9:]},
        ],
        [{"type": "output_text", "text": GOOD}],
        [GOOD],
        {"type": "text", "text": GOOD},
        {"caption": "a red star"},
        [{"type": "text", "text": {"caption": "a red star"}}],
        "\ufeff" + GOOD,
    ],
    ids=str,
)
def test_contents_of_other_shapes(content):
    answer, _ = ask({"content": content})
    assert answer.value == {"caption": "a red star"}, answer


@pytest.mark.parametrize("content", [3, True, [3], {"type": "text"}], ids=str)
def test_contents_of_no_known_shape(content):
    answer, _ = ask({"content": content})
    assert answer.problem == "response not as the API describes" and json.dumps(content) in answer.raw


@pytest.mark.parametrize("content", [[], [{"type": "thinking", "thinking": GOOD}]], ids=str)
def test_contents_without_text(content):
    assert ask({"content": content})[0].problem == "empty answer"


@pytest.mark.parametrize(
    "body",
    [b"<html>502</html>", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"choices": {}}', b'{"choices": [3]}', b"1" * 5000,
     b'{"choices": [{"message": []}]}', b'data: {"choices": []}', b'{"error": {"message": "no"}}'],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_answers_that_are_no_chat_completions(body):
    answer, _ = ask(sends(body, length=len(body)))
    assert answer.problem == "response not as the API describes"
    assert answer.raw[:9] == body.decode("utf-8", "replace")[:9] and len(answer.raw) <= 10_000


def test_line_breaks_in_strings_are_read():
    content = '{"caption": "a red\nstar"}'
    assert ask({"content": content})[0].value == {"caption": "a red\nstar"}
    # In the strings of the response itself, too.
    body = json.dumps({"choices": [{"message": {"content": "#"}}]}).replace("#", json.dumps(GOOD)[1:-1] + "\n")
    assert ask(sends(body.encode()))[0].value == {"caption": "a red star"}
    assert read_reply(Reply('Here: {"caption": "a\n\tred star"}'), SCHEMA).value == {"caption": "a\n\tred star"}


def trickle(handler, data, head=b""):
    """Sends `head` at once, and of `data` a byte at a time, for ever."""
    handler.wfile.write(head)
    while True:
        for byte in data:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)


OK = b"HTTP/1.1 200 OK\r\n"
SLOW = {
    "status line": lambda handler: trickle(handler, b"HTTP/1.1 200 OK"),
    "headers": lambda handler: trickle(handler, b"X-More: a\r\n", OK),
    "body": lambda handler: trickle(handler, b" ", OK + b"Content-Length: 99999\r\n\r\n"),
    "body without a length": lambda handler: trickle(handler, b" ", OK + b"\r\n"),
    "chunks": lambda handler: trickle(handler, b"1\r\n \r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_answers_end_at_the_time_limit(name):
    begin = time.monotonic()
    answer, server = ask(SLOW[name], timeout=0.6, retries=1)
    assert answer.problem == "timeout" and server.times_asked.total() == 2
    assert 1.1 < time.monotonic() - begin < 10


def test_endless_and_huge_answers_are_cut():
    sent = 0

    def endless(handler):
        nonlocal sent
        send(handler, b"")
        while True:
            handler.wfile.write(b"x" * 2**16)
            sent += 2**16

    answer, _ = ask(endless)
    assert answer.problem == f"response of more than {MOST_BYTES} bytes" and len(answer.raw) == 10_000
    assert sent < 64 * MOST_BYTES
    body = json.dumps({"choices": [{"message": {"content": "x" * MOST_BYTES}}]}).encode()
    assert ask(sends(body, length=len(body)))[0].problem.startswith("response of more than")


def test_an_endpoint_serves_again_after_a_timeout():
    faults = [SLOW["body"], None, None]
    with serving(lambda asked: GOOD, lambda asked, number: faults[number]) as server:
        chat = endpoint(server, timeout=0.6, retries=0, concurrency=1)
        first, second, third = (chat.ask([Question("What?", SCHEMA)])[0] for _ in range(3))
    assert first.problem == "timeout" and second == third == Answer({"caption": "a red star"}, raw=GOOD)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("86400", 120), ("1.5", 1.5), ("9" * 400, 120), ("soon", 4), ("-5", 4), ("nan", 4), ("", 4), ("0", 4),
        (timedelta(days=3), 120), (timedelta(seconds=100), 100), (timedelta(days=-9), 4),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 4),
    ],
    ids=str,
)  # fmt: skip
def test_waits_are_bounded_and_said(header, expected, monkeypatch, caplog):
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    faults = [503, 503, (429, {"Retry-After": header}), None]
    with serving(lambda asked: GOOD, lambda asked, number: faults[number]) as server, caplog.at_level(logging.WARNING):
        (answer,) = endpoint(server, retries=3, backoff=2.0).ask([Question("What?", SCHEMA)])
    assert answer.problem is None
    # The first retry comes at once, the second after 2 s; a date has whole seconds, and some have passed.
    assert waits[0] == 2 and len(waits) == 2
    assert 80 < waits[1] <= 100 if expected == 100 else waits[1] == expected
    assert ("asks to wait" in caplog.text and "after 120 s" in caplog.text) == (expected == 120)


def refuse(*names):
    """Status 400 for a request that has one of the parameters."""
    body = json.dumps({"error": {"message": f"Unsupported parameter: {names[0]}"}}).encode()
    return lambda asked, number: sends(body, 400) if any(name in asked["body"] for name in names) else None


@pytest.mark.parametrize("images", [(), (IMAGE,)], ids=["text", "image"])
@pytest.mark.parametrize("schema", [None, SCHEMA], ids=["plain", "json"])
def test_refused_parameters_end_the_run_and_options_help(images, schema):
    questions = [Question(f"What {i}?", schema, images) for i in range(3)]
    with serving(lambda asked: GOOD, refuse("max_tokens", "temperature")) as server:
        with pytest.raises(
            RuntimeError, match="refuses every question to the model 'tiny' with 400: Unsupported para"
        ):
            endpoint(server).ask(questions)
        chat = endpoint(server, token_parameter="max_completion_tokens", omit_parameters=["temperature"])
        assert [answer.problem for answer in chat.ask(questions)] == [None] * 3
    body = server.questions[-1]["body"]
    assert body["max_completion_tokens"] == 1024 and "seed" in body
    assert ("response_format" in body) == (schema is SCHEMA)
    assert repr(chat) == repr(endpoint(server))  # the run that was ended goes on with them


def test_all_parameters_can_be_left_out():
    names = ["temperature", "seed", "response_format", "max_tokens"]
    with serving(lambda asked: GOOD) as server:
        endpoint(server, omit_parameters=names).ask([Question("What?", SCHEMA)])
        assert server.questions[0]["body"].keys() == {"model", "messages"}
        chat = open_chat(f"tiny@{server.url}", LongGritArguments(omit_parameters=names))
        assert chat.omit_parameters == tuple(names)
    with pytest.raises(ValueError, match="`omit_parameters` must be among temperature, .*, got 'model'"):
        ChatEndpoint("m", "http://localhost/v1", omit_parameters=["model"])
    with pytest.raises(ValueError, match="`token_parameter` must be one of max_tokens, .*, got 'tokens'"):
        ChatEndpoint("m", "http://localhost/v1", token_parameter="tokens")


@pytest.mark.parametrize("status", [400, 402, 422])
def test_a_question_that_is_refused_alone_is_rejected(status):
    with serving(lambda asked: GOOD, lambda asked, number: status if "bad" in asked["prompt"] else None) as server:
        chat = endpoint(server)
        (bad,) = chat.ask([Question("bad", SCHEMA, (IMAGE,))])
        assert bad.problem == f"HTTP {status}" and "on demand" in bad.raw
        assert len(server.questions) == 2  # and a short one with the same parameters
        answers = chat.ask([Question("bad", SCHEMA), Question("good", SCHEMA)])
        assert [answer.problem for answer in answers] == [f"HTTP {status}", None]
        assert len(server.questions) == 4  # none more: one like it was accepted
        with pytest.raises(RuntimeError, match=f"refuses the first 3 batches .* with {status}: status {status} on"):
            for _ in range(3):
                chat.ask([Question("bad", None)])


def test_words_of_a_server_that_repeats_the_request():
    body = {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": "x" * 9999}]}
    with pytest.raises(RuntimeError, match="with 422: body.seed: Extra inputs are not permitted [(]"):
        ask(sends(json.dumps(body).encode(), 422))


def test_nothing_is_done_when_parameters_are_refused(tmp_path):
    with serving(lambda asked: GOOD, refuse("max_tokens")) as server:
        names = ("object_captioner", "verifier", "context_captioner", "merger")
        arguments = LongGritArguments(**{name: f"tiny@{server.url}" for name in names}, retries=0, attempts=1)
        with pytest.raises(RuntimeError, match="Unsupported parameter: max_tokens"):
            annotate("scenes:4", longgrit_stages(arguments), tmp_path / "run", shard_size=2, progress=False)
        assert not list((tmp_path / "run" / "shards").iterdir())
        arguments.token_parameter = "max_completion_tokens"
        run = annotate("scenes:4", longgrit_stages(arguments), tmp_path / "run", shard_size=2, progress=False)
    rejected = load_dataset(
        "parquet", data_files=str(run / "rejected/*"), split="train", cache_dir=str(tmp_path / "c")
    )
    # The server describes everything as a star, and is no judge.
    assert set(rejected["rejected_reason"]) == {"answer not as its schema asks", "no region left"}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_carry_nothing_elsewhere(status):
    with serving(lambda asked: GOOD) as other:
        fault = sends(b"", status, 0, Location=f"{other.url}/chat/completions?key={KEY}")
        with pytest.raises(
            RuntimeError, match=f"answers {status} and sends to {other.url}/chat/completions: "
        ) as error:
            ask(fault)
        assert not other.questions and KEY not in str(error.value)


def test_keys_are_in_no_message_and_no_record(monkeypatch, caplog):
    monkeypatch.setenv("TINY_KEY", KEY + "\n")
    escaped = json.dumps(KEY).replace("/", "\\/")[1:-1]
    for status, body in [(401, KEY), (400, f"Bearer {KEY}"), (500, escaped), (422, "x" * 495 + KEY)]:
        with caplog.at_level(logging.DEBUG), pytest.raises(RuntimeError) as error:
            ask(sends(body.encode(), status), retries=0, api_key_variable="TINY_KEY")
        assert f"{status}" in str(error.value) and "sk-a" not in str(error.value)
    with pytest.raises(RuntimeError, match="sends to http://elsewhere/") as error, caplog.at_level(logging.DEBUG):
        ask(sends(b"", 302, 0, Location=f"http://elsewhere/{quote(KEY)}"), api_key_variable="TINY_KEY")
    assert "[hidden]" in str(error.value) and "0123456789" not in str(error.value)
    for fault in ({"content": f"Your key is {KEY}."}, sends(KEY.encode()), sends(b"x" * 9990 + KEY.encode(), 413)):
        answer, server = ask(fault, api_key_variable="TINY_KEY")
        assert answer.problem is not None and "[hidden]" in answer.raw and "sk-a" not in answer.raw
    answer, server = ask({"content": json.dumps({"caption": f"It says {KEY}."})}, api_key_variable="TINY_KEY")
    assert answer.value == {"caption": "It says [hidden]."}
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "sk-a" not in caplog.text


def test_short_passwords_do_not_change_captions():
    with serving(lambda asked: GOOD, lambda asked, number: None if number else {"content": "red"}) as server:
        chat = ChatEndpoint("tiny", server.url.replace("//", "//me:red@"), attempts=1)
        assert chat.ask([Question("What?", SCHEMA)])[0].raw == "[hidden]"
        assert chat.ask([Question("What?", SCHEMA)])[0].value == {"caption": "a red star"}


def test_passwords_in_addresses_are_sent_and_not_shown(caplog):
    with serving(lambda asked: GOOD) as server:
        url = server.url.replace("//", "//me:se%2Fcret@")
        chat = ChatEndpoint("tiny", url)
        with caplog.at_level(logging.DEBUG):
            assert chat.ask([Question("What?", SCHEMA)])[0].problem is None
        assert server.headers[0]["Authorization"] == "Basic bWU6c2UvY3JldA=="
        assert server.headers[0]["path"] == "/v1/chat/completions"
    with pytest.raises(RuntimeError, match=f"{server.url} can't be reached") as error:
        ChatEndpoint("tiny", url, retries=0).ask([Question("What?", SCHEMA)])
    assert "cret" not in str(error.value) + caplog.text + repr(chat)


@pytest.mark.parametrize(
    "url",
    ["http://me:cret/0@host/v1", "http://me:12/cret@host/v1", "http://host/v1?key=cret", "http://host/v1#cret",
     "http://me:cret@[host/v1", "me:cret@host"],
)  # fmt: skip
def test_addresses_that_are_refused_are_not_shown(url):
    with pytest.raises(ValueError, match="`base_url` ") as error:
        ChatEndpoint("m", url)
    assert "cret" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_secrets_of_the_wrong_form_are_not_shown(monkeypatch):
    with pytest.raises(ValueError, match="A backend must be MODEL or MODEL@URL, got '@http://host/v1'"):
        open_chat("@http://me:cret@host/v1", LongGritArguments())
    monkeypatch.setenv("TINY_KEY", "cr\net")
    with pytest.raises(ValueError, match="^`api_key_variable` names 'TINY_KEY', whose value holds characters that no"):
        ChatEndpoint("m", "http://host/v1", "TINY_KEY")
    monkeypatch.setenv("TINY_KEY", "cret")
    with pytest.raises(ValueError, match="`base_url` must hold no user name where"):
        ChatEndpoint("m", "http://me@host/v1", "TINY_KEY")


PIECES = [
    "{",
    '{"',
    '{"a":',
    '{"a":[',
    '{"caption": "a",',
    '{"a":1, ',
    "{ ",
    '{"a": "\\"',
    "{}",
    '{"caption": 1}',
    '{\\"a',
]


@pytest.mark.parametrize("piece", PIECES)
def test_reading_takes_time_in_proportion_to_the_text(piece):
    seconds = []
    for characters in (20_000, 200_000):
        text = piece * (characters // len(piece))
        begin = time.process_time()
        assert read_reply(Reply(text), SCHEMA).value is None
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 4 and seconds[1] < 40 * max(seconds[0], 0.02), seconds


def test_an_object_behind_many_broken_ones_is_found():
    assert read_reply(Reply('{"caption": ' * 500 + GOOD), SCHEMA).value == {"caption": "a red star"}
    digits = '{"caption": ' + "9" * 5000 + "}"
    assert read_reply(Reply(digits + GOOD), SCHEMA).value == {"caption": "a red star"}


def test_captions_without_end_are_rejected():
    columns = ("rejected_stage", "rejected_reason", "raw_answer", "vesl_candidates", "counts", "steps")
    batch = {name: [None, None] for name in columns} | {"vesl_caption": ["a star " * 200_000, "I see a red star."]}
    done = PhraseCandidates()(batch)
    assert done["rejected_reason"] == ["caption of more than 20000 characters", None]
    assert [entry["text"] for entry in done["vesl_candidates"][1]] == ["red star"]
