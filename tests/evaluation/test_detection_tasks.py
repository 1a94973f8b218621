"""Open-vocabulary detection by COCO's evaluator and phrase grounding, on known embeddings and a folder as COCO's."""

import json

import numpy as np
import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG
from PIL import Image
from stand_ins import KnownEncoder, known, tiny_clip, tiny_siglip

from pixclip_hf import PixCLIPConfig, PixCLIPModel
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.templates import IMAGENET_TEMPLATES
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.tasks import run_task
from pixclip_hf.evaluation.tasks.detection import detect_objects, label_scores, score_detections
from pixclip_hf.evaluation.tasks.phrase_grounding import ground_by_head, ground_by_proposals
from pixclip_hf.processing.processing_regions import encode_rle

TASK = "open-vocabulary-detection"


def truth(box, category, **more):
    x0, y0, x1, y1 = box
    return {"box": box, "category": category, "area": (x1 - x0) * (y1 - y0), **more}


def row(image_id, category_id, box, score):
    x0, y0, x1, y1 = box
    return {"image_id": image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}


def test_the_evaluator_on_hand_made_detections():
    truths = [[truth([0, 0, 20, 20], "cat"), truth([50, 50, 90, 90], "dog")], [truth([0, 0, 200, 200], "cat")]]
    right = [row(1, 1, [0, 0, 20, 20], 0.9), row(1, 2, [50, 50, 90, 90], 0.8), row(2, 1, [0, 0, 200, 200], 0.7)]
    found = score_detections(truths, ["cat", "dog"], right)
    assert found == pytest.approx(dict.fromkeys(
        ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR@100"), 1.0
    ), abs=1e-6)  # fmt: skip
    # A dog at an IoU of 0.625 counts for AP50 and for three of ten thresholds.
    shifted = [right[0], row(1, 2, [50, 50, 90, 75], 0.8), right[2]]
    found = score_detections(truths, ["cat", "dog"], shifted)
    assert found["AP50"] == pytest.approx(1) and found["AP75"] == pytest.approx(0.5)
    assert found["AP"] == pytest.approx((1 + 0.3) / 2) and found["AP_medium"] == pytest.approx(0.3)
    # A wrong one above a right one of its class halves the precision; nothing small is annotated any more.
    wrong = [row(2, 1, [300, 300, 340, 340], 0.95), right[2]]
    found = score_detections([[], [truths[1][0]]], ["cat", "dog"], wrong)
    assert found["AP50"] == pytest.approx(0.5) and "AP_small" not in found
    # Crowds are no miss.
    crowd = [[truth([0, 0, 20, 20], "cat"), truth([30, 30, 60, 60], "cat", iscrowd=True)]]
    assert score_detections(crowd, ["cat"], right[:1])["AP"] == pytest.approx(1)
    assert score_detections(truths, ["cat", "dog"], [])["AP"] == 0


def encoder_of(**regions):
    """Regions of two classes, whose templates all have one embedding."""
    classes = {"cat": [1.0, 0.0], "hot dog": [0.0, 1.0], "background": [-1.0, 0.0]}
    texts = {template.format(name): row for name, row in classes.items() for template in IMAGENET_TEMPLATES}
    encoder = known(texts=texts, regions=regions)
    encoder.encoder.model = torch.nn.Module()
    encoder.encoder.model.get_logit_scale = lambda: torch.tensor(10.0)
    encoder.encoder.model.get_logit_bias = lambda: None
    return encoder


def region(name, box, category, **more):
    return {"name": name, "box": box, "category": category, "mask": None, **more}


def test_given_boxes_are_named():
    records = [
        {"image": Image.new("RGB", (64, 64)), "width": 64, "height": 64, "regions": [
            region("a", [0, 0, 20, 20], "cat"), region("b", [30, 30, 60, 60], "hot_dog"),
            region("crowd", [0, 0, 60, 60], "cat", iscrowd=True), region("none", [0, 0, 9, 9], None),
        ]},
        {"image": Image.new("RGB", (64, 64)), "width": 64, "height": 64, "regions": []},
    ]  # fmt: skip
    data = Images("known", records, ["cat", "hot_dog"])
    result = detect_objects(encoder_of(a=[1.0, 0.0], b=[0.0, 1.0]), data)
    assert result.protocol == "given-boxes" and result.metrics["AP"] == pytest.approx(1)
    assert result.metrics["object_count"] == 2 and result.metrics["class_count"] == 2
    assert result.left_out == {"regions without a category": 1}
    swapped = detect_objects(encoder_of(a=[0.0, 1.0], b=[1.0, 0.0]), data)
    # The right hot dog comes behind the wrong one; the wrong cat lies in a crowd of cats, which is no error.
    assert swapped.metrics["AP"] == pytest.approx((1 + 0.5) / 2)
    with pytest.raises(ValueError, match="`protocol` must be given-boxes or proposals, got 'other'"):
        detect_objects(encoder_of(), data, "other")
    with pytest.raises(ValueError, match="known has no object to detect"):
        detect_objects(encoder_of(), Images("known", records[1:], ["cat"]))


