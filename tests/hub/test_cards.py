"""Cards: what a run recorded and nothing else, in metadata that the Hub's own reader takes."""

import dataclasses
import json
import re

import pytest
from conftest import build_tiny
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

import pixclip_hf
from pixclip_hf import card_facts, cards, hub
from pixclip_hf.evaluation.report import Result, weights_digest, write_results
from pixclip_hf.evaluation.tasks import TASKS
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.training import add_lora

FAMILIES = ("cloc", "pixclip")
METRICS = {
    "dataset": "scenes",
    "split": "test",
    "seed": 3,
    "train_steps": 7,
    "train_seconds": 61.5,
    "image_count": 100,
    "region_description_exact": 0.81234567,
    "region_description_count": 400,
    "image_to_text_recall@1": 0.5,
    "hard_region_description_exact": 0.25,
    "hard_late_detail": float("nan"),
}
RUN = {
    "model": {"vision_model_name_or_path": "openai/clip", "text_model_name_or_path": "/home/me/llm"},
    "data": {"dataset_name": "org/regions", "regions_per_image": 2, "region_text": ["caption", "category"],
             "scenes_seed": 0, "eval_split": "val"},
    "lora": {"lora_r": 0, "lora_alpha": 32},
    "training": {"max_steps": 7, "num_train_epochs": 3.0, "learning_rate": 1e-3, "seed": 0, "bf16": False,
                 "output_dir": "/home/me/secret"},
}  # fmt: skip


def build(family):
    prefix = {"cloc": "CLOC", "pixclip": "PixCLIP"}[family]
    return build_tiny(*(getattr(pixclip_hf, prefix + part) for part in ("Config", "Model", "Processor")))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    for part in build(family):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_bare_model_invents_nothing(family, folder):
    card = ModelCard.load(cards.write_card(folder, "org/name"))
    data = card.data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": [family, "region-feature-extraction", "zero-shot-region-classification"],
    }
    for heading in ("## Training", "## Evaluation", "License:"):
        assert heading not in card.text
    for heading in ("## Use", "## Intended use and limits", "## Citation"):
        assert heading in card.text
    assert not re.search(r"None|\{\{|\{%|\n\n\n\n", card.text)


def test_what_a_run_recorded(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "run_arguments.json").write_text(json.dumps(RUN))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    (folder / "all_results.json").write_text(json.dumps({"eval_text_to_region_recall@1": 0.125, "train_loss": 2.0}))
    card = ModelCard.load(cards.write_card(folder, "org/name", license="apache-2.0", language="en"))
    found = {
        (result.metric_name, result.dataset_type, result.dataset_config): (result.metric_type, result.metric_value)
        for result in card.data.eval_results
    }
    assert found == {
        ("region description exact", "scenes", None): ("accuracy", 0.8123),
        ("image to text recall@1", "scenes", None): ("recall@1", 0.5),
        ("region description exact", "scenes", "hard"): ("accuracy", 0.25),
        ("text to region recall@1", "org/regions", None): ("recall@1", 0.125),
    }
    assert card.data.model_name == "name" and card.data.license == "apache-2.0" and card.data.language == "en"
    # What lies on somebody's disk is no name on the Hub.
    assert card.data.base_model == ["openai/clip"] and card.data.datasets == ["org/regions"]
    assert "/home/me" not in card.content and "As recorded by the run that made the model." in card.text
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card.text, flags=re.M))
    assert rows["steps"] == "7" and rows["learning_rate"] == "0.001" and rows["seed"] == "0"
    assert rows["region_text"] == "caption, category" and rows["dataset"] == "org/regions"
    assert not rows.keys() & {"num_train_epochs", "max_grad_norm", "lora_alpha", "scenes_seed", "bf16", "output_dir"}


def test_a_card_names_what_a_model_started_from(folder):
    """Hub ids in full, folders by their last part, random weights as such."""
    sentences = {
        ("org/cloc", None, None): "Fine-tuned from `org/cloc`.",
        ("/home/me/runs/mine", None, None): "Fine-tuned from `mine`, a local folder that is not on the Hub.",
        ("./mine", None, None): "Fine-tuned from `mine`, a local folder that is not on the Hub.",
        (None, "org/clip", "gpt2"): "Made from the vision tower of `org/clip` and the text model of `gpt2`.",
        (None, "openai/clip", "openai/clip"): "Made from both towers of `openai/clip`.",
        (None, "openai/clip", "/home/me/llm"): "Made from the vision tower of `openai/clip` and the text model of "
        "`llm`, a local folder that is not on the Hub.",
        (None, None, None): "Trained from random weights.",
    }
    for names, sentence in sentences.items():
        parts = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
        run = {"model": {"model_type": "cloc", **dict(zip(parts, names, strict=True))}}
        (folder / "run_arguments.json").write_text(json.dumps(run))
        card = cards.write_card(folder, "org/name").read_text()
        assert sentence in card and "/home/me" not in card
    # What a caller says of a part of it does not hide the rest; anything else takes its place.
    (folder / "run_arguments.json").write_text(json.dumps({"model": {"model_name_or_path": "org/cloc"}}))
    assert "Fine-tuned from `org/cloc`." in cards.write_card(folder, "org/name", base_model="org/cloc").read_text()
    card = cards.write_card(folder, "org/name", base_model="org/same").read_text()
    assert "Made from `org/same`." in card and "Fine-tuned" not in card
    random = {"model_type": "cloc", "random_weights": True, **dict.fromkeys(parts[1:], "openai/clip")}
    (folder / "run_arguments.json").write_text(json.dumps({"model": random}))
    card = ModelCard.load(cards.write_card(folder, "org/name"))
    assert "Trained from random weights, in the architecture of `openai/clip`." in card.text
    assert card.data.base_model is None


