"""Naming everything: proposals of every kind, scores, suppression, masks, and COCO's results."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detector import save_tiny_detector
from tiny_sam import save_tiny_sam
from transformers import pipeline

import pixclip_hf
from pixclip_hf import coco_results, detect
from pixclip_hf.detection import fit_temperature, save_coco_results
from pixclip_hf.embedding.regions import DetectorProposer, grid_boxes
from pixclip_hf.embedding.sam import SamProposer
from pixclip_hf.pipelines.region_detection import class_nms
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle

TASK = "zero-shot-region-detection"
LABELS = ["a red disc", "a blue square"]
BOXES = [[2, 3, 20, 25], [10, 5, 38, 28], [2, 3, 20, 26]]


def make_image(index, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8))


IMAGE = make_image(0)


@pytest.fixture
def find(tiny_cloc):
    return pipeline(TASK, model=tiny_cloc[0], processor=tiny_cloc[1], device="cpu")


def probabilities(tiny, texts, temperature=1.0, **regions):
    """Of texts by the model itself, `(R, T)`."""
    model, processor = tiny
    with torch.no_grad():
        output = model(**processor(images=IMAGE, text=texts, **regions))
    return (output.logits_per_region[0] / temperature).softmax(-1)


def test_given_boxes_score_labels_and_background(find, tiny_cloc):
    every = {"threshold": 0, "nms_iou": 1}
    found = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, **every)
    wanted = probabilities(tiny_cloc, [*LABELS, "background"], boxes=BOXES)
    assert len(found) == 6 and [f["score"] for f in found] == sorted((f["score"] for f in found), reverse=True)
    for entry in found:
        row = BOXES.index([int(edge) for edge in entry["box"].values()])
        assert entry["score"] == pytest.approx(float(wanted[row, LABELS.index(entry["label"])]), abs=1e-5)
    warm = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, background=["x", "y"], temperature=3.0, **every)
    four = probabilities(tiny_cloc, [*LABELS, "x", "y"], 3.0, boxes=BOXES)[:, :2]
    assert sorted(f["score"] for f in warm) == pytest.approx(sorted(four.flatten().tolist()), abs=1e-5)
    alone = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, background=[], **every)
    assert sum(f["score"] for f in alone) == pytest.approx(3, abs=1e-5)


def test_threshold_suppression_and_top_k(find):
    every = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, threshold=0, nms_iou=1)
    kept = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, threshold=0)
    # The first and the last box are all but one: of each label one of them stays.
    assert len(kept) == 4 and all(entry in every for entry in kept)
    for label in LABELS:
        pair = [e for e in every if e["label"] == label and e["box"]["xmin"] == 2]
        assert max(pair, key=lambda e: e["score"]) in kept and min(pair, key=lambda e: e["score"]) not in kept
    assert find(IMAGE, candidate_labels=LABELS, boxes=BOXES, threshold=0, top_k=3) == kept[:3]
    middle = (kept[0]["score"] + kept[1]["score"]) / 2
    assert find(IMAGE, candidate_labels=LABELS, boxes=BOXES, threshold=middle) == kept[:1]
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 3], [50, 50, 60, 60]]).float()
    assert class_nms(boxes, torch.tensor([0.5, 0.9, 0.3, 0.2]), 0.25, 0.5) == [1, 2]


def test_one_pass_for_all_proposals(find, monkeypatch):
    calls = []
    run = find.model.vision_model.forward
    monkeypatch.setattr(find.model.vision_model, "forward", lambda *a, **k: calls.append(1) or run(*a, **k))
    found = find(IMAGE, candidate_labels=LABELS, threshold=0, nms_iou=1, top_k=1000)
    assert len(calls) == 1 and len(found) == 2 * len(grid_boxes(40, 30, (1, 3, 7)))
    boxes = {tuple(round(edge, 3) for edge in entry["box"].values()) for entry in found}
    assert boxes == {tuple(round(edge, 3) for edge in box) for box in grid_boxes(40, 30, (1, 3, 7))}


def test_a_tiny_detector_and_sam_are_named_by_their_folders(find, tmp_path):
    """Of other than random weights the default threshold would keep what they are sure of; some of these it keeps."""
    detector, sam = save_tiny_detector(tmp_path / "detector"), save_tiny_sam(tmp_path / "sam")
    every = {"threshold": 0, "nms_iou": 1, "top_k": 10_000}
    hits = pipeline("object-detection", model=detector, device="cpu")(IMAGE, threshold=0.3)
    wanted = [
        [max(b["xmin"], 0), max(b["ymin"], 0), min(b["xmax"], 40), min(b["ymax"], 30)]
        for b in (hit["box"] for hit in hits)
    ]
    wanted = [box for box in wanted if box[0] < box[2] and box[1] < box[3]]
    assert len(wanted) > 1 and len({hit["score"] for hit in hits}) == len(hits)
    found = detect(IMAGE, LABELS, find, f"detector:{detector}", **every)
    assert found == detect(IMAGE, LABELS, find, wanted, **every) and len(found) == 2 * len(wanted)
    # The pipeline alone takes what proposes.
    assert find(IMAGE, candidate_labels=LABELS, proposals=DetectorProposer(detector), **every) == found
    several = detect([IMAGE, make_image(1, (25, 60))], LABELS, find, f"detector:{detector}", batch_size=2, **every)
    assert [entry["box"] for entry in several[0]] == [entry["box"] for entry in found] and several[1]
    # A random SAM is sure of no mask.
    assert detect(IMAGE, LABELS, find, f"sam:{sam}", **every) == []
    masks = SamProposer(sam, points=3, threshold=-100.0)
    assert find(IMAGE, candidate_labels=LABELS, proposals=masks, proposal_weight=0.5, **every)
    # The folder of one in the place of the other.
    with pytest.raises(ValueError, match="`model` must be a SAM or SAM-HQ, got '.*detector': yolos"):
        detect(IMAGE, LABELS, find, f"sam:{detector}")
    with pytest.raises(ValueError, match="`model` must be an object detector of transformers, got '.*sam': sam"):
        detect(IMAGE, LABELS, find, f"detector:{sam}")


def test_a_detector_and_sam_propose(find, tmp_path):
    sam = SamProposer(save_tiny_sam(tmp_path / "sam"), points=3, threshold=-100.0, nms_iou=1.0)
    regions = sam(IMAGE)
    found = detect(IMAGE, LABELS, find, sam, threshold=0, nms_iou=1, return_masks=True)
    assert len(found) == 2 * len(regions)
    for entry in found:
        mask = decode_rle(entry["mask"])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert list(entry["box"].values()) == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]

    detector = DetectorProposer("any/detr")
    hits = [
        {"label": "thing", "score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
        for box, score in zip(BOXES, (0.9, 0.4, 0.6), strict=True)
    ]
    detector._pipeline = lambda image, threshold: hits
    plain = find(IMAGE, candidate_labels=LABELS, boxes=BOXES, threshold=0, nms_iou=1)
    assert detect(IMAGE, LABELS, find, detector, threshold=0, nms_iou=1) == plain
    weighed = detect(IMAGE, LABELS, find, detector, threshold=0, nms_iou=1, proposal_weight=0.5)
    own = {(e["label"], tuple(e["box"].values())): e["score"] for e in plain}
    proposed = dict(zip(map(tuple, BOXES), (0.9, 0.4, 0.6), strict=True))
    for entry in weighed:
        box = tuple(entry["box"].values())
        assert entry["score"] == pytest.approx((own[entry["label"], box] * proposed[box]) ** 0.5, abs=1e-5)


def test_what_proposes_sees_the_image_as_the_processor_reads_it(find):
    seen = []

    def propose(image):
        seen.append(image)
        return [{"box": [2, 3, 20, 25]}, {"box": [0.25, 0.25, 0.75, 1]}]

    every = {"candidate_labels": LABELS, "threshold": 0, "nms_iou": 1, "proposals": propose}
    expected = find(IMAGE, **every)
    # Boxes of proposals are pixels, whatever the forms of other boxes.
    assert {tuple(e["box"].values()) for e in expected} == {(2, 3, 20, 25), (0.25, 0.25, 0.75, 1)}
    assert find(np.asarray(IMAGE), **every, box_format="xywh") == expected
    assert all(image.mode == "RGB" and image.tobytes() == IMAGE.tobytes() for image in seen) and len(seen) == 2
    with pytest.raises(ValueError, match="PIXCLIP_HF_LOCAL_ADDRESSES=1"):
        find("file:///image.png", **every)


def test_lists_masks_and_a_saved_folder(find, tmp_path):
    images = [IMAGE, make_image(1, (25, 60))]
    boxes = [BOXES, [[1, 1, 20, 50]]]
    found = detect(images, LABELS, find, boxes, batch_size=2, threshold=0)
    for several, image, own in zip(found, images, boxes, strict=True):
        one = detect(image, LABELS, find, own, threshold=0)
        assert [e["box"] for e in several] == [e["box"] for e in one]
        assert [e["score"] for e in several] == pytest.approx([e["score"] for e in one], abs=1e-5)
    assert detect(images, LABELS, find, [[], BOXES[:1]], threshold=0)[0] == []
    assert detect(IMAGE, LABELS, find, lambda image: []) == []
    mask = np.zeros((30, 40), dtype=bool)
    mask[4:9, 5:20] = True
    (entry, _) = detect(IMAGE, LABELS, find, masks=[mask], threshold=0, return_masks=True)
    assert entry["mask"] is mask and list(entry["box"].values()) == [5, 4, 20, 9]
    find.save_pretrained(tmp_path)
    again = detect(IMAGE, LABELS, tmp_path, BOXES, threshold=0)
    assert [e["box"] for e in again] == [e["box"] for e in detect(IMAGE, LABELS, find, BOXES, threshold=0)]


def test_coco_results(find, tmp_path):
    mask = np.zeros((30, 40), dtype=bool)
    mask[4:9, 5:20] = True
    box = {"xmin": 5.0, "ymin": 4.0, "xmax": 20.0, "ymax": 9.0}
    found = [[{"score": 0.5, "label": "cat", "box": box, "mask": mask}], [{"score": 0.25, "label": "dog", "box": box}]]
    save_coco_results(tmp_path / "results.json", found, [7, 9], {"cat": 17, "dog": 18})
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"image_id": 7, "category_id": 17, "bbox": [5.0, 4.0, 15.0, 5.0], "score": 0.5,
         "segmentation": encode_rle(mask)},
        {"image_id": 9, "category_id": 18, "bbox": [5.0, 4.0, 15.0, 5.0], "score": 0.25},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`image_ids` must hold one id per image, got 1 for 2 images"):
        coco_results(found, [7], {"cat": 1, "dog": 2})
    with pytest.raises(ValueError, match="`category_ids` must hold every label, and lacks 'dog'"):
        coco_results(found, [7, 9], {"cat": 1})


def test_a_temperature_is_fitted():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.06)
    with pytest.raises(ValueError, match=r"`logits` must have shape \(N, T\)"):
        fit_temperature(logits, labels[:3])


BAD = [
    ({"candidate_labels": ["a"], "background": ["a"]}, "`background` must not hold a candidate label, got 'a'"),
    ({"candidate_labels": ["a"], "proposals": "windows"}, "`proposals` must be 'grid' or callable, got 'windows'"),
    ({"candidate_labels": ["a"], "threshold": 2}, r"`threshold` must lie in \[0, 1\], got 2"),
    ({"candidate_labels": ["a"], "nms_iou": -0.1}, r"`nms_iou` must lie in \[0, 1\], got -0.1"),
    ({"candidate_labels": ["a"], "proposal_weight": 1.5}, r"`proposal_weight` must lie in \[0, 1\]"),
    ({"candidate_labels": ["a"], "temperature": 0}, "`temperature` must be a positive number, got 0"),
    ({"candidate_labels": ["a"], "top_k": 0}, "`top_k` must be at least 1"),
    ({"candidate_labels": ["a"], "top_k": 2.5}, "`top_k` must be a whole number, got 2.5"),
    ({"candidate_labels": ["a"], "threshold": "high"}, "`threshold` must be a number, got 'high'"),
    ({"candidate_labels": ["a"], "temperature": "hot"}, "`temperature` must be a number, got 'hot'"),
    ({"candidate_labels": ["a"], "background": "sky"}, "`background` must be a list of texts, got 'sky'"),
    ({"candidate_labels": ["a"], "background": ["sky", " "]}, r"`background\[1\]` must not be empty"),
    ({"candidate_labels": ["a"], "background": ["sky", "sky"]}, "`background` must hold texts that differ"),
    (
        {"candidate_labels": ["a"], "proposals": lambda i: [{"box": BOXES[0], "mask": np.ones((3, 4))}]},
        r"masks of the image's size \(30, 40\), got \(3, 4\) at 0",
    ),
    ({"candidate_labels": ["a"], "proposals": lambda i: None}, "`proposals` must return a list of dicts .* NoneType"),
    ({"candidate_labels": ["a"], "proposals": lambda i: [{"box": BOXES[0]}, BOXES[1]]}, "dicts with a box, .* at 1"),
    (
        {"candidate_labels": ["a"], "proposals": lambda i: [{"box": BOXES[0], "score": float("nan")}]},
        "`proposals` must return scores that are numbers, got nan at 0",
    ),
    (
        {"candidate_labels": ["a"], "proposals": lambda i: [{"box": [50, 0, 99, 9]}]},
        r"boxes\[0\] lies outside its image",
    ),
    ({}, "`candidate_labels` must be a list of texts, got none"),
    ({"candidate_labels": ["a"], "points": [[[3, 4]]]}, "`points` must be None: they have no boxes to report"),
    ({"candidate_labels": ["a"], "boxes": BOXES, "masks": [np.ones((30, 40))], "prompt": "box"}, "must match"),
    ({"candidate_labels": ["a"], "boxes": [[0, 0, 99, 9]] * 2, "masks": [np.ones((30, 40))]}, "prompt must say"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(find, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        find(IMAGE, **options)


def test_bad_models_and_proposals(find, tiny_cloc, tmp_path):
    with pytest.raises(TypeError, match="`model` must be a Hub id, a folder or a zero-shot-region-detection pipeline"):
        detect(IMAGE, LABELS, tiny_cloc[0])
    for name in ("windows", "sam:", "yolo:a"):
        with pytest.raises(ValueError, match="`proposals` must be 'grid', 'detector:NAME', 'sam:NAME', a callable"):
            detect(IMAGE, LABELS, find, name)
    for wrong, kind in ((None, "None"), (3, "int"), (tmp_path, "PosixPath"), ({"box": BOXES[0]}, "dict")):
        with pytest.raises(TypeError, match=f"`proposals` must be 'grid', .*, got {kind}"):
            detect(IMAGE, LABELS, find, wrong)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        detect(IMAGE, LABELS, find, BOXES, batch_size=0)
    with pytest.raises(TypeError, match="`candidate_labels` must be a list of texts, got 'cat'"):
        detect(IMAGE, "cat", find)
    with pytest.raises(TypeError, match="`boxes` must be given as `proposals`"):
        detect(IMAGE, LABELS, find, boxes=BOXES)
    with pytest.raises(ValueError, match="`masks` are proposals themselves: `proposals` must be left out"):
        detect(IMAGE, LABELS, find, BOXES, masks=[np.ones((30, 40))] * 3)
    assert type(find) is pixclip_hf.RegionDetectionPipeline
