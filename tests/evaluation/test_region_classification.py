"""Region classification: protocols on known embeddings, and tiny random models at chance."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import known

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.templates import IMAGENET_TEMPLATES, ONE_TEMPLATE
from pixclip_hf.evaluation.image_sets import Images, read_images
from pixclip_hf.evaluation.tasks.image_classification import classify_images
from pixclip_hf.evaluation.tasks.region_classification import PROTOCOLS, choose_protocol, classify_regions

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "regions-train"


def data(*regions, categories=("cat", "hot_dog")):
    records = [
        {"image": Image.new("RGB", (8, 8)), "regions": [{"box": [0, 0, 4, 4], "mask": None, **region}]}
        for region in regions
    ]
    return Images("known", records, list(categories), left_out={"boxes without area on their image": 2})


def test_classes_are_means_of_normalized_templates():
    texts = {"a cat.": [1.0, 0.0], "the cat.": [0.0, 1.0], "a dog.": [0.6, 0.8], "the dog.": [0.6, 0.8]}
    found = known(texts=texts).encode_texts(["cat", "dog"], ("a {}.", "the {}."))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    with pytest.raises(ValueError, match="`templates` must each have a '{}' for the class, got 'a cat'"):
        known().encode_texts(["cat"], ("a cat",))


def test_imagenet_templates():
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    assert all(template.count("{}") == 1 and template.endswith(".") for template in IMAGENET_TEMPLATES)
    for template in (
        "a bad photo of a {}.",
        "itap of my {}.",
        "the {} in a video game.",
        "a photo of the hard to see {}.",
    ):
        assert template in IMAGENET_TEMPLATES


@pytest.mark.parametrize(("protocol", "name"), (("context-masks", "hot dog"), ("pixclip-coco-official", "hot_dog")))
def test_protocols_on_known_embeddings(protocol, name):
    """Class cat twice (one right), hot dog once (right), a crowd of cats (wrong)."""
    template = ONE_TEMPLATE[0]
    encoder = known(
        texts={template.format("cat"): [1.0, 0.0], template.format(name): [0.0, 1.0]},
        regions={"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.0, 1.0], "d": [0.0, 1.0]},
    )
    regions = [
        {"name": "a", "category": "cat"},
        {"name": "b", "category": "cat"},
        {"name": "c", "category": "hot_dog"},
        {"name": "d", "category": "cat", "iscrowd": True},
    ]
    result = classify_regions(encoder, data(*regions), protocol, resamples=20)
    crowds = protocol == "pixclip-coco-official"
    assert result.protocol == protocol and result.metrics["region_count"] == 3 + crowds
    assert result.metrics["accuracy"] == pytest.approx(2 / (3 + crowds))
    assert result.metrics["class_mean_accuracy"] == pytest.approx((1 / (2 + crowds) + 1) / 2)
    assert result.metrics["top5_accuracy"] == result.metrics["class_mean_top5_accuracy"] == 1
    assert result.left_out.get("crowds", 0) == (not crowds)
    assert result.left_out["boxes without area on their image"] == 2
    low, high = result.intervals["accuracy"]
    assert 0 <= low < result.metrics["accuracy"] < high <= 1


def test_names_of_protocols():
    masks, boxes, peer = (
        SimpleNamespace(prompt="mask", view=None),
        SimpleNamespace(prompt="box", view=None),
        SimpleNamespace(prompt="mask", view="blur"),
    )
    assert choose_protocol(None, "COCO", masks) == choose_protocol("corrected", "COCO", masks) == "pixclip-coco"
    assert choose_protocol(None, "COCO", boxes) == "cloc-boxes"
    assert choose_protocol(None, "COCO", peer) == "context-masks"
    assert choose_protocol("official", "COCO", peer) == "pixclip-coco-official"
    assert choose_protocol("official", "LVIS", masks) == "pixclip-lvis-official"
    for name in PROTOCOLS:
        assert choose_protocol(name, "LVIS", masks) == name
    with pytest.raises(
        ValueError, match="`protocol` must be corrected, official or one of pixclip-coco, .* got 'coco'"
    ):
        choose_protocol("coco", "COCO", masks)


def test_every_protocol_is_explained():
    guide = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert set(PROTOCOLS) <= set(re.findall(r"`([\w-]+)`", guide.read_text()))


def test_protocols_show_what_they_say(tiny_pixclip):
    """The crop, the frame of the crop and the whole image give three embeddings of one region; boxes drop the mask."""
    encoder = CachedEncoder(RegionEncoder(*tiny_pixclip), progress=False)
    seen = {}
    embed = encoder.encoder.encode_records

    def watch(records, **options):
        rows = embed(records, **options)
        seen.setdefault(protocol, []).extend((r["image"].size, r["regions"][0]["mask"] is None) for r in records)
        return rows

    encoder.encoder.encode_records = watch
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    square = [[10, 10, 26, 10, 26, 26, 10, 26]]
    regions = [{"box": [10, 10, 26, 26], "mask": square, "category": "cat"}]
    for protocol in PROTOCOLS:
        classify_regions(encoder, Images("one", [{"image": image, "regions": regions}], ["cat", "dog"]), protocol, 0)
    assert seen == {
        "pixclip-coco": [((24, 24), False)],
        "pixclip-coco-official": [((24, 24), False)],
        "pixclip-lvis-official": [((64, 64), False)],
        "cloc-boxes": [((64, 40), True)],
        "context-masks": [((64, 40), False)],
    }


def test_nothing_to_classify():
    crowd = {"name": "a", "category": "cat", "iscrowd": True}
    with pytest.raises(ValueError, match="no region to classify; left out: .*'crowds': 1"):
        classify_regions(known(), data(crowd), "context-masks")


def test_classify_images():
    texts = {f"a {name}": vector for name, vector in (("cat", [1.0, 0.0]), ("dog", [0.0, 1.0]))}
    encoder = known(texts=texts, images={(8, 8): [0.8, 0.6], (9, 9): [1.0, 0.0]})
    records = [{"image": Image.new("RGB", size), "label": label} for size, label in (((8, 8), 0), ((9, 9), 1))]
    result = classify_images(encoder, Images("folders", records, ["cat", "dog"]), ("a {}",), resamples=0)
    assert result.metrics["accuracy"] == 0.5 and result.metrics["image_count"] == 2
    assert result.protocol == "1 template"
    # Two classes of one name: nobody can tell which of them a cat is.
    result = classify_images(encoder, Images("folders", records[:1], ["cat", "dog", "cat"]), ("a {}",), resamples=0)
    assert result.metrics["accuracy"] == 0.5 and result.metrics["class_count"] == 3


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_real_photographs_at_chance(family, request, tmp_path):
    """The plumbing on real annotations: every region is counted or said to be left out, a random model guesses."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared photographs with regions")
    encoder = CachedEncoder(RegionEncoder(*request.getfixturevalue(f"tiny_{family}")), tmp_path, progress=False)
    found = read_images("region-classification", str(SHARED))
    total = sum(len(record["regions"]) for record in found.records) + sum(found.left_out.values())
    assert total == 852 and len(found.categories) == 116 and None not in found.categories
    result = classify_regions(encoder, found, "context-masks", resamples=50)
    assert result.metrics["region_count"] + sum(result.left_out.values()) == 852
    assert result.left_out["crowds"] > 0
    assert result.left_out["regions without a category"] > 0
    # Chance is 1 of 116; a model that always says the most frequent class is right this often.
    counts = Counter(region["category"] for record in found.records for region in record["regions"])
    assert result.metrics["accuracy"] <= counts.most_common(1)[0][1] / result.metrics["region_count"] + 0.02
    assert result.metrics["class_mean_accuracy"] <= 4 / 116
    low, high = result.intervals["accuracy"]
    assert low <= result.metrics["accuracy"] <= high