def test_a_card_shows_every_setting_that_shaped_the_model(folder):
    run = {
        "model": {"model_type": "cloc", "model_name_or_path": "/home/me/mine", "freeze_text": True,
                  "config_overrides": {"grounding_loss_weight": 2}, "text_max_length": None},
        "data": {"dataset_name": "coco", "source": ["coco", "annotations=/home/me/i.json", "images=/home/me/train"]},
        "optimizer": {"vision_lr_scale": 0.1, "text_lr_scale": 1.0, "layer_decay": 0.85, "muon": ["vision", "text"]},
        "loss": {"gradient_cache_chunks": 4, "contrastive_tile_size": 128, "distillation_weight": 3.0},
        "early_stopping": {"early_stopping_patience": 3, "early_stopping_threshold": 0.0},
        "training": {"max_steps": 7, "optim": "adafactor", "adam_epsilon": 1e-8, "logging_steps": 5},
    }  # fmt: skip
    (folder / "run_arguments.json").write_text(json.dumps(run))
    card = cards.write_card(folder, "org/name").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card, flags=re.M))
    expected = {"vision_lr_scale": "0.1", "layer_decay": "0.85", "freeze_text": "True", "distillation_weight": "3.0",
                "muon": "vision text",
                "early_stopping_patience": "3", "optim": "adafactor",
                "dataset": "coco annotations=i.json images=train"}  # fmt: skip
    assert expected.items() <= rows.items() and "/home/me" not in card
    assert rows["config_overrides"] == '{"grounding_loss_weight": 2}'
    unchanged = {"text_lr_scale", "early_stopping_threshold", "text_max_length", "adam_epsilon", "logging_steps"}
    computed = {"gradient_cache_chunks", "contrastive_tile_size"}
    assert not rows.keys() & (unchanged | computed | {"model_name_or_path"})


def test_a_text_model_whose_states_were_cached_was_frozen(folder):
    (folder / "run_arguments.json").write_text(json.dumps({"model": {"text_cache": "texts", "freeze_text": False}}))
    assert "| freeze_text | True |" in cards.write_card(folder, "org/name").read_text()


def test_settings_of_cards_are_those_of_the_arguments():
    """Each argument of a run is shown, has a sentence of its own, or only says how a step is computed."""
    from pixclip_hf.training import arguments

    groups = {
        "model": arguments.ModelArguments,
        "optimizer": arguments.OptimizerArguments,
        "loss": arguments.LossArguments,
        "early_stopping": arguments.EarlyStoppingArguments,
    }
    others = {
        "model_type", "model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path", "random_weights",
        "image_size", "text_cache", "compile_towers", "vision_gradient_checkpointing",
        "text_gradient_checkpointing", "gradient_cache_chunks", "contrastive_tile_size",
    }  # fmt: skip
    assert groups.keys() == card_facts.SETTINGS.keys()
    for group, kind in groups.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        shown = card_facts.SETTINGS[group]
        assert shown == {name: defaults[name] for name in shown}
        assert set(defaults) - set(shown) <= others, group


