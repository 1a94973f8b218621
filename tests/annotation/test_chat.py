"""Questions and answers: reading of replies, prompts from files, chat endpoints that fail, and local models."""

import io
import json
import pickle

import pytest
from chat_server import serving
from PIL import Image
from requests.exceptions import InvalidURL
from tiny_chats import save_llama, save_llava
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from pixclip_hf.annotation.chat import (
    Answer,
    ChatEndpoint,
    LocalChat,
    Question,
    Reply,
    ask_until_usable,
    read_reply,
)
from pixclip_hf.annotation.longgrit.prompts import load_prompt

SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
GOOD = '{"caption": "a red star"}'
NOT_JSON, NOT_SCHEMA = "answer without a JSON object", "answer not as its schema asks"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "a red star"),
        (f"Sure!\n```json\n{GOOD}\n```\nAnything else?", "a red star"),
        ('<think>{"caption": "no"} is too short</think>' + GOOD, "a red star"),
        ('{"caption": 1} or rather ' + GOOD, "a red star"),
        ("{caption} " + GOOD, "a red star"),
        ('{"caption": "a red', NOT_JSON),
        ("a red star", NOT_JSON),
        ('["a red star"]', NOT_JSON),
        ("{" * 2000, NOT_JSON),
        ('{"a":' * 5000, NOT_JSON),
        ('{"caption": ["a red star"]}', NOT_SCHEMA),
        ('{"text": "a red star"}', NOT_SCHEMA),
        ('{"caption": "a", "more": 1}', NOT_SCHEMA),
        ('{"caption": " \\n"}', "answer with an empty or broken text"),
        ('{"caption": "\\ud800"}', "answer with an empty or broken text"),
        (" \n", "empty answer"),
        ("<think>hm</think>", "empty answer"),
        (None, "empty answer"),
    ],
)
def test_reading_of_replies(text, expected):
    answer = read_reply(Reply(text), SCHEMA)
    assert answer.raw == text
    if answer.problem is None:
        assert answer.value == {"caption": expected}
    else:
        assert answer.problem == expected and answer.value is None


def test_raw_answers_can_be_stored():
    assert read_reply(Reply("a \ud800 b"), SCHEMA).raw == "a ? b"


def test_problems_of_a_reply_come_first():
    assert read_reply(Reply(GOOD, "cut"), SCHEMA) == Answer(problem="cut", raw=GOOD)


def test_unusable_answers_are_asked_for_again_with_the_reason():
    asked = []

    def complete(questions, attempt):
        asked.append((attempt, [question.prompt for question in questions]))
        replies = {"good": Reply(GOOD), "down": Reply(problem="down", final=True), "bad": Reply("no")}
        late = Reply(GOOD) if attempt == 1 else Reply("")
        return [replies.get(question.prompt.split("\n")[0], late) for question in questions]

    questions = [Question(prompt, SCHEMA) for prompt in ("late", "good", "bad", "down")]
    answers = ask_until_usable(complete, questions, 3)
    assert [answer.problem for answer in answers] == [None, None, NOT_JSON, "down"]
    assert asked[0] == (0, ["late", "good", "bad", "down"]) and len(asked[1][1]) == 2 and len(asked[2][1]) == 1
    assert asked[1][1][0] == (
        "late\n\nAn earlier answer could not be used: empty answer. Answer with the JSON object alone."
    )
    # The reason of the last attempt alone.
    assert asked[2][1][0].count("An earlier answer") == 1


def test_prompts_come_with_their_version(tmp_path):
    names = ["object_caption", "context_caption", "language"]
    prompt = load_prompt("merge", names)
    assert prompt.version == "1" and "version" not in prompt.text
    assert prompt.label == f"merge 1 ({prompt.digest})" and prompt.text not in repr(prompt)
    filled = prompt.fill(object_caption="costs $5 {}", context_caption="b", language="English")
    assert "costs $5 {}" in filled and "$object_caption" not in filled
    own = tmp_path / "merge.txt"
    own.write_text("version: mine\n$object_caption $context_caption $language")
    changed = load_prompt("merge", names, str(tmp_path))
    assert changed.version == "mine" and changed.digest != prompt.digest
    assert load_prompt("object_caption", ["language"], str(tmp_path)).version == "1"


