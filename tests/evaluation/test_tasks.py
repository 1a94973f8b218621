"""Tasks by name, in a `Trainer`, and their reports."""

import json
import math

import pytest
import torch
from PIL import Image
from stand_ins import known, tiny_clip
from transformers import TrainingArguments

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.view_encoder import ViewEncoder
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.report import Result, write_results
from pixclip_hf.evaluation.tasks import TASKS, EvaluateTasks, run_task
from pixclip_hf.evaluation.tasks.retrieval import retrieve_images, retrieve_regions
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer


def test_region_retrieval_counts_equal_texts_as_right():
    """Two regions say "a cat" (but for case): either is right; the dog's text finds a cat first."""
    encoder = known(
        texts={"a cat": [1.0, 0.0], "a dog": [0.8, 0.6]},
        regions={"c": [1.0, 0.0], "d": [0.9, 0.1], "e": [0.8, 0.6], "f": [1.0, 0.0]},
    )
    records = [
        {
            "image": Image.new("RGB", (4, 4)),
            "regions": [{"name": n, "box": [0, 0, 2, 2], "caption": text} for n, text in r],
        }
        for r in ([("c", "a cat"), ("e", "a dog")], [("d", "A  cat"), ("f", None)])
    ]
    result = retrieve_regions(encoder, Images("known", records), resamples=20)
    assert result.metrics["region_count"] == 3 and result.metrics["text_count"] == 2
    assert result.left_out == {"regions without a caption": 1}
    assert result.metrics["region_to_text_recall@1"] == 1
    assert result.metrics["text_to_region_recall@1"] == 1
    assert result.metrics["region_to_text_median_rank"] == 1
    with pytest.raises(ValueError, match="No region of known has a `long_caption`"):
        retrieve_regions(encoder, Images("known", records), "long_caption")


def test_image_text_retrieval_by_both_protocols():
    texts = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.0, 1.0]}
    encoder = known(texts=texts, images={(4, 4): [1.0, 0.0], (5, 5): [0.6, 0.8]})
    records = [
        {"image": Image.new("RGB", size), "captions": captions}
        for size, captions in (((4, 4), ["b", "a"]), ((5, 5), ["c"]))
    ]
    records.insert(1, {"image": Image.new("RGB", (6, 6)), "captions": []})
    corrected = retrieve_images(encoder, Images("known", records), resamples=0)
    assert corrected.metrics["text_count"] == 3 and corrected.metrics["image_to_text_recall@1"] == (1 + 0.5) / 2
    assert corrected.left_out == {"images without a caption": 1} and corrected.metrics["image_count"] == 2
    assert not encoder.encoder.unscaled
    official = retrieve_images(encoder, Images("Flickr30k", records), protocol="official", resamples=0)
    assert encoder.encoder.unscaled
    assert official.metrics["text_count"] == 2 and official.protocol == "official"
    assert official.metrics["image_to_text_recall@1"] == 0.5
    with pytest.raises(ValueError, match="`protocol` of image-text-retrieval must be corrected or official"):
        retrieve_images(encoder, Images("known", records), protocol="pixclip-coco")
    with pytest.raises(ValueError, match="which are of Flickr30k, Urban1k, DOCCI, got the dataset 'known'"):
        retrieve_images(encoder, Images("known", records), protocol="official")


def test_protocols_are_checked_for_every_task(tmp_path):
    for task in TASKS:
        with pytest.raises(ValueError, match="`protocol` must be one of corrected, official, .*, got 'typo'"):
            run_task(None, task, str(tmp_path), protocol="typo")
    for task in ("region-retrieval", "zero-shot-classification", "mask-sensitivity", "scenes"):
        with pytest.raises(ValueError, match=f"`protocol` official is of .*, got it for {task}"):
            EvaluateTasks({task: "scenes:4:0"}, protocol="official")