def test_unnamed_evaluation_is_no_result(folder):
    metrics = {key: value for key, value in METRICS.items() if key != "dataset"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert ModelCard.load(cards.write_card(folder, "org/name")).data.eval_results is None


def test_measures_of_earlier_versions_are_read(folder, tmp_path):
    """`metrics.json` and `results.json` with names that have changed since give the entries of today's names."""
    old = {"region_description_colour": 0.5, "hard_region_description_colour": 0.375}
    (folder / "metrics.json").write_text(json.dumps(METRICS | old))
    evaluation = tmp_path / "eval"
    write_results(evaluation, "org/name", [Result("scenes", "scenes", "seed 0", {"crop_description_colour": 0.25})])
    card = ModelCard.load(cards.write_card(folder, "org/name", evaluation_folder=evaluation))
    found = [(result.metric_name, result.metric_value) for result in card.data.eval_results]
    assert found.count(("region description color", 0.5)) == found.count(("region description color", 0.375)) == 1
    assert ("crop description color", 0.25) in found and "colour" not in card.content


def write_records(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "run_arguments.json").write_text(json.dumps(RUN))


def write_evaluation(place, name, weights=None):
    results = [
        Result("region-classification", "COCO", "cloc-boxes", {"accuracy": 0.5}, split="val2017"),
        Result("referring", "refcoco", "corrected", {"accuracy": 0.375, "mean_iou": 0.25}, split="val, objects"),
        # On the scenes that the run recorded too: measured again.
        Result("scenes", "scenes", "seed 0", {"region_description_exact": 0.875}, split="test"),
    ]
    write_results(place, name, results, ["regions.png"], {"weights": weights})
    (place / "regions.png").write_bytes(b"png")


def test_an_evaluation_joins_what_the_run_recorded(family, tmp_path):
    """Weights are compared over other shards and another folder; the training's records stay."""
    model, processor = build(family)
    model.save_pretrained(tmp_path / "run", max_shard_size="20KB")
    assert len(list((tmp_path / "run").glob("*.safetensors"))) > 1
    write_records(tmp_path / "run")
    write_evaluation(tmp_path / "eval", "somewhere/else", weights_digest(tmp_path / "run"))
    folders = {"run_folder": tmp_path / "run", "evaluation_folder": tmp_path / "eval"}
    folder = hub.write_folder(model, processor, tmp_path / "out", "org/name", **folders)
    assert weights_digest(folder) == weights_digest(tmp_path / "run")
    card = ModelCard.load(folder / "README.md")
    found = {(result.dataset_type, result.metric_value) for result in card.data.eval_results}
    assert found == {("scenes", 0.875), ("scenes", 0.5), ("scenes", 0.25), ("COCO", 0.5)} | {
        ("refcoco", 0.375),
        ("refcoco", 0.25),
    }
    named = {result.metric_name: (result.task_type, result.metric_type) for result in card.data.eval_results}
    assert named["referring: accuracy"] == ("zero-shot-object-detection", "accuracy")
    assert named["referring: mean iou"] == ("zero-shot-object-detection", "mean_iou")
    assert named["region-classification: accuracy"] == ("zero-shot-image-classification", "accuracy")
    assert "As recorded by the run that made the model and an evaluation of the finished model" in card.text
    assert card.data.base_model == ["openai/clip"] and card.data.datasets == ["org/regions"]
    assert "## Training" in card.text and "](regions.png)" in card.text
    assert {"results.json", "results.md", "regions.png", "metrics.json"} <= {path.name for path in folder.iterdir()}


def test_every_task_has_its_name_on_the_hub():
    known = {"zero-shot-image-classification", "zero-shot-object-detection", "image-feature-extraction"}
    assert {task.hub_task for task in TASKS.values()} == known


def test_an_evaluation_of_another_model_is_refused(folder, tmp_path):
    write_evaluation(tmp_path / "eval", str(folder), "0" * 32)
    with pytest.raises(ValueError, match="those of '.*', another model by its weights"):
        cards.write_card(folder, "org/name", evaluation_folder=tmp_path / "eval")
    for name, same in (("org/name", True), (str(folder), True), ("org/other", False)):
        write_evaluation(tmp_path / "eval", name)
        if same:
            card = cards.write_card(folder, "org/name", evaluation_folder=tmp_path / "eval").read_text()
            assert (folder / "regions.png").is_file() and "An image with its regions" in card
            assert "As recorded by an evaluation of the finished model (`results.json`)." in card
        else:
            with pytest.raises(ValueError, match="another model by its name, which is all that can be compared"):
                cards.write_card(folder, "org/name", evaluation_folder=tmp_path / "eval")
    with pytest.raises(FileNotFoundError, match="`evaluation_folder` must hold results.json"):
        cards.write_card(folder, "org/name", evaluation_folder=tmp_path)


def test_snippets_of_a_card_run(folder, tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((256, 200)).convert("RGB").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", cards.write_card(folder, str(folder)).read_text(), flags=re.S)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["regions"]) == 2 and names["features"].shape == (1, 1, 16)


def test_adapters_name_their_base(tmp_path):
    model, processor = build("cloc")
    adapted = add_lora(model, r=2)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="`base_model` must be the Hub id"):
        hub.write_folder(adapted, processor, tmp_path / "none", "org/lora")
    # Beside a run on this disk, the card names no base, only what that was made from.
    adapted.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run_arguments.json").write_text(json.dumps(RUN))
    card = ModelCard.load(cards.write_card(tmp_path / "run", "runs/lora", model_type="cloc"))
    assert card.data.base_model is None and "adapters of rank 2, and the parts" in card.text
    assert str(tmp_path) not in card.content and "/home/me" not in card.content
    assert "in full. Made from the vision tower of `openai/clip`" in card.text
    folder = hub.write_folder(adapted, processor, tmp_path / "lora", "org/lora", base_model="org/cloc")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/cloc" and card.data.base_model_relation == "adapter"
    assert "lora" in card.data.tags and "adapters of rank 2" in card.text
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path)
    adapted.peft_config["default"].base_model_name_or_path = "org/cloc"
    merged = hub.write_folder(adapted, processor, tmp_path / "merged", "org/merged", merge=True)
    data = ModelCard.load(merged / "README.md").data
    assert "lora" not in data.tags and data.base_model == "org/cloc" and "base_model_relation" not in data.to_dict()


