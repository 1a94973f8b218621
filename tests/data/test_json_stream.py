import json
import random

import pytest

from pixclip_hf.data import json_stream
from pixclip_hf.data.json_stream import read_entries, read_lines


def anything(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind > 5:
        return {f'k{i}\u2028"]': anything(rng, depth + 1) for i in range(rng.randrange(4))}
    return [-rng.randrange(10**6), rng.random() * 1e-9, "te\\xt [}" * rng.randrange(9), None, True][kind]


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_entries_are_those_of_the_whole_file(chunk, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    rng = random.Random(chunk)
    for number in range(20):
        content = {f"list {i}": [anything(rng) for _ in range(rng.randrange(5))] for i in range(3)}
        content |= {"scalar": 12, "object": {"a": [1, 2]}} if number % 2 else {}
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=number % 3 > 0), encoding="utf-8-sig")
        found = {}
        for key, value, text in read_entries(path):
            assert json.loads(text) == value
            if isinstance(content[key], list):
                found.setdefault(key, []).append(value)
            else:
                found[key] = value
        assert found == {key: value for key, value in content.items() if value != []}
        path.write_text(json.dumps(content["list 0"], indent=indent))
        assert [value for key, value, _ in read_entries(path)] == content["list 0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at character 0: expected '\\[' or '{', got the end|got 'the end'"),
        ("7", "expected '\\[' or '{', got '7'"),
        ("[1, 2", "expected ',' or ']', got 'the end'"),
        ("[1 2]", "at character 3: expected ',' or ']', got '2]'"),
        ("[1, }", "at character 4: Expecting value"),
        ('{"a" 1}', "expected ':'"),
        ("{1: 2}", "a key must be a string, got 1"),
        ('{"a": [1]} x', "expected the end of the file, got 'x'"),
        ("[" * 100_000, "maximum recursion"),
    ],
)
def test_what_is_no_json_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json' cannot be read as JSON.*{message}"):
        list(read_entries(tmp_path / "a.json"))


def test_an_entry_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", 10)
    monkeypatch.setattr(json_stream, "_LONGEST_ENTRY", 1000)
    (tmp_path / "a.json").write_text('["' + "x" * 5000 + '"]')
    with pytest.raises(ValueError, match="an entry has more than 1000 characters"):
        list(read_entries(tmp_path / "a.json"))


def test_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("\ufeffa\u2028b\r\n\n \nc\x0bd".encode())
    assert list(read_lines(tmp_path / "a.jsonl")) == ["a\u2028b", "c\x0bd"]


@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize(
    "value",
    [
        "[" * 50_000 + "]" * 50_000,
        '{"a":' * 20_000 + '"]}\\"["' + "}" * 20_000,
        "1" * 5000,
        '{"n": -' + "9" * 5000 + "}",
    ],
)
def test_a_value_beyond_measure_costs_itself_alone(value, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(f'{{"a": [1, {value}, {{"b": 2}}, {value}], "c": {value}, "d": 3}}')
    found = [(key, value) for key, value, _ in json_stream.read_entries(tmp_path / "a.json")]
    assert found == [("a", 1), ("a", None), ("a", {"b": 2}), ("a", None), ("c", None), ("d", 3)]
