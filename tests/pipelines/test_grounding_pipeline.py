"""The region-grounding pipeline: boxes and scores against the model, forms of input, bad input, and a saved folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import pixclip_hf

TASK = "region-grounding"
LABELS = ["a red disc", "a blue square", "something else"]


def make_image(index, size):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8))


IMAGES = [make_image(0, (40, 30)), make_image(1, (25, 60)), make_image(2, (33, 41))]


@pytest.fixture
def find(tiny_cloc):
    return pipeline(TASK, model=tiny_cloc[0], processor=tiny_cloc[1], device="cpu")


def by_hand(tiny, image, labels):
    model, processor = tiny
    with torch.no_grad():
        found = model.ground(**processor(images=image, text=labels), steady_scores=True)
    boxes = processor.post_process_boxes(found.pred_boxes, [image.size[::-1]])[0]
    return {label: (score, box) for label, score, box in zip(labels, found.scores[0], boxes, strict=True)}


def check(found, wanted):
    assert [entry["score"] for entry in found] == sorted((entry["score"] for entry in found), reverse=True)
    assert {entry["label"] for entry in found} == set(wanted)
    for entry in found:
        score, box = wanted[entry["label"]]
        assert entry["score"] == pytest.approx(float(score), abs=1e-5)
        assert list(entry["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        assert list(entry["box"].values()) == pytest.approx(box.tolist(), abs=1e-3)


def test_boxes_and_scores_are_the_models(find, tiny_cloc):
    check(find(IMAGES[0], candidate_labels=LABELS, threshold=-1), by_hand(tiny_cloc, IMAGES[0], LABELS))
    templated = find(IMAGES[0], candidate_labels=["disc"], hypothesis_template="a red {}", threshold=-1)
    (score, box) = by_hand(tiny_cloc, IMAGES[0], LABELS[:1])[LABELS[0]]
    check(templated, {"disc": (score, box)})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_generators_and_texts_of_their_own(find, tiny_cloc, batch_size):
    wanted = [by_hand(tiny_cloc, image, LABELS) for image in IMAGES]
    options = {"threshold": -1, "batch_size": batch_size}
    for images in (IMAGES, (image for image in IMAGES)):
        for found, own in zip(find(images, candidate_labels=LABELS, **options), wanted, strict=True):
            check(found, own)
    texts = [LABELS[:1], LABELS[1:], LABELS]
    items = [{"image": image, "candidate_labels": own} for image, own in zip(IMAGES, texts, strict=True)]
    for several in (find(items, **options), find(IMAGES, candidate_labels=texts, **options)):
        for found, own, every in zip(several, texts, wanted, strict=True):
            check(found, {label: every[label] for label in own})
    assert find([], candidate_labels=LABELS) == []


def test_threshold_and_top_k(find):
    found = find(IMAGES[0], candidate_labels=LABELS, threshold=-1)
    assert len(found) == 3
    assert find(IMAGES[0], candidate_labels=LABELS, threshold=-1, top_k=2) == found[:2]
    between = (found[0]["score"] + found[1]["score"]) / 2
    assert find(IMAGES[0], candidate_labels=LABELS, threshold=between) == found[:1]
    assert find(IMAGES[0], candidate_labels=LABELS) == [entry for entry in found if entry["score"] >= 0.1]


BAD = [
    ({}, "`candidate_labels` must be a list of texts, got none"),
    ({"candidate_labels": "a cat"}, "`candidate_labels` must be a list of texts, got 'a cat'"),
    ({"candidate_labels": ["a", " "]}, r"`candidate_labels\[1\]` must not be empty"),
    ({"candidate_labels": ["a", "a"]}, "must differ from each other, got 'a' more than once"),
    ({"candidate_labels": ["a"], "threshold": 1.5}, r"`threshold` must lie in \[-1, 1\], got 1.5"),
    ({"candidate_labels": ["a"], "top_k": 0}, "`top_k` must be at least 1, got 0"),
    ({"candidate_labels": ["a"], "hypothesis_template": "a"}, "`hypothesis_template` must contain"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(find, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        find(IMAGES[0], **options)


def test_errors_name_the_image(find):
    with pytest.raises(ValueError, match=r"image 1: `candidate_labels` must hold at least one text"):
        find(IMAGES[:2], candidate_labels=[["a"], []])
    with pytest.raises(ValueError, match="`candidate_labels` must hold a list per image: got 1 for 2 images"):
        find(IMAGES[:2], candidate_labels=[["a"]])
    with pytest.raises(
        ValueError, match="image 0: An input dict takes the keys image, candidate_labels, got also boxes"
    ):
        find([{"image": IMAGES[0], "boxes": []}], candidate_labels=["a"])


def test_scores_that_are_no_numbers_are_refused(find, monkeypatch):
    ground = find.model.ground

    def broken(*args, **kwargs):
        found = ground(*args, **kwargs)
        found.scores[0, 1] = float("nan")
        return found

    monkeypatch.setattr(find.model, "ground", broken)
    with pytest.raises(ValueError, match="Region 1, .*'a blue square'.*, has NaN or infinite values"):
        find(IMAGES[0], candidate_labels=LABELS)


def test_models_that_do_not_ground(tiny_pixclip):
    with pytest.raises(ValueError, match=r"`model` must be a CLOC with `config.grounding=True`, got a PixCLIPModel"):
        pipeline(TASK, model=tiny_pixclip[0], processor=tiny_pixclip[1])


def test_a_saved_folder(find, tmp_path):
    find.save_pretrained(tmp_path)
    other = pipeline(TASK, model=str(tmp_path))
    assert type(other) is pixclip_hf.RegionGroundingPipeline
    assert (tmp_path / "region_grounding.py").is_file()
    expected = find(IMAGES[0], candidate_labels=LABELS, threshold=-1)
    for entry, same in zip(other(IMAGES[0], candidate_labels=LABELS, threshold=-1), expected, strict=True):
        assert entry["label"] == same["label"] and entry["score"] == pytest.approx(same["score"], abs=1e-5)