def test_official_takes_all_splits_of_docci_alone(tmp_path):
    """DOCCI's script reads the file from its start, training images first; DCI has no published script."""
    docci, dci = tmp_path / "docci", tmp_path / "dci"
    for folder in (docci / "images", dci / "photos", dci / "annotations"):
        folder.mkdir(parents=True)
    lines = []
    for split, size in (("train", (4, 4)), ("test", (5, 5))):
        for folder in (docci / "images", dci / "photos"):
            Image.new("RGB", size).save(folder / f"{split}.png")
        lines.append(json.dumps({"split": split, "image_file": f"{split}.png", "description": split}))
        entry = {"image": f"{split}.png", "short_caption": split, "extra_caption": "more"}
        (dci / "annotations" / f"{split}.json").write_text(json.dumps(entry))
    (docci / "docci_descriptions.jsonlines").write_text("\n".join(lines))
    (dci / "splits.json").write_text(json.dumps({"train": ["train.json"], "test": ["test.json"]}))
    encoder = known(texts={"train": [1.0, 0.0], "test": [0.0, 1.0]}, images={(4, 4): [1.0, 0.0], (5, 5): [0.0, 1.0]})
    for protocol, count in (("official", 2), ("corrected", 1)):
        (result,) = run_task(encoder, "long-text-retrieval", str(docci), protocol, resamples=0)
        assert result.metrics["image_count"] == count and encoder.encoder.unscaled == (count == 2)
    with pytest.raises(ValueError, match="got the dataset 'DCI'"):
        run_task(encoder, "long-text-retrieval", str(dci), "official", resamples=0)


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_tasks_on_scenes(family, request):
    encoder = CachedEncoder(RegionEncoder(*request.getfixturevalue(f"tiny_{family}")), progress=False)
    for task, count in (
        ("region-classification", "region_count"),
        ("region-retrieval", "text_count"),
        ("image-text-retrieval", "image_count"),
        ("mask-sensitivity", "region_count"),
    ):
        result, *more = run_task(encoder, task, "scenes:4:0", resamples=5, sensitivity_regions=3)
        if task == "region-classification":
            (sensitivity,) = more
            assert sensitivity.task == "mask-sensitivity" and sensitivity.metrics["region_count"] == 3
            assert len(run_task(encoder, task, "scenes:4:0", resamples=0, sensitivity_regions=0)) == 1
        assert result.task == task and result.dataset == "scenes" and result.metrics[count] >= 4
    with pytest.raises(ValueError, match="`task` must be one of"):
        run_task(encoder, "captioning", "scenes:4:0")


def test_scenes_need_a_region_model():
    encoder = CachedEncoder(ViewEncoder(*tiny_clip()), progress=False)
    with pytest.raises(ValueError, match="`split` must not be given for scenes:4:0"):
        run_task(encoder, "scenes", "scenes:4:0", split="val")
    with pytest.raises(ValueError, match="`scenes` measures CLOC and PixCLIP"):
        run_task(encoder, "scenes", "scenes:4:0")


def test_cut_texts_are_said(tiny_cloc):
    """One token per byte beside <bos> and <eos>; a second task counts its own."""
    clip = ViewEncoder(*tiny_clip(), max_length=12)
    for encoder in (CachedEncoder(clip, progress=False), CachedEncoder(RegionEncoder(*tiny_cloc, max_length=12))):
        texts = ["x" * 10, "x" * 11, "x" * 12, "short"]
        embeds = encoder.encode_texts(texts)
        assert (encoder.texts, encoder.cut_texts) == (4, 2)
        # What is left of the three longest is the same.
        assert torch.equal(embeds[1], embeds[2]) and not torch.equal(embeds[1], embeds[3])
        (result,) = run_task(encoder, "image-text-retrieval", "scenes:3:0", resamples=0)
        count = result.metrics["text_count"]
        assert result.notes == [f"{count} of {count} texts (100.0 %) were cut to 12 tokens."]
    (result,) = run_task(CachedEncoder(RegionEncoder(*tiny_cloc)), "region-retrieval", "scenes:3:0", resamples=0)
    assert result.notes == []


def test_in_a_trainer(tiny_cloc, tmp_path):
    model, processor = tiny_cloc
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    scenes = [make_scene(index, size=32) for index in range(4)]
    trainer = RegionTrainer(
        model,
        arguments,
        data_collator=RegionCollator(processor),
        train_dataset=scenes,
        eval_dataset=scenes,
        processing_class=processor,
        callbacks=[EvaluateTasks({"region-classification": "scenes:3:0", "region-retrieval": "scenes:3:0"})],
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_region_classification_accuracy"] <= 1
    assert 0 <= metrics["eval_region_retrieval_text_to_region_recall@10"] <= 1
    assert (
        trainer.state.log_history[-1]["eval_region_classification_accuracy"]
        == (metrics["eval_region_classification_accuracy"])
    )
    assert "eval_region_to_text_recall@1" in metrics
    with pytest.raises(ValueError, match="`tasks` must be among .*, got detection"):
        EvaluateTasks({"detection": "x"})


def test_results(tmp_path):
    results = [
        Result(
            "referring",
            "refcoco",
            "corrected",
            {"accuracy": 0.5, "mean_iou": 0.25, "expression_count": 8},
            {"accuracy": (0.25, 0.75), "mean_iou": (0.125, 0.5)},
        ),
        Result("scenes", "scenes", "seed 0", {"late_detail": 0.9, "x": math.nan}, split="test", notes=["Take note."]),
    ]
    results[0].left_out["crowds"] = 3
    write_results(tmp_path / "out", "org/model", results, ["a-regions.png"], {"view": "crop", "revision": None})
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["model"] == "org/model" and content["settings"] == {"view": "crop", "revision": None}
    assert content["pictures"] == ["a-regions.png"]
    assert content["late_detail"] == 0.9 and content["dataset"] == "scenes" and content["x"] is None
    assert content["results"][0]["intervals"]["accuracy"] == [0.25, 0.75]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| accuracy | 50.00 % | 25.00 – 75.00 % |" in table and "| expression count | 8 |  |" in table
    assert "Settings: view crop.\n" in table
    assert "| mean iou | 0.250 | 0.125 – 0.500 |" in table
    assert "Left out: 3 crowds." in table and "| x | – |  |" in table and "Take note." in table