@pytest.mark.parametrize("text", ["$language", "version:\n$language", "version: 1\n$languages", "version: 1\n5 $ for"])
def test_prompts_that_do_not_fit(text, tmp_path):
    (tmp_path / "object_caption.txt").write_text(text)
    with pytest.raises(ValueError, match="object_caption.txt: the "):
        load_prompt("object_caption", ["language"], str(tmp_path))


def test_folder_of_prompts_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="`prompts` must be a folder"):
        load_prompt("merge", [], str(tmp_path / "no"))


def endpoint(server, **options):
    return ChatEndpoint("tiny", server.url, **{"backoff": 0, "retries": 2, "timeout": 20, **options})


def reply_with_prompt(question):
    return json.dumps({"caption": question["prompt"]})


def test_requests_are_as_the_api_describes(monkeypatch):
    monkeypatch.setenv("TINY_KEY", "secret")
    image = Image.effect_noise((9, 7), 50).convert("RGB")
    with serving(reply_with_prompt) as server:
        chat = endpoint(server, api_key_variable="TINY_KEY", max_tokens=50, seed=5)
        answers = chat.ask([Question("What?", SCHEMA, (image,)), Question("Why?", SCHEMA)])
        assert [answer.value["caption"] for answer in answers] == ["What?", "Why?"]
        (seen,) = (question for question in server.questions if question["images"])
        (other,) = (question for question in server.questions if not question["images"])
    decoded = Image.open(io.BytesIO(seen["images"][0]))
    assert decoded.tobytes() == image.tobytes()
    body = seen["body"]
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("tiny", 0, 5, 50)
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert other["body"]["messages"] == [{"role": "user", "content": "Why?"}]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert {headers["path"] for headers in server.headers} == {"/v1/chat/completions"}
    assert "secret" not in repr(chat) and server.url not in repr(chat)


def test_answers_keep_their_order():
    questions = [Question(f"number {i}", SCHEMA) for i in range(30)]
    with serving(reply_with_prompt) as server:
        for concurrency in (1, 8):
            answers = endpoint(server, concurrency=concurrency).ask(questions)
            assert [answer.value["caption"] for answer in answers] == [question.prompt for question in questions]


@pytest.mark.parametrize(
    "fault",
    [500, 503, (429, {"Retry-After": "0"}), "slow", "no json", "cut body", "wrong shape", "at the limit",
     {"content": '{"caption": "a re'}, {"content": '{"text": "a"}'}, {"content": ""}, {"content": None}],
    ids=str,
)  # fmt: skip
def test_faults_that_pass(fault):
    with serving(reply_with_prompt, lambda question, number: fault if number == 0 else None) as server:
        (answer,) = endpoint(server, timeout=0.5 if fault == "slow" else 20).ask([Question("What?", SCHEMA)])
        assert answer == Answer({"caption": "What?"}, raw='{"caption": "What?"}')
        assert server.times_asked.total() == 2


@pytest.mark.parametrize(
    ("fault", "problem", "raw", "requests"),
    [
        (413, "HTTP 413", "status 413 on demand", 1),
        ("slow", "timeout", None, 3),
        ("no json", "response not as the API describes", '{"choices"', 2),
        ("cut body", "response cut off", "IncompleteRead", 2),
        ("at the limit", "answer longer than the limit of tokens", '{"cap', 2),
        ({"content": '{"caption": "a re'}, NOT_JSON, '{"caption": "a re', 2),
        ({"content": '{"text": "a"}'}, NOT_SCHEMA, '{"text": "a"}', 2),
        ({"content": ""}, "empty answer", "", 2),
    ],
    ids=str,
)
def test_faults_that_stay(fault, problem, raw, requests):
    with serving(reply_with_prompt, lambda question, number: fault) as server:
        chat = endpoint(server, attempts=2, timeout=0.3 if fault == "slow" else 20)
        (answer,) = chat.ask([Question("What?", SCHEMA)])
        assert answer.value is None and answer.problem == problem
        assert answer.raw is None if raw is None else raw in answer.raw
        assert server.times_asked.total() == requests


def test_waits_as_long_as_the_server_asks_or_ever_longer(monkeypatch):
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    faults = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "90"}), 500, 500, None]
    with serving(reply_with_prompt, lambda question, number: faults[number]) as server:
        (answer,) = endpoint(server, retries=4, backoff=2.0).ask([Question("What?", SCHEMA)])
    assert answer.problem is None
    assert waits == [7, 90, 4, 8]


