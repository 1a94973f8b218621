"""LongGRIT: what models are shown, every stage and its rejections, and whole runs over a server that fails."""

import dataclasses
import io
import json
import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
from chat_server import serving
from datasets import load_dataset
from PIL import Image
from tiny_chats import save_llama, save_llava

from pixclip_hf.annotation.chat import ChatEndpoint, LocalChat, Reply, read_reply
from pixclip_hf.annotation.longgrit import LongGritArguments, longgrit_models, longgrit_stages
from pixclip_hf.annotation.longgrit.masks import SamMasks
from pixclip_hf.annotation.longgrit.own_texts import STAND_IN, OwnTexts
from pixclip_hf.annotation.longgrit.region_views import box_in_thousandths, draw_box, isolate
from pixclip_hf.annotation.passes import run_stages
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.sources import ReadRecords
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.record import record_features, validate_record

LOOK = "A red star with a soft edge."
PLACE = "It lies in the upper left part of the picture, to the left of the ring and above a small square."
LONG = (
    "A red star with a soft edge lies in the upper left part of the picture, where it is to the left of the ring "
    "and above a small square."
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_objects_stand_alone_on_gray():
    pixels = np.random.default_rng(0).integers(0, 120, (300, 400, 3), np.uint8)
    mask = np.zeros((300, 400), bool)
    mask[20:260, 100:160] = True
    mask[20:140, 100:130] = False
    shown = np.asarray(isolate(Image.fromarray(pixels), [0, 0, 400, 300], mask))
    side = 240 + 2 * 12
    assert shown.shape == (side, side, 3)
    expected = np.full((side, side, 3), 127, np.uint8)
    x, y = (side - 60) // 2, 12
    expected[y : y + 240, x : x + 60][mask[20:260, 100:160]] = pixels[mask]
    assert (shown == expected).all()


def test_small_objects_are_enlarged_and_boxes_cut_where_no_mask_is():
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    shown = np.asarray(isolate(image, [3.2, 5.0, 13.0, 10.1], None))
    assert shown.shape == (224, 224, 3)
    assert tuple(shown[112, 112]) == (255, 0, 0) and tuple(shown[3, 112]) == (127, 127, 127)
    # 10 of 12 pixels wide, 6 of 12 high.
    red = shown[..., 1] < 64  # half way between red and gray
    assert red.any(axis=0).sum() == pytest.approx(224 * 10 / 12, abs=2)
    assert red.any(axis=1).sum() == pytest.approx(224 * 6 / 12, abs=2)


def test_drawn_boxes_surround_the_region():
    image = Image.new("RGB", (300, 200), (1, 2, 3))
    marked = np.asarray(draw_box(image, [50, 40, 100.5, 90]))
    red = (marked == (255, 0, 0)).all(axis=2)
    assert not red[40:90, 50:101].any() and (marked[~red] == (1, 2, 3)).all()
    assert (
        red[38:40, 48:103].all() and red[90:92, 48:103].all() and red[38:92, 48:50].all() and red[38:92, 101:103].all()
    )
    assert red.sum() == 2 * 2 * (55 + 50)
    assert np.asarray(image).max() == 3
    # A box of the whole image is still to be seen.
    whole = (np.asarray(draw_box(image, [0, 0, 300, 200])) == (255, 0, 0)).all(axis=2)
    assert (
        whole[0].all() and whole[-1].all() and whole[:, 0].all() and whole[:, -1].all() and not whole[5:-5, 5:-5].any()
    )


def test_coordinates():
    assert box_in_thousandths([0, 20, 300, 30.02], 300, 200) == "0, 100, 1000, 150"


class Script:
    """A chat that says what it is told: step -> text of the answer, for all regions or by id."""

    num_gpus = 0
    model = "script"

    def __init__(self, **texts):
        self.texts = {
            "object_caption": caption(LOOK),
            "verification": '{"reason": "fine", "verdict": "good"}',
            "context_caption": caption(PLACE),
            "merge": caption(LONG),
            "category_check": '{"reason": "fine", "contradiction": false}',
            **texts,
        }
        self.asked = []

    def ask(self, questions):
        self.asked += questions
        answers = []
        for question in questions:
            text = self.texts[question.about["step"]]
            if isinstance(text, dict):
                text = text.get(question.about["region"]["id"], Script().texts[question.about["step"]])
            answers.append(read_reply(Reply(text), question.schema))
        return answers


def caption(text):
    return json.dumps({"caption": text})


def stages_of(chat, **arguments):
    return [
        dataclasses.replace(stage, chat=chat) if hasattr(stage, "chat") else stage
        for stage in longgrit_stages(LongGritArguments(**arguments))
    ]


def rows_of(stages, number=2, source="scenes:8"):
    return list(run_stages([ReadRecords(source), *stages], range(number)))


def test_good_answers_become_long_captions():
    chat = Script()
    (row, _) = rows_of(stages_of(chat))
    assert {region["long_caption"] for region in row["regions"]} == {LONG}
    assert row["rejected_regions"] is None and row["rejected_stage"] is None
    (before, _) = rows_of([])
    assert [{**region, "long_caption": None} for region in row["regions"]] == [
        {**region, "long_caption": None} for region in before["regions"]
    ]
    versions = {step["stage"]: (step["model"], step["version"].split(" (")[0]) for step in row["steps"]}
    assert versions == {
        "object_caption": ("script", "object_caption 1"),
        "verification": ("script", "verification 1"),
        "context_caption": ("script", "context_caption_drawn 1"),
        "merge": ("script", "merge 1"),
        "category_check": ("script", "category_check 1"),
    }
    by_step = {}
    for question in chat.asked:
        by_step.setdefault(question.about["step"], question)
    region = row["regions"][0]
    assert "English" in by_step["object_caption"].prompt and len(by_step["object_caption"].images) == 1
    assert LOOK in by_step["verification"].prompt and not by_step["verification"].images
    assert f"category: {region['category']}\ncaption: {region['caption']}" in by_step["verification"].prompt
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    assert by_step["context_caption"].images[0] == draw_box(image, region["box"])
    assert LOOK in by_step["merge"].prompt and PLACE in by_step["merge"].prompt
    assert LONG in by_step["category_check"].prompt and region["category"] in by_step["category_check"].prompt


def test_boxes_as_coordinates():
    chat = Script()
    (row, _) = rows_of(stages_of(chat, box_style="coordinates", language="de", min_words=1))
    question = next(question for question in chat.asked if question.about["step"] == "context_caption")
    box = question.about["region"]["box"]
    assert f"[{box_in_thousandths(box, row['width'], row['height'])}]" in question.prompt
    assert "German" in question.prompt
    assert question.images[0] == Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    # Every caption was English.
    assert {entry["rejected_reason"] for entry in row["rejected_regions"]} == {"not German"}


@pytest.mark.parametrize(
    ("step", "text", "stage", "reason", "raw"),
    [
        ("object_caption", "oh", "object_caption", "answer without a JSON object", "oh"),
        ("object_caption", "", "object_caption", "empty answer", ""),
        ("object_caption", caption("I'm sorry, I can't see it."), "object_caption", "refusal", "sorry"),
        ("verification", '{"reason": "a ring", "verdict": "inconsistent"}', "verification", "judged inconsistent",
         f'"a ring", "verdict": "inconsistent"}}\n\nabout: {LOOK}'),
        ("verification", '{"reason": "?", "verdict": "meaningless"}', "verification", "judged meaningless", "?"),
        ("verification", '{"reason": "?", "verdict": "so so"}', "verification", "answer not as its schema asks", "so"),
        ("context_caption", caption("In the bounding box."), "context_caption", "echo of the prompt", "box"),
        ("merge", caption("A star."), "final_rules", "fewer than 20 words", "A star."),
        ("merge", caption(LONG.replace("A red", "As an AI I see a red")), "merge", "refusal", "As an AI"),
        ("category_check", '{"reason": "a dog", "contradiction": true}', "category_check", "contradicts the category",
         "a dog"),
    ],
)  # fmt: skip
def test_rejected_regions(step, text, stage, reason, raw):
    (plain, other) = rows_of(stages_of(Script()))
    bad = plain["regions"][1]["id"]
    (row, same) = rows_of(stages_of(Script(**{step: {bad: text}})))
    assert [region["id"] for region in row["regions"]] == [
        region["id"] for region in plain["regions"] if region["id"] != bad
    ]
    (rejected,) = row["rejected_regions"]
    assert rejected["region"]["id"] == bad
    assert (rejected["rejected_stage"], rejected["rejected_reason"]) == (stage, reason)
    assert raw in rejected["raw_answer"]
    if stage in ("final_rules", "category_check"):
        assert rejected["region"]["long_caption"] is not None
    assert same == other


def test_nothing_left_to_ask():
    chat = Script(object_caption="no")
    for row in rows_of(stages_of(chat)):
        assert row["regions"] == [] and row["rejected_regions"]
    assert {question.about["step"] for question in chat.asked} == {"object_caption"}


def test_stand_in_uses_the_source(tmp_path):
    stages = longgrit_stages(LongGritArguments())
    for row, source in zip(rows_of(stages, 8), rows_of([], 8), strict=True):
        assert len(row["regions"]) == len(source["regions"]) and row["rejected_regions"] is None
        for region, given in zip(row["regions"], source["regions"], strict=True):
            opening = given["caption"][0].upper() + given["caption"][1:]
            assert region["long_caption"] == f"{opening}. {given['long_caption']}"
        assert {step["model"] for step in row["steps"]} == {"scenes-stand-in"}
    # A folder of regions without long captions is turned down, not made up.
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    region = {"id": 3, "category": "cup", "box": [1, 1, 9, 9]}
    record = {"image": "a.png", "width": 20, "height": 10, "captions": [], "regions": [region]}
    (tmp_path / "regions.jsonl").write_text(json.dumps(record))
    (row,) = rows_of(stages, 1, f"regions:{tmp_path}")
    assert row["rejected_regions"][0]["rejected_reason"] == "the source has no long caption of this region"
    assert {"name": "object_caption/without a mask, cut out by the box", "count": 1} in row["counts"]


def words(key, number):
    """English filler that differs from key to key."""
    looks = "red blue green round soft dark small bright wooden plain old thin".split()
    return " ".join(looks[(key >> (4 * i)) % len(looks)] for i in range(number))


def answer(question):
    """What the server says, by the question alone; now and then a verdict against it."""
    key = question["key"]
    fields = question["body"]["response_format"]["json_schema"]["schema"]["properties"]
    if "verdict" in fields:
        return json.dumps({"reason": words(key, 2), "verdict": "inconsistent" if key % 7 == 0 else "good"})
    if "contradiction" in fields:
        return json.dumps({"reason": words(key, 2), "contradiction": key % 11 == 0})
    text = f"This is a {words(key, 3)} thing that stands in the {words(key >> 16, 1)} part of the picture"
    return caption(f"{text}, and there is a {words(key >> 24, 2)} one next to it that it is taller than.")


PASSING = [500, 503, (429, {"Retry-After": "0"}), "no json", "cut body", {"content": '{"capt'}, {"content": "{}"}]


def some_fail(question, number):
    """Every third question fails once, and one in 13 always: with a status, or with an answer of no use."""
    if question["key"] % 13 == 0:
        return 400 if question["key"] % 2 else {"content": '{"caption": "'}
    return PASSING[question["key"] % len(PASSING)] if question["key"] % 3 == 0 and number == 0 else None


def backends(server):
    names = ("object_captioner", "verifier", "context_captioner", "merger")
    return {name: f"{name}@{server.url}" for name in names}


def run(server, output, concurrency, batch_size, **options):
    arguments = LongGritArguments(**backends(server), concurrency=concurrency, retries=1, attempts=2)
    stages = [dataclasses.replace(stage, batch_size=batch_size) for stage in longgrit_stages(arguments)]
    for stage in stages:
        if hasattr(stage, "chat"):
            stage.chat.backoff = 0
    return annotate("scenes:10", stages, output, shard_size=4, progress=False, **options)


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def always_fails(question, number):
    fault = some_fail(question, number)
    return fault if question["key"] % 13 == 0 else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, one question at a time, over a server whose passing faults are left out."""
    with serving(answer, always_fails) as server:
        return run(server, tmp_path_factory.mktemp("whole") / "run", 1, 1)


def test_nothing_vanishes_without_a_reason(whole):
    records = load_dataset(str(whole), split="train")
    rejected = load_dataset("parquet", data_files=str(whole / "rejected/*.parquet"), split="train")
    source = {region["id"] for row in rows_of([], 10, "scenes:10") for region in row["regions"]}
    kept = Counter(region["id"] for row in records for region in row["regions"])
    dropped = Counter(row["region"]["id"] for row in rejected if row["region"] is not None)
    assert kept + dropped == Counter(source) and len(kept) > 10
    reasons = {(row["rejected_stage"], row["rejected_reason"]) for row in rejected}
    assert {("verification", "judged inconsistent"), ("category_check", "contradicts the category")} <= reasons
    assert {"HTTP 400", "answer without a JSON object"} <= {reason for _, reason in reasons}
    assert all(row["raw_answer"] for row in rejected if row["region"] is not None)
    for record in records:
        validate_record({name: record[name] for name in record_features()})
        assert {step["model"] for step in record["steps"]} == {
            "object_captioner", "verifier", "context_captioner", "merger",
        }  # fmt: skip


def test_same_answers_give_the_same_output_whatever_the_batches_and_the_faults(whole, tmp_path):
    with serving(answer, some_fail) as server:
        again = run(server, tmp_path / "run", 8, 5)
        assert len(server.times_asked) < server.times_asked.total()
    assert files(again) == files(whole)


def test_a_server_that_goes_down_ends_the_run_until_it_is_back(whole, tmp_path):
    asked = 0

    def goes_down(question, number):
        nonlocal asked
        asked += 1
        return always_fails(question, number) if asked <= 150 else 503

    with serving(answer, goes_down) as server, pytest.raises(RuntimeError, match="answers 503"):
        run(server, tmp_path / "run", 1, 1)
    done = len(list((tmp_path / "run" / "shards").iterdir()))
    assert 0 < done < len(list((whole / "shards").iterdir()))
    with serving(answer, always_fails) as server:
        assert files(run(server, tmp_path / "run", 1, 1)) == files(whole)


@pytest.mark.slow
def test_ray_gives_the_same_output(whole, tmp_path):
    ray = pytest.importorskip("ray")
    with serving(answer, some_fail) as server:
        again = run(server, tmp_path / "run", 3, 4, engine="ray", workers=2)
    ray.shutdown()
    assert {name: data for name, data in files(again).items() if "run.json" not in name} == {
        name: data for name, data in files(whole).items() if "run.json" not in name
    }


@pytest.mark.parametrize(
    ("backend", "stage", "save"),
    [
        ("object_captioner", "object_caption", save_llava),
        ("verifier", "verification", save_llama),
        ("context_captioner", "context_caption", save_llava),
        ("merger", "merge", save_llama),
    ],
)
def test_real_models_from_disk(backend, stage, save, tmp_path):
    arguments = LongGritArguments(**{backend: save(tmp_path / "model")}, max_tokens=6, attempts=2)
    for row in rows_of(longgrit_stages(arguments), 2):
        # Random weights speak no JSON: that is what a rejection has to say.
        assert row["regions"] == []
        assert {entry["rejected_stage"] for entry in row["rejected_regions"]} == {stage}
        assert all(entry["raw_answer"] for entry in row["rejected_regions"])


def test_arguments_build_the_stages():
    stages = longgrit_stages(
        LongGritArguments(
            object_captioner="org/vlm@http://a:1/v1",
            context_captioner="org/other",
            segmenter="org/sam",
            concurrency=3,
            timeout=9,
            max_tokens=77,
        ),
        seed=4,
    )
    assert [stage.name for stage in stages] == [
        "masks", "object_caption", "verification", "context_caption", "merge", "final_rules", "category_check",
    ]  # fmt: skip
    assert stages[0] == SamMasks("org/sam")
    assert stages[1].chat == ChatEndpoint("org/vlm", "http://a:1/v1", max_tokens=77, seed=4, concurrency=3, timeout=9)
    assert stages[3].chat == LocalChat("org/other", 77) and stages[2].chat == OwnTexts()
    assert [stage.num_gpus for stage in stages] == [1, 0, 0, 1, 0, 0, 0]
    for stage in stages:
        assert repr(pickle.loads(pickle.dumps(stage))) == repr(stage)
        assert repr(dataclasses.replace(stage, batch_size=3)) == repr(stage)
    assert pipeline_features(stages)
    assert "http" not in repr(stages[1])


def test_models_for_the_card():
    named = longgrit_models(LongGritArguments(object_captioner="org/vlm@https://host/v1", segmenter="org/sam"))
    assert named["object caption"] == "org/vlm" and named["masks"] == "org/sam" and named["merge"] == STAND_IN


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`box_style` must be one of drawn, coordinates, got 'said'"):
        longgrit_stages(LongGritArguments(box_style="said"))
    with pytest.raises(ValueError, match="A backend must be MODEL, MODEL@URL or scenes-stand-in, got '@http://a/v1'"):
        longgrit_stages(LongGritArguments(merger="@http://a/v1"))
    with pytest.raises(ValueError, match="`language` must be one of"):
        longgrit_stages(LongGritArguments(language="xx"))
