"""What is not a number is wrong, never right: a miss in every measure. A model, or embeddings, with such values are
refused by name in every task."""

import json

import numpy as np
import pytest
import torch
from conftest import build_tiny
from PIL import Image
from stand_ins import known

import pixclip_hf
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.intervals import class_mean_interval, mean_interval
from pixclip_hf.evaluation.metrics.referring_accuracy.box_overlap import pairwise_iou
from pixclip_hf.evaluation.metrics.region_classification.class_accuracy import label_hits
from pixclip_hf.evaluation.metrics.retrieval_recall.tied_ranks import count_ranks, expected_ranks, hit_chances
from pixclip_hf.evaluation.retrieval import nearest_keys, rank_right_keys, retrieval_measures
from pixclip_hf.evaluation.tasks import TASKS, run_task
from pixclip_hf.evaluation.tasks.referring import refer_by_similarity
from pixclip_hf.finite import check_finite, check_finite_weights
from pixclip_hf.scenes.dataset import all_descriptions
from pixclip_hf.scenes.measures import description_hits, pair_hits

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_score_that_is_no_number_is_no_hit(bad, k):
    own = np.array([[bad, 0.1, 0.2], [bad, bad, bad], [0.9, 0.1, 0.2]])
    assert label_hits(own, np.zeros(3, dtype=int), k).tolist() == [0, 0, 1]
    right = np.zeros((3, 3), dtype=bool)
    right[:, 0] = True
    counts = count_ranks(own, right, 1e-6)
    assert hit_chances(*counts, k).tolist() == [0, 0, 1]
    assert expected_ranks(*counts).tolist() == [4, 4, 1]  # behind all three keys


def test_other_keys_that_are_no_numbers_help_no_one():
    scores = np.array([[0.5, NAN, NAN, 0.1]])
    assert label_hits(scores, np.array([0]), 2)[0] == 0 and label_hits(scores, np.array([0]), 3)[0] == 1
    counts = count_ranks(scores, np.array([[True, False, False, False]]), 1e-6)
    assert hit_chances(*counts, 2)[0] == 0 and hit_chances(*counts, 3)[0] == 1
    # A class that is masked out is none that could not be scored.
    assert label_hits(np.array([[0.5, -INF, 0.1]]), np.array([0]), 1)[0] == 1


def test_queries_that_are_no_numbers_miss():
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(100, 8, generator=generator), dim=-1)
    queries, ids = keys.clone(), torch.arange(100)
    queries[::2] = NAN
    for block in (7, 2048):
        ranks = rank_right_keys(queries, keys, ids, ids, block)
        assert ranks.hits(1).mean() == 0.5 and not ranks.hits(10)[::2].any() and not ranks.hits(200)[::2].any()
        assert (ranks.expected()[::2] == 101).all()
        reference = count_ranks((queries @ keys.T).numpy(), torch.eye(100, dtype=torch.bool).numpy(), 1e-6)
        for own, expected in zip((ranks.greater, ranks.tied_wrong, ranks.tied_right), reference, strict=True):
            assert np.array_equal(own, expected)
    measures, intervals = retrieval_measures(queries.roll(1, 0), keys, ids, ids)
    # None of them is right: what is no number would have been half of it.
    assert measures["image_to_text_recall@1"] < 0.05 and measures["text_to_image_recall@10"] < 0.2
    low, high = intervals["image_to_text_recall@1"]
    assert 0 <= low <= measures["image_to_text_recall@1"] <= high <= 1
    found, indices = nearest_keys(keys[:1], torch.cat([torch.full((1, 8), NAN), keys]), 3)
    assert indices[0, 0] == 1 and not found.isnan().any()


def test_boxes_that_are_no_numbers_overlap_nothing():
    boxes = [[0, 0, 10, 10], [NAN, 0, 10, 10], [-INF, -INF, INF, INF], [NAN] * 4]
    assert pairwise_iou(boxes, [[0, 0, 10, 10]])[:, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("resamples", [5, 0])
def test_no_interval_of_what_is_no_number(resamples):
    values, groups = np.array([1.0, NAN, 0.0]), np.arange(3)
    with pytest.raises(ValueError, match=r"`values\[1\]` must be finite, got nan"):
        mean_interval(values, groups, resamples)
    if resamples:
        with pytest.raises(ValueError, match=r"`hits\[1\]` must be finite, got nan"):
            class_mean_interval(values, np.zeros(3, dtype=int), groups, resamples)


def test_an_expression_without_a_score_is_a_miss(monkeypatch):
    monkeypatch.setattr("pixclip_hf.encoders.cached.check_finite", lambda *_: None)
    record = {
        "image": Image.new("RGB", (20, 20)),
        "regions": [
            {"name": name, "box": box, "mask": None} for name, box in (("a", [0, 0, 9, 9]), ("b", [9, 9, 19, 19]))
        ],
        "expressions": [{"text": text, "boxes": [[0, 0, 9, 9]]} for text in ("good", "bad")],
    }
    encoder = known(texts={"good": [1.0, 0.0], "bad": [NAN, 0.0]}, regions={"a": [1.0, 0.0], "b": [0.0, 1.0]})
    (result,) = [refer_by_similarity(encoder, Images("x", [record]), resamples=5)]
    assert result.metrics["accuracy"] == 0.5 and result.metrics["mean_iou"] == 0.5
    assert result.metrics["upper_bound"] == 1 and result.chance["accuracy"] == 0.5


def test_scenes_without_scores_are_misses():
    name = all_descriptions()[0]
    records = [{"regions": [{"caption": name, "long_caption": text} for text in "xy"]}]
    descriptions = torch.eye(len(all_descriptions()))
    regions = [torch.stack([descriptions[0], torch.full_like(descriptions[0], NAN)])]
    # The first description is where the largest of no numbers is found.
    assert description_hits(regions, records, descriptions).tolist() == [[True] * 3, [False] * 3]
    texts = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])}
    for bad in (NAN, INF):
        rows = [torch.tensor([[1.0, 0.0], [0.0, bad]])]
        hits, _ = pair_hits(rows, records, texts, lambda record: [(0, 1)])
        assert hits.tolist() == [1, 0]