def test_bad_input(tmp_path):
    model, processor = build("cloc")
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="`folder` must be empty"):
        hub.write_folder(model, processor, tmp_path, "org/name")
    with pytest.raises(ValueError, match="`merge` needs a model with LoRA adapters, got a CLOCModel"):
        hub.write_folder(model, processor, tmp_path / "out", "org/name", merge=True)
    with pytest.raises(ValueError, match="`model_type` must be one of cloc, pixclip, got None"):
        cards.write_card(tmp_path, "org/name")
    with pytest.raises(ValueError, match="`kind` must be one of embeddings, longgrit, records, vesl, got 'other'"):
        cards.write_dataset_card(tmp_path, "org/name", "other")
    with pytest.raises(ValueError, match="`folder` must hold Parquet shards"):
        cards.write_dataset_card(tmp_path, "org/name", "vesl")


@pytest.mark.parametrize("kind", cards.DATASET_CARDS)
def test_dataset_card(kind, tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        scenes_dataset(count, size=32).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    given = {"models": {"boxes": "org/detector"}, "license": "mit"}
    path = cards.write_dataset_card(tmp_path, "org/name", kind, **given)
    card = DatasetCard.load(path)
    assert card.data.size_categories == "n<1K" and card.data.license == "mit" and card.data.language is None
    files = {entry["split"]: entry["path"] for entry in card.data.to_dict()["configs"][0]["data_files"]}
    assert files == {"train": "data/train-*.parquet", "test": "data/test-*.parquet"}
    assert "| train | 3 | 1 |" in card.text and "| boxes | org/detector |" in card.text
    assert not re.search(r"None|\{\{|\{%", card.text)


def test_the_card_of_any_dataset_in_the_schema(tmp_path):
    """Counts of what the shards hold, sources, a license or that there is none, and a picture."""
    records = [dict(record) for record in scenes_dataset(5, size=32)]
    regions = [region for record in records for region in record["regions"]]
    for number, region in enumerate(regions):
        region |= {"mask": region["mask"] if number % 2 else None, "long_caption": None, "source": "me"}
    regions[0]["source"], regions[1]["caption"] = None, None
    records[4] |= {"captions": [], "regions": []}
    left = [region for record in records for region in record["regions"]]
    pixclip_hf.save_records(records, tmp_path / "data-set", max_shard_rows=2)
    card = DatasetCard.load(cards.write_dataset_card(tmp_path / "data-set", "org/name"))
    counts = {
        name: int(count.replace(",", ""))
        for name, count in re.findall(r"^\| ([\w ]+) \| ([\d,]+) \|$", card.text, re.M)
    }
    assert counts["images"] == 5 and counts["images with a caption"] == 4 and counts["images without regions"] == 1
    assert counts["regions"] == len(left) and counts["regions with a mask"] == sum(bool(r["mask"]) for r in left)
    assert counts["regions with a caption"] == len(left) - 1 and counts["regions with a long caption"] == 0
    assert counts["different categories"] == len({region["category"] for region in left})
    assert counts["me"] == len(left) - 1 and counts["not recorded"] == 1
    assert card.data.tags == ["regions", "masks"] and "annotations_creators" not in card.data.to_dict()
    assert "did not say where its images come from" in card.text and "License: none is stated." in card.text
    with Image.open(tmp_path / "data-set" / "samples.png") as picture:
        assert min(picture.size) > 200
    assert "](samples.png)" in card.text
    given = {"sources": ["org/photos", "my camera"], "license": "mit", "pictured": False}
    card = DatasetCard.load(cards.write_dataset_card(tmp_path / "data-set", "org/name", **given))
    assert card.data.source_datasets == ["org/photos"] and "Images: `org/photos`, `my camera`." in card.text
    assert "License: mit." in card.text and "samples.png" not in card.text and "none is stated" not in card.text


def test_the_card_of_records_needs_their_schema(tmp_path):
    scenes_dataset(2, size=32).remove_columns("alt_text").to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="is not in the record schema: it lacks the columns alt_text"):
        cards.write_dataset_card(tmp_path, "org/name")
