"""`pixclip-hf evaluate`, end to end on few images: what it writes, and what it says when data is missing."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor

from pixclip_hf import cli, hub
from pixclip_hf.encoders.view_encoder import load_encoder
from pixclip_hf.evaluation import command
from pixclip_hf.evaluation.command import main
from pixclip_hf.evaluation.report import weights_digest, write_results
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.measures import evaluate_scenes
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

LIBRARIES = ("torch", "transformers", "pillow")


@pytest.fixture(scope="module", params=("cloc", "pixclip"))
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    for part in small_model(request.param, scenes_tokenizer()):
        part.save_pretrained(folder)
    return folder


def options(model, folder, *more):
    return ["--model", str(model), "--output_dir", str(folder), "--no_progress", "--device", "cpu", *map(str, more)]


def test_scenes_write_the_names_of_the_demo(model, tmp_path):
    main(options(model, tmp_path, "--tasks", "scenes", "--data_dir", "scenes:6:1"))
    content = json.loads((tmp_path / "results.json").read_text())
    encoder = load_encoder(str(model))
    for setting, prefix in (("default", ""), ("hard", "hard_")):
        scenes = [make_scene(index, "test", 1, setting=setting) for index in range(6)]
        for name, value in evaluate_scenes(encoder.model, encoder.processor, scenes).items():
            assert content[prefix + name] == (pytest.approx(value) if value == value else None)
    assert content["dataset"] == "scenes" and content["split"] == "test" and content["image_count"] == 6
    assert "## scenes: scenes, test" in (tmp_path / "results.md").read_text()
    settings = content["settings"]
    assert settings.keys() == {"view", "prompt", "max_length", "dtype", "revision", "weights", *LIBRARIES}
    assert settings["view"] is None and settings["prompt"] == encoder.prompt
    assert settings["max_length"] == encoder.text_limit and settings["weights"] == weights_digest(model)
    assert (
        f"dtype float32, weights {settings['weights']}, torch {torch.__version__}"
        in (tmp_path / "results.md").read_text()
    )


def test_several_tasks_fill_a_card(model, tmp_path):
    cache = tmp_path / "cache"
    tasks = ["region-classification", "region-retrieval", "mask-sensitivity"]
    arguments = options(model, tmp_path / "out", "--data_dir", "scenes:5:0", "--resamples", 20, "--cache_dir", cache)
    first = main([*arguments, "--tasks", *tasks])
    # The sensitivity stands beside the classification, with the categories as texts.
    assert [result.task for result in first] == [tasks[0], "mask-sensitivity", *tasks[1:]]
    assert first[1].protocol == "texts: category" and first[1].metrics["region_count"] <= 100
    shards = set(cache.iterdir())
    second = main([*arguments, "--tasks", *tasks])
    assert set(cache.iterdir()) == shards and len(shards) >= 5
    for again, result in zip(second, first, strict=True):
        assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    card = ModelCard.load(hub.write_card(model, "org/name", evaluation_folder=tmp_path / "out"))
    found = {(r.metric_type, r.dataset_config, r.dataset_split): r.metric_value for r in card.data.eval_results}
    metrics = first[0].metrics
    protocol = first[0].protocol
    assert found["accuracy", protocol, "test"] == round(metrics["accuracy"], 4)
    assert found["class_mean_accuracy", protocol, "test"] == round(metrics["class_mean_accuracy"], 4)
    assert found["recall@10", first[2].protocol, "test"] is not None
    assert not any(r.metric_type.endswith("_count") for r in card.data.eval_results)


def test_missing_data_is_explained(model, tmp_path, capsys):
    arguments = options(model, tmp_path / "out", "--tasks", "referring", "--data_dir", tmp_path)
    assert cli.main(["evaluate", *arguments]) == 1
    message = capsys.readouterr().err.partition("error: ")[2]
    assert "holds no expressions" in message and "refcoco_val.jsonl" in message and "Traceback" not in message


def test_layouts_and_bad_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["--layouts"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for mark in ("instances_val2017.json", "docci_descriptions.jsonlines", "refcoco_val.jsonl", "scenes:N:SEED"):
        assert mark in shown
    with pytest.raises(SystemExit):
        main(options("none", tmp_path, "--tasks", "referring", "region-retrieval", "--data_dir", "a", "b", "c"))
    assert "--data_dir must be one for all tasks or one for each of the 2, got 3" in capsys.readouterr().err


def test_pictures(model, tmp_path):
    tasks = "image-text-retrieval", "region-retrieval"
    main(options(model, tmp_path, "--tasks", *tasks, "--data_dir", "scenes:6:0", "scenes:6:1", "--pictures"))
    shown = (tmp_path / "results.md").read_text()
    # Of each task what it measured: images that captions find; regions with their texts, and regions that texts find.
    names = ["image-text-retrieval-retrieval.png"]
    names += [f"region-retrieval-{kind}.png" for kind in ("regions", "matrix", "retrieval")]
    assert json.loads((tmp_path / "results.json").read_text())["pictures"] == names
    assert (tmp_path / names[0]).read_bytes() != (tmp_path / names[3]).read_bytes()
    for name in names:
        assert f"({name})" in shown
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    card = hub.write_folder(*load_parts(model), tmp_path / "folder", "org/name", evaluation_folder=tmp_path)
    assert f"]({names[1]})" in (card / "README.md").read_text()
    assert all((card / name).is_file() for name in [*names, "results.md", "results.json"])


def test_pictures_of_a_task_on_two_datasets(model, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "draw_task", lambda *given, **options: [f"{given[-1]}.png"])
    tasks = "region-retrieval", "region-retrieval", "image-text-retrieval"
    folders = "scenes:2:0", "scenes:2:1", "scenes:2:2"
    main(options(model, tmp_path, "--tasks", *tasks, "--data_dir", *folders, "--pictures"))
    drawn = json.loads((tmp_path / "results.json").read_text())["pictures"]
    assert drawn == ["region-retrieval-1.png", "region-retrieval-2.png", "image-text-retrieval.png"]


def test_results_of_another_model_stay(model, tmp_path):
    write_results(tmp_path, "org/other", [])
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match="holds the results of 'org/other', not of "):
        main(options("/no/such/model", tmp_path, "--tasks", "scenes", "--data_dir", "scenes:6:1"))
    assert (tmp_path / "results.json").read_text() == before


def test_prompts(model, tmp_path):
    """Boxes prompt a CLOC unless masks are asked for; what prompted it stands in the results."""
    task = ["--tasks", "region-retrieval", "--data_dir", "scenes:5:0", "--resamples", 0]
    if load_encoder(str(model)).model.config.model_type == "pixclip":
        with pytest.raises(ValueError, match="`prompt` of PixCLIPModel must be one of 'mask', got 'box'"):
            main(options(model, tmp_path, *task, "--prompt", "box"))
        return
    results = {}
    for prompt, given in (("box", []), ("mask", ["--prompt", "mask"])):
        (result,) = main(options(model, tmp_path / prompt, *task, *given))
        results[prompt] = result.metrics
        settings = json.loads((tmp_path / prompt / "results.json").read_text())["settings"]
        assert settings["prompt"] == prompt
        assert f"prompt {prompt}," in (tmp_path / prompt / "results.md").read_text()
    assert results["box"].keys() == results["mask"].keys() and results["box"] != results["mask"]


def load_parts(folder):
    return AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
