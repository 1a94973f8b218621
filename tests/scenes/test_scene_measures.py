"""The measures on scenes: hand-made embeddings with known answers, and both models end to end."""

import math

import numpy as np
import pytest
import torch

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.scenes.dataset import all_descriptions, late_detail_pairs, make_scene
from pixclip_hf.scenes.measures import (
    absent_texts,
    average_precision,
    description_accuracy,
    embed_crops,
    evaluate_scenes,
    measure_scenes,
    pair_accuracy,
    scored_grounding,
)
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

IMAGE_MEASURES = {"image_to_text_recall@1", "text_to_image_recall@1", "image_count"}
DESCRIPTION_MEASURES = {f"region_description_{name}" for name in ("exact", "texture", "color", "shape", "count")}
MASK_MEASURES = {"region_description_exact_mask", "same_box_by_mask_caption", "same_box_by_mask_caption_count"}
GROUNDING_MEASURES = {"grounding_accuracy", "grounding_accuracy_count", "grounding_ap", "grounding_ap_count"}
PAIRS = ("same_box_by_mask", "late_detail", "late_detail_cut_77", "crop_same_box", "crop_late_detail")


@pytest.fixture(scope="module")
def scenes():
    """Eight scenes, some with regions that only a late detail tells apart."""
    found = [make_scene(index, "test", size=32) for index in range(30)]
    late = [scene for scene in found if late_detail_pairs(scene)]
    return late[:3] + [scene for scene in found if scene not in late][:5]


def record(*captions):
    regions = [{"caption": caption, "long_caption": caption} for caption in captions]
    return {"regions": regions}


def test_description_accuracy():
    names = all_descriptions()
    descriptions = torch.eye(256)
    records = [record("a plain red disc", "a striped red star"), record("a dotted blue ring")]
    guesses = [["a plain red disc", "a plain red star"], ["a striped pink ring"]]
    regions = [torch.stack([descriptions[names.index(guess)] for guess in row]) for row in guesses]
    found = description_accuracy(regions, records, descriptions)
    assert found == pytest.approx({"exact": 1 / 3, "texture": 1 / 3, "color": 2 / 3, "shape": 1, "count": 3})


def test_pair_accuracy_and_ties():
    texts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([1.0, 0.0])}
    records = [record("a", "b", "c"), record("b", "a")]
    regions = [torch.tensor([[0.8, 0.6], [0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])]

    def pairs(record):
        return [(0, 1)] if len(record["regions"]) == 2 else [(0, 1), (0, 2)]

    # a against b: region 0 right, region 1 wrong. a against c: equal texts, two ties. b against a: both right.
    assert pair_accuracy(regions, records, texts, pairs) == ((1 + 0 + 0.5 + 0.5 + 1 + 1) / 6, 6)
    share, count = pair_accuracy(regions, records, texts, lambda record: [])
    assert math.isnan(share) and count == 0


class LooksUp:
    """Grounds a text where a table says."""

    def __init__(self, boxes):
        self.boxes = boxes

    def find_scored_boxes(self, image, texts):
        boxes = torch.tensor([self.boxes.get((image, text), [0.0, 0.0, 1.0, 1.0]) for text in texts])
        return boxes, torch.zeros(len(texts))


def test_grounding_counts_captions_that_name_one_region():
    def scene(image, *regions):
        return {"image": image, "regions": [{"caption": f"a plain red {shape}", "box": box} for shape, box in regions]}

    records = [
        scene(
            "a", ("disc", [0.0, 0.0, 10.0, 10.0]), ("star", [20.0, 20.0, 30.0, 40.0]), ("ring", [0.0, 0.0, 9.0, 9.0])
        ),
        scene("b", ("disc", [0.0, 0.0, 8.0, 8.0]), ("disc", [8.0, 8.0, 16.0, 16.0])),
        scene("c", ("disc", [0.0, 0.0, 8.0, 8.0]), ("disc", [8.0, 8.0, 16.0, 16.0]), ("star", [1.0, 1.0, 5.0, 5.0])),
    ]
    found = {
        # Half of the union is a hit, a little less is none.
        ("a", "disc"): [0.0, 0.0, 10.0, 5.0],
        ("a", "star"): [20.0, 20.0, 30.0, 29.9],
        ("a", "ring"): [20.0, 20.0, 30.0, 40.0],
        ("c", "star"): [1.0, 1.0, 5.0, 5.0],
    }
    boxes = {(image, f"a plain red {shape}"): box for (image, shape), box in found.items()}
    _, right, present, groups = scored_grounding(LooksUp(boxes), records)
    assert right[present].tolist() == [1, 0, 0, 1] and groups[present].tolist() == [0, 0, 0, 2]


def test_absent_texts_are_not_in_the_scene():
    for index in range(20):
        scene = make_scene(index)
        shown = {region["caption"] for region in scene["regions"]}
        for caption in shown:
            random, near = absent_texts(scene, caption, np.random.default_rng(index))
            assert not {random, near} & shown
            assert sum(a != b for a, b in zip(near.split(), caption.split(), strict=True)) == 1


def test_average_precision_on_a_hand_made_ranking():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, False, True, False, True])
    assert average_precision(scores, right, 4) == pytest.approx((1 + 2 / 3 + 3 / 5 + 0) / 4)
    order = [3, 0, 4, 2, 1]
    assert average_precision(scores[order], right[order], 4) == pytest.approx(average_precision(scores, right, 4))
    # A tie is no win.
    assert average_precision(np.array([0.5, 0.5]), np.array([True, False]), 1) == 0.5
    assert math.isnan(average_precision(np.array([]), np.array([], dtype=bool), 0))