@pytest.fixture(scope="module")
def broken():
    """A CLOC, of whose weights one is no number."""
    model, processor = build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor)
    next(parameter for name, parameter in model.named_parameters() if "vision_model" in name).data.view(-1)[3] = NAN
    return model, processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data for every task, by its name."""
    folder = tmp_path_factory.mktemp("data")
    for name in (
        "long/image/a.png",
        "long/image/b.png",
        "classes/cup/a.png",
        "classes/mug/b.png",
        "refer/train2014/COCO_train2014_000000000007.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / name)
    (folder / "long/caption").mkdir()
    for name in "ab":
        (folder / f"long/caption/{name}.txt").write_text(f"A long text about {name}.")
    line = {
        "file_name": "COCO_train2014_000000000007_2.jpg",
        "image_id": 7,
        "ann_id": 2,
        "anns": [{"id": 1, "bbox": [0, 0, 10, 10]}, {"id": 2, "bbox": [20, 10, 15, 15]}],
        "sentences": [{"raw": "the right one"}],
    }
    (folder / "refer/refcoco_val.jsonl").write_text(json.dumps(line) + "\n")
    others = {
        "long-text-retrieval": str(folder / "long"),
        "referring": str(folder / "refer"),
        "zero-shot-classification": str(folder / "classes"),
    }
    return {task: others.get(task, "scenes:3:0") for task in TASKS}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_refuses_a_model_of_no_numbers(task, broken, data):
    encoder = CachedEncoder(RegionEncoder(*broken), progress=False)
    with pytest.raises(
        ValueError, match="`model` must have finite weights, got NaN or infinite values in 'vision_model"
    ):
        run_task(encoder, task, data[task], resamples=0)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_refuses_embeddings_of_no_numbers(task, tiny_cloc, data, monkeypatch):
    model, processor = tiny_cloc
    encoder = RegionEncoder(model, processor)
    # The weights are fine; what the model makes of some of its inputs is not.
    for name in ("encode_regions", "encode_images", "encode_texts"):
        original = getattr(encoder, name)

        def spoiled(*args, original=original, **options):
            rows = original(*args, **options)
            (rows[-1] if isinstance(rows, list) else rows)[-1] = NAN
            return rows

        monkeypatch.setattr(encoder, name, spoiled)
    with pytest.raises(
        ValueError, match=r"The embedding of .*, item \d+ has NaN or infinite values, computed in float32"
    ):
        run_task(CachedEncoder(encoder, progress=False), task, data[task], resamples=0)


def test_tasks_run_on_these_data(tiny_cloc, data):
    """What refuses above is the model, not the data."""
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), progress=False)
    for task in ("long-text-retrieval", "referring", "zero-shot-classification"):
        assert run_task(encoder, task, data[task], resamples=0)


def test_a_cached_shard_of_no_numbers_is_refused(tiny_cloc, tmp_path):
    from safetensors.torch import load_file, save_file

    CachedEncoder(RegionEncoder(*tiny_cloc), tmp_path, progress=False).encode_texts(["a cup"])
    (path,) = tmp_path.glob("*.safetensors")
    stored = load_file(path)
    stored["embeds"][0, 0] = NAN
    save_file(stored, path)
    with pytest.raises(ValueError, match=f"The cached shard '{path}', row 0 has NaN"):
        CachedEncoder(RegionEncoder(*tiny_cloc), tmp_path, progress=False).encode_texts(["a cup"])


def test_weights_are_looked_at_again_when_they_change(tiny_cloc):
    model, processor = tiny_cloc
    encoder = CachedEncoder(RegionEncoder(model, processor), progress=False)
    encoder.encode_texts(["a cup"])
    with torch.no_grad():
        next(model.parameters()).fill_(INF)
    with pytest.raises(ValueError, match="must have finite weights"):
        encoder.encode_texts(["a mug"])
    for find in (encoder.find_boxes, encoder.find_scored_boxes):
        with pytest.raises(ValueError, match="must have finite weights"):
            find(Image.new("RGB", (8, 8)), ["a mug"])


def test_weights_that_are_looked_at():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("masked", torch.tensor([0.0, -INF]))
    model.register_buffer("count", torch.tensor(3))
    check_finite_weights(model)
    check_finite_weights(torch.nn.Linear(2, 2, device="meta"))
    model.masked[0] = NAN
    with pytest.raises(ValueError, match="`encoder` must have finite weights, got NaN or infinite values in 'masked'"):
        check_finite_weights(model, "encoder")
    half = torch.nn.Linear(2, 2).half()
    half.bias.data[1] = INF
    with pytest.raises(ValueError, match="'bias'"):
        check_finite_weights(half)
    with pytest.raises(
        ValueError, match="The state of 'b' has NaN .*computed in float16, 1 of 2 rows do: take bfloat16"
    ):
        check_finite(torch.tensor([[1.0], [INF]]), "The state of", ["a", "b"], torch.float16)