@pytest.mark.parametrize(
    ("fault", "requests"),
    [(401, 1), (404, 1), (500, 3), (503, 3), (501, 1), ((429, {"Retry-After": "0"}), 3)],
    ids=str,
)
def test_servers_that_refuse_or_stay_down_end_the_run(fault, requests):
    status = fault[0] if isinstance(fault, tuple) else fault
    with serving(reply_with_prompt, lambda question, number: fault) as server:
        with pytest.raises(RuntimeError, match=f"answers {status} for the model 'tiny'.*on demand"):
            endpoint(server).ask([Question("What?", SCHEMA)])
        assert server.times_asked.total() == requests


def test_unreachable_endpoints_end_the_run():
    with serving(reply_with_prompt) as server:
        pass
    with pytest.raises(RuntimeError, match=f"{server.url} can't be reached: .*refused"):
        endpoint(server).ask([Question("What?", SCHEMA)])
    with pytest.raises(InvalidURL):
        ChatEndpoint("tiny", "http://").ask([Question("What?", SCHEMA)])


def test_endpoint_arguments(monkeypatch):
    monkeypatch.delenv("TINY_KEY", raising=False)
    with pytest.raises(ValueError, match="`api_key_variable` names 'TINY_KEY', which is not set or empty"):
        ChatEndpoint("m", "http://localhost/v1", "TINY_KEY")
    with pytest.raises(ValueError, match="`base_url` must start with http:// or https://, got 'localhost'"):
        ChatEndpoint("m", "localhost")
    with pytest.raises(ValueError, match="`attempts` must be at least 1, got 0"):
        ChatEndpoint("m", "http://localhost/v1", attempts=0)
    with pytest.raises(ValueError, match="`timeout` must be above 0"):
        ChatEndpoint("m", "http://localhost/v1", timeout=0)
    pickle.loads(pickle.dumps(ChatEndpoint("m", "http://localhost/v1")))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    answers = {"Which star?": GOOD, "And the ring?": '{"caption": "a blue ring"}', "Say it.": "I say it."}
    return save_llama(tmp_path_factory.mktemp("llama"), answers)


def test_local_text_model(learned):
    questions = [Question(prompt, SCHEMA) for prompt in ("Which star?", "Say it.", "And the ring?")]
    for size in (1, 3):
        answers = LocalChat(learned, max_new_tokens=60, attempts=1, batch_size=size).ask(questions)
        assert [answer.value for answer in answers] == [{"caption": "a red star"}, None, {"caption": "a blue ring"}]
        assert answers[1] == Answer(problem=NOT_JSON, raw="I say it.")
    (cut,) = LocalChat(learned, max_new_tokens=9, attempts=1).ask(questions[:1])
    assert cut == Answer(problem="answer longer than the limit of tokens", raw=GOOD[:9])


def test_local_model_of_images_equals_the_library(llava):
    images = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (32, 32), (250, 20, 20))]
    questions = [
        Question("What is it?", SCHEMA, (images[0],)),
        Question("And here, what may that be?", SCHEMA, (images[1],)),
    ]
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), LlavaProcessor.from_pretrained(llava)
    expected = []
    for question in questions:
        text = f"user: <image>{question.prompt} answer:"
        inputs = processor(images=question.images[0], text=text, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(expected)) == 2
    for size in (1, 2):
        answers = LocalChat(llava, max_new_tokens=8, attempts=1, batch_size=size).ask(questions)
        assert [answer.raw for answer in answers] == expected
        assert all(answer.problem is not None and answer.value is None for answer in answers)


def test_stages_share_a_loaded_model(learned, monkeypatch):
    LocalChat(learned, max_new_tokens=2).ask([Question("Which star?", SCHEMA)])

    def load(*arguments, **options):
        raise AssertionError("loaded twice")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load)
    LocalChat(learned, max_new_tokens=3, batch_size=1).ask([Question("Say it.", SCHEMA)])


def test_local_models_that_do_not_fit(learned, tmp_path):
    with pytest.raises(ValueError, match="`model` must read images for this step, got"):
        LocalChat(learned).ask([Question("What?", SCHEMA, (Image.new("RGB", (8, 8)),))])
    with pytest.raises(ValueError, match="`model` must have a chat template"):
        LocalChat(save_llama(tmp_path, template=None)).ask([Question("What?", SCHEMA)])
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        LocalChat(learned, max_new_tokens=0)