class Scores:
    """Puts every text where its region is, and knows what is there, or the opposite."""

    def __init__(self, records, knows):
        self.records, self.knows = iter(records), knows

    def find_scored_boxes(self, image, texts):
        record = next(self.records)
        shown = {region["caption"]: region["box"] for region in record["regions"]}
        boxes = torch.tensor([shown.get(text, record["regions"][0]["box"]) for text in texts], dtype=torch.float32)
        return boxes, torch.tensor([float((text in shown) == self.knows) for text in texts])


def test_grounding_ap_falls_where_absent_texts_score_like_present_ones():
    records = [make_scene(index) for index in range(10)]
    scores, right, present, _ = scored_grounding(Scores(records, True), records)
    count = present.sum()
    assert len(scores) == len(right) == 3 * count and right.sum() == count
    assert average_precision(scores, right, count) == 1
    scores, right, *_ = scored_grounding(Scores(records, False), records)
    assert average_precision(scores, right, count) < 0.25


def test_the_measures_by_mask_are_prompted_by_masks(tiny_cloc, scenes):
    """Where all boxes are the whole image, boxes know nothing of the regions: the measures by mask stay."""
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), progress=False, batch_size=4)
    whole = [
        {**scene, "regions": [{**region, "box": [0.0, 0.0, 32.0, 32.0]} for region in scene["regions"]]}
        for scene in scenes
    ]
    for prompt, equal in (("box", False), ("mask", True)):
        own, other = (torch.cat(encoder.encode_records(records, prompt=prompt)) for records in (scenes, whole))
        assert torch.equal(own, other) == equal
    metrics, blind = (measure_scenes(encoder, records, 0)[0] for records in (scenes, whole))
    assert metrics["region_description_exact_mask"] == blind["region_description_exact_mask"]
    by_mask = CachedEncoder(RegionEncoder(*tiny_cloc, prompt="mask"), progress=False, batch_size=4)
    assert (
        measure_scenes(by_mask, scenes, 0)[0]["region_description_exact"] == metrics["region_description_exact_mask"]
    )


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_embeddings_equal_the_models_one_by_one(family, scenes, request):
    """Batches, padding and the sharing of equal texts change nothing."""
    model, processor = request.getfixturevalue(f"tiny_{family}")
    texts = ["a plain red disc", "a star", "a plain red disc"]
    encoder = RegionEncoder(model, processor)
    embeds = encoder.encode_texts(texts, batch_size=1, convert_to_tensor=True)
    assert torch.equal(embeds[0], embeds[2])
    regions = encoder.encode_records(scenes[:3], batch_size=2, convert_to_tensor=True)
    images = encoder.encode_images([scene["image"] for scene in scenes[:3]], batch_size=2, convert_to_tensor=True)
    key = "masks" if family == "pixclip" else "boxes"
    for i, scene in enumerate(scenes[:3]):
        given = {key: [region[key[:-1] if key == "masks" else "box"] for region in scene["regions"]]}
        with torch.no_grad():
            output = model(**processor(images=scene["image"], text=texts[i], **given))
        assert regions[i].shape == (len(scene["regions"]), 16)
        torch.testing.assert_close(regions[i], output.region_embeds[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(images[i], output.image_embeds[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embeds[i], output.text_embeds[0], atol=1e-5, rtol=1e-5)


def test_crops_are_squares_around_the_regions(tiny_cloc):
    """A crop of a picture that is grey but for the square that the crop must show is that square."""
    model, processor = tiny_cloc
    scene = make_scene(0, size=64)
    image = scene["image"]
    square = image.crop((14, 11, 38, 35))  # box of 16 x 10 around (26, 23), times 1.5
    scene["regions"] = [{"box": [18.0, 18.0, 34.0, 28.0]}]
    encoder = CachedEncoder(RegionEncoder(model, processor), progress=False)
    (found,) = embed_crops(encoder, [scene])
    torch.testing.assert_close(found, encoder.encode_images([square]), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes_tokenizer()


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_evaluate_scenes(family, scenes, tokenizer):
    torch.manual_seed(0)
    model, processor = small_model(family, tokenizer, image_size=32)
    model.train()
    metrics = evaluate_scenes(model, processor, iter(scenes))
    assert model.training
    names = IMAGE_MEASURES | DESCRIPTION_MEASURES | MASK_MEASURES | {"crop_description_exact"}
    if family == "pixclip":
        names |= {*PAIRS, *(f"{name}_count" for name in PAIRS), "region_description_exact_pooled"}
    else:
        names |= GROUNDING_MEASURES
    assert metrics.keys() == names
    for name, value in metrics.items():
        if name.endswith("count"):
            assert value == int(value)
        elif metrics.get(f"{name}_count") == 0:
            assert math.isnan(value)
        else:
            assert 0 <= value <= 1, name
    assert metrics["image_count"] == 8
    assert metrics["region_description_count"] == sum(len(scene["regions"]) for scene in scenes)
    if family == "pixclip":
        pairs = sum(len(late_detail_pairs(scene)) for scene in scenes)
        assert metrics["late_detail_count"] == metrics["late_detail_cut_77_count"] == 2 * pairs >= 6
        # What 77 tokens leave of these texts is the same text: whatever the model, there is nothing to tell.
        assert metrics["late_detail_cut_77"] == 0.5


def test_texts_that_a_cut_makes_equal_tie_exactly(scenes, tokenizer):
    torch.manual_seed(0)
    model, processor = small_model("pixclip", tokenizer, image_size=32)
    model.eval()
    i, j = late_detail_pairs(scenes[0])[0]
    texts = [scenes[0]["regions"][k]["long_caption"] for k in (i, j)]
    for batch_size in (1, 2, 128):
        encoder = RegionEncoder(model, processor)
        options = {"batch_size": batch_size, "convert_to_tensor": True}
        whole = encoder.encode_texts(["a longer neighbor", *texts], **options)
        cut = encoder.encode_texts(["a longer neighbor", *texts], max_length=77, **options)
        assert (whole[1] - whole[2]).abs().max() > 1e-5
        assert torch.equal(cut[1], cut[2])


def test_through_a_cache_with_intervals(scenes, tokenizer, tmp_path):
    """Small shards and batches change no measure, texts that the cut makes equal tie in whatever shards they lie, and
    a second run computes nothing."""
    torch.manual_seed(0)
    model, processor = small_model("pixclip", tokenizer, image_size=32)
    expected = evaluate_scenes(model, processor, scenes)
    for first in (True, False):
        encoder = CachedEncoder(RegionEncoder(model, processor), tmp_path, shard_size=2, progress=False, batch_size=3)
        metrics, intervals = measure_scenes(encoder, scenes, resamples=30)
        assert metrics == pytest.approx(expected, nan_ok=True) and list(metrics) == list(expected)
        assert metrics["late_detail_cut_77"] == 0.5 and intervals["late_detail_cut_77"] == (0.5, 0.5)
        assert (encoder.computed > 0) == first
    shares = {name for name, value in metrics.items() if not name.endswith("count") and value == value}
    assert intervals.keys() == shares
    low, high = intervals["image_to_text_recall@1"]
    assert low <= metrics["image_to_text_recall@1"] <= high < 1


def test_own_limit_of_texts_is_kept(tiny_cloc, scenes):
    """Cut to a token beside the mark of the start, all texts are one text: guessing."""
    metrics, _ = measure_scenes(CachedEncoder(RegionEncoder(*tiny_cloc, max_length=2), progress=False), scenes, 0)
    assert metrics["text_to_image_recall@1"] == pytest.approx(1 / 8)


def test_evaluate_no_scenes(tiny_cloc):
    with pytest.raises(ValueError, match="`records` must hold at least one scene"):
        evaluate_scenes(*tiny_cloc, [])