def test_scores_are_those_of_the_models_own_logits():
    cosines = torch.tensor([[0.3, 0.1, -0.2], [0.31, 0.9, 0.85]])
    (clip, _), (siglip, _) = tiny_clip(), tiny_siglip()
    scale = float(clip.logit_scale.detach().exp())
    powers = np.exp(scale * cosines.double().numpy())
    expected = powers / powers.sum(1, keepdims=True)
    torch.testing.assert_close(label_scores(clip, cosines).double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    # A sigmoid of logits up to 95 tells the best of them apart no more.
    with torch.no_grad():
        siglip.logit_scale.fill_(4.7)
        siglip.logit_bias.fill_(-12.9)
    found = label_scores(siglip, cosines)
    logits = siglip.logit_scale.exp() * cosines + siglip.logit_bias
    assert torch.equal(found.flatten().argsort(), logits.flatten().argsort())
    assert found.flatten().unique().numel() == 6 > logits.sigmoid().flatten().unique().numel()
    for pixclip in (tiny_model("softmax"), tiny_model("sigmoid")):
        by_itself = torch.equal(label_scores(pixclip, cosines), (1 + cosines) / 2)
        assert by_itself == (pixclip.config.contrastive_objective == "sigmoid")


def tiny_model(objective):
    return PixCLIPModel(
        PixCLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, contrastive_objective=objective)
    )


def test_the_size_of_an_object_is_that_of_its_mask():
    mask = np.zeros((200, 200), dtype=bool)
    mask[:10, :10] = mask[-1, -1] = True
    own = {**region("a", [0, 0, 200, 200], "cat"), "mask": encode_rle(mask)}
    record = {"image": Image.new("RGB", (200, 200)), "width": 200, "height": 200, "regions": [own]}
    metrics = detect_objects(encoder_of(a=[1.0, 0.0]), Images("known", [record], ["cat", "hot_dog"])).metrics
    assert "AP_small" in metrics and "AP_large" not in metrics


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(3):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "val2017" / name)
        images.append({"id": 10 + number, "file_name": name, "width": 60, "height": 40})
        annotations += [
            {"id": 2 * number + i, "image_id": 10 + number, "category_id": 7 + i, "bbox": [5 + i, 5, 20, 20],
             "area": 400, "iscrowd": 0}
            for i in range(2)
        ]  # fmt: skip
    categories = [{"id": 7, "name": "cat"}, {"id": 8, "name": "hot dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return str(folder)


def test_both_protocols_on_a_coco_folder(coco, tiny_cloc):
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), progress=False)
    for protocol, name in ((None, "given-boxes"), ("proposals", "proposals")):
        (result,) = run_task(encoder, TASK, coco, protocol, resamples=0)
        assert (result.protocol, result.dataset, result.split) == (name, "COCO", "val2017")
        assert 0 <= result.metrics["AP"] <= result.metrics["AP50"] <= 1 and result.metrics["object_count"] == 6
    assert result.notes == ["Boxes from grid."]
    with pytest.raises(ValueError, match="`proposals` must be 'grid', 'detector:NAME'"):
        run_task(encoder, TASK, coco, "proposals", proposals="windows")


class Finder(KnownEncoder):
    """Finds every phrase in one place."""

    grounds = True

    def find_boxes(self, image, texts):
        return torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(len(texts), 4)


def phrases(*given):
    regions = [{"box": box, "caption": caption, "mask": None} for caption, box in given]
    record = {"image": Image.new("RGB", (64, 64)), "regions": regions}
    return Images("known", [record, {"image": Image.new("RGB", (8, 8)), "regions": []}])


def test_phrases_among_proposals_and_by_the_head(monkeypatch):
    from pixclip_hf.evaluation.tasks import phrase_grounding

    data = phrases(("a cat", [0, 0, 32, 32]), ("a dog", [40, 40, 60, 60]), ("a dog", [0, 32, 20, 64]))
    boxes = [[0, 32, 20, 62], *[[30, 0, 31 + i, 9] for i in range(5)], [0, 0, 32, 30]]
    monkeypatch.setattr(phrase_grounding, "propose", lambda proposals: lambda image: [{"box": b} for b in boxes])

    class Ranks(Finder):
        def encode_records(self, records, **options):
            # In their order for every text.
            return [torch.stack([torch.tensor([1.0 - 0.1 * i, 0.0]) for i in range(len(boxes))]) for _ in records]

    encoder = CachedEncoder(Ranks(texts={"a cat": [1.0, 0.0], "a dog": [1.0, 0.0]}), progress=False)
    result = ground_by_proposals(encoder, data, resamples=10)
    # The dog is right at once, by any of its boxes; the cat's box comes seventh.
    assert result.metrics == pytest.approx(
        {"recall@1": 0.5, "recall@5": 0.5, "recall@10": 1.0, "upper_bound": 1.0, "phrase_count": 2}
    )
    assert set(result.intervals) == {"recall@1", "recall@5", "recall@10", "upper_bound"}
    assert ground_by_head(encoder, data, 0).metrics == {"recall@1": 0.5, "phrase_count": 2}
    with pytest.raises(ValueError, match="`encoder` must have a grounding head"):
        ground_by_head(known(), data)
    with pytest.raises(ValueError, match="known has no phrase to ground"):
        ground_by_head(encoder, phrases(), 0)


def test_phrase_grounding_on_scenes(tiny_cloc):
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), progress=False)
    results = run_task(encoder, "phrase-grounding", "scenes:3:0", resamples=0)
    assert [result.protocol for result in results] == ["grounding-head", "proposals"]
    assert results[0].metrics["phrase_count"] == results[1].metrics["phrase_count"] > 5
