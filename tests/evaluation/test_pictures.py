"""Pictures of a report: each task draws the texts, regions and images that it measured."""

import numpy as np
import pytest
import torch
from conftest import build_tiny
from PIL import Image

import pixclip_hf
from pixclip_hf import RegionEncoder
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.evaluation import pictures
from pixclip_hf.evaluation.tasks import TASKS, draw_task
from pixclip_hf.evaluation.tasks.region_classification import PROTOCOLS
from pixclip_hf.scenes.dataset import make_scene


@pytest.fixture(scope="module", params=("CLOC", "PixCLIP"))
def encoder(request):
    classes = (getattr(pixclip_hf, request.param + part) for part in ("Config", "Model", "Processor"))
    return CachedEncoder(RegionEncoder(*build_tiny(*classes)), progress=False)


@pytest.fixture
def drawn(monkeypatch):
    """What the pictures are made of, by the function that draws."""
    calls = {}
    for name in ("draw_regions", "draw_matrix", "draw_retrieval", "draw_answers"):
        monkeypatch.setattr(
            pictures, name, lambda *given, name=name, **named: calls.setdefault(name, []).append((given, named))
        )
    return calls


def test_region_classification(encoder, drawn, tmp_path):
    files = draw_task(encoder, "region-classification", "scenes:6:1", "corrected", None, tmp_path, "c")
    assert files == ["c-regions.png", "c-matrix.png"]
    ((_, _, boxes, best, maps, masks), named) = drawn["draw_regions"][0]
    first = make_scene(0, "test", 1)["regions"]
    truths = [region["category"] for region in first][: pictures.MOST_REGIONS]
    assert named["truths"] == truths and [len(row) for row in best] == [3] * len(truths)
    masked = encoder.encoder.prompt == "mask"
    assert (masks is not None) == masked and "cloc-boxes pixclip-coco".split()[masked] in named["title"]
    # CLOC's protocol looks at whole images, as the maps do; PixCLIP's at crops.
    assert bool(maps) != masked
    # The scores are those of the measure: the protocol's templates and its way of showing a region.
    data = TASKS["region-classification"].read("scenes:6:1")
    protocol = PROTOCOLS["pixclip-coco" if masked else "cloc-boxes"]
    classes = encoder.encode_texts(data.categories, templates=protocol.templates)
    ((_, scores, names, texts, right), named) = drawn["draw_matrix"][0]
    assert [texts[i] for i in right] == truths and [name.split(": ")[1] for name in names] == truths
    tops = [texts[i] for i in scores.argmax(1)]
    assert tops == [row[0][0] for row in best] and len(classes) == len(data.categories)


@pytest.mark.parametrize("field", ("caption", "category"))
def test_region_retrieval(encoder, drawn, tmp_path, field):
    options = {"region_text": field}
    files = draw_task(encoder, "region-retrieval", "scenes:6:1", None, None, tmp_path, "r", **options)
    assert files == ["r-regions.png", "r-matrix.png", "r-retrieval.png"]
    scenes = [make_scene(i, "test", 1) for i in range(6)]
    texts = [region[field] for scene in scenes for region in scene["regions"]]
    assert drawn["draw_regions"][0][1]["truths"] == texts[: len(scenes[0]["regions"])]
    ((_, queries, rows), named) = drawn["draw_retrieval"][0]
    assert queries == list(dict.fromkeys(texts))[:4] and f"`{field}`" in named["title"]
    # Right are all regions of an equal text: as often as the measure counts, for a model that knows nothing.
    embeds = torch.cat(encoder.encode_records(scenes))
    for query, row in zip(queries, rows, strict=True):
        scores = (embeds @ encoder.encode_texts([query])[0]).numpy()
        order = np.argsort(-scores, kind="stable")[:5]
        assert [is_right for _, _, is_right in row] == [texts[i] == query for i in order]


def test_images_and_captions(encoder, drawn, tmp_path):
    assert draw_task(encoder, "image-text-retrieval", "scenes:6:1", None, None, tmp_path, "i") == ["i-retrieval.png"]
    ((_, queries, rows), named) = drawn["draw_retrieval"][0]
    assert queries == [make_scene(i, "test", 1)["captions"][0] for i in range(4)]
    assert all(len(row) == 5 and sum(is_right for *_, is_right in row) <= 1 for row in rows)
    assert "corrected: captions among 6 images" in named["title"]


def test_image_classification(encoder, tmp_path):
    for category in ("disc", "star"):
        (tmp_path / "set" / category).mkdir(parents=True)
        for index in range(8):
            make_scene(index, size=32)["image"].save(tmp_path / "set" / category / f"{index}.png")
    files = draw_task(
        encoder, "zero-shot-classification", str(tmp_path / "set"), "corrected", None, tmp_path, "z", region_text="x"
    )
    assert files == ["z-images.png"]
    with Image.open(tmp_path / "z-images.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("protocol", (None, "proposals"))
def test_detection(encoder, drawn, tmp_path, protocol):
    """The annotated boxes with the scores of the classes, or the best detections and what they lie on."""
    files = draw_task(encoder, "open-vocabulary-detection", "scenes:3:1", protocol, None, tmp_path, "d")
    scenes = [make_scene(i, "test", 1) for i in range(3)]
    if protocol is None:
        assert files == ["d-regions.png", "d-matrix.png"]
        truths = drawn["draw_regions"][0][1]["truths"]
        assert truths == [region["category"] for region in scenes[0]["regions"]][: pictures.MOST_REGIONS]
        return
    assert files == ["d-images.png"]
    ((_, images, boxes, answers, truths), named) = drawn["draw_answers"][0]
    assert len(images) == 3 and all(len(row) == pictures.MOST_REGIONS for row in (*boxes, *answers, *truths))
    # The largest window of the grid is the image, which no object fills.
    whole = [number for number, box in enumerate(boxes[0]) if box == [0, 0, *images[0].size]]
    assert all(truths[0][number] == "no object" for number in whole)
    known = {region["category"] for scene in scenes for region in scene["regions"]} | {"no object"}
    assert {truth for row in truths for truth in row} <= known and "the best 6 detections" in named["title"]


def test_tasks_without_pictures(encoder, tmp_path):
    assert draw_task(encoder, "scenes", "scenes:6:1", None, None, tmp_path, "s") == []
