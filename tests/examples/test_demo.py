"""The demo's report and picture, on a model that has learned nothing yet."""

import json
import re
import shlex
import sys
from types import SimpleNamespace

import demo
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor

from pixclip_hf import cli
from pixclip_hf.scenes import estimate
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.measures import evaluate_scenes
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

OTHERS = ("hard", "train", "towers")
PAIRS = ("same_box_by_mask", "late_detail", "late_detail_cut_77", "crop_same_box", "crop_late_detail")
KEYS = {
    "cloc": {"region_description_exact", "region_description_exact_mask", "grounding_accuracy"},
    "pixclip": {"region_description_exact", "region_description_exact_pooled", *PAIRS},
}


@pytest.fixture(params=("cloc", "pixclip"))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    return scenes_tokenizer()


@pytest.fixture
def small(family, tokenizer):
    torch.manual_seed(0)
    model, processor = small_model(family, tokenizer)
    return model.eval(), processor


def test_report(family, small, tmp_path):
    metrics, hard = (
        evaluate_scenes(*small, [make_scene(i, "test", setting=setting) for i in range(12)])
        for setting in ("default", "hard")
    )
    assert metrics.keys() >= KEYS[family]
    run = {"train_steps": 7, "train_seconds": 61.4, "seed": 3, "image_count": 12}
    for measured in (metrics, hard):  # too few scenes to be sure of a pair
        for name in ("same_box_by_mask_caption", *(PAIRS if family == "pixclip" else ())):
            measured[name], measured[f"{name}_count"] = (0.9, 100) if measured is metrics else (0.25, 8)
    metrics = {**metrics, **run, **{f"hard_{name}": value for name, value in hard.items()}}
    text = demo.report(family, metrics, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "7 steps in 61 s, seed 3" in text and "12 unseen scenes" in text
    assert "(regions.png)" in text and "(scenes.png)" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    # No measure is left out of the report.
    shares = [name for name in metrics if isinstance(metrics[name], float) and name.split("_")[0] not in OTHERS]
    repeated = ["region_description_exact_mask"] if family == "pixclip" else []
    counts = [name for name in shares if name.endswith("_count")]
    # Measures under their former names give the same report.
    former = {name.replace("_color", "_colour"): value for name, value in metrics.items()}
    assert former.keys() != metrics.keys() and demo.report(family, former, tmp_path) == text
    assert {len(row) for row in rows} == {4}
    assert len(rows) == 2 + len(shares) - len(repeated) - len(counts)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["image to caption, recall@1"][2] == "8.3 %"
    if family == "pixclip":
        same_box = cells["same box, told apart by the mask and long captions"]
        assert same_box == ["90.0 ± 3.0 % of 100", "25.0 ± 15.3 % of 8", "50 %"]
        # What ties fix has no error.
        assert cells["… with the texts cut to 77 tokens"] == ["90.0 % of 100", "25.0 % of 8", "50 %"]
        inherited = {**metrics, **{f"towers_{name}": value for name, value in metrics.items()}, "towers_seconds": 30.2}
        text = demo.report(family, inherited, tmp_path)
        assert "7 steps in 61 s from towers trained in 30 s, seed 3" in text and "inherited towers" in text
    else:
        count = metrics["region_description_count"]
        assert cells["region described by box, exact of 256"][0].endswith(f"% of {count}")


def test_pictures(family, small, tmp_path):
    demo.draw_front(*small, tmp_path, seed=0)
    demo.draw_page(*small, tmp_path, seed=0, count=3)
    for name in ("regions.png", "scenes.png"):
        picture = Image.open(tmp_path / name)
        assert picture.format == "PNG" and picture.width > 200 and picture.height > 200
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_use_pipeline(family, small, tmp_path, capsys):
    for part in small:
        part.save_pretrained(tmp_path)
    demo.use_pipeline(tmp_path, seed=0)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith(("  ✓", "  ✗"))]
    regions = make_scene(0, "test")["regions"]
    assert len(lines) == len(regions)
    for line, region in zip(lines, regions, strict=True):
        assert line.endswith(f"  is {region['caption']}")
        assert line[2:].startswith(region["caption"]) == (line[0] == "✓")


FEW = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--scenes_train_images", "4", "--use_cpu")


def test_whole(family, tmp_path, monkeypatch, capsys):
    """Everything that a run leaves behind, and that its card shows it."""
    for name in demo.RECIPES:
        monkeypatch.setitem(demo.RECIPES, name, (*FEW, "--scenes_eval_images", "2"))
    monkeypatch.setattr(demo, "TEST_IMAGES", 12)
    monkeypatch.setattr(estimate, "TIMED_SCENES", (1, 2))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", family, "--seed", "3", "--output_dir", str(tmp_path)])
    demo.main()
    folder = tmp_path / family
    out = capsys.readouterr().out
    said, done = out.split(" on this machine.\n")
    assert said.startswith("This demo will") and said.count(": about ") == (4 if family == "pixclip" else 3)
    # Where the output is no terminal, each training has one line.
    for name in ("cloc", "pixclip") if family == "pixclip" else ("cloc",):
        assert re.search(rf"^training {name}: 50 % 100 %(, loss [\d.]+)?$", done, flags=re.M)
    assert f"written: {folder}\n\nTry next:\n" in done
    commands = [shlex.split(command) for command in done.split("Try next:\n\n")[1].splitlines()]
    assert [words[1] for words in commands] == ["embed", "search", "app"]
    if family == "cloc":
        try_commands(commands, monkeypatch, capsys)
    # Every region of the first scenes with what it is called, right or wrong.
    answers = re.findall(r"^\| ([✓✗]) (.*?) \| (.*?) \|$", (folder / "report.md").read_text(), flags=re.M)
    scenes = [make_scene(i, "test", 3) for i in range(4)]
    assert [truth for *_, truth in answers] == [region["caption"] for scene in scenes for region in scene["regions"]]
    assert all((mark == "✓") == (answer == truth) for mark, answer, truth in answers)
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    measured = {
        (result.metric_name.replace(" ", "_"), result.dataset_config): result.metric_value
        for result in card.data.eval_results
    }
    for key in ("region_description_exact", "image_to_text_recall@1"):
        assert measured[key, None] == round(metrics[key], 4)
        assert measured[key, "hard"] == round(metrics[f"hard_{key}"], 4)
    assert not any(name.startswith("towers") for name, _ in measured)
    assert "| steps | 2 |" in card.text and "| scenes_seed | 3 |" in card.text
    assert "(regions.png)" in card.text and "(scenes.png)" in card.text
    left = {"run_arguments.json", "report.md", "regions.png", "scenes.png", "stage.json"}
    assert left <= {path.name for path in folder.iterdir()}
    if family == "pixclip":
        assert metrics["towers_seconds"] > 0 and (folder / "towers" / "stage.json").is_file()
        assert 0 <= metrics["towers_region_description_exact"] <= 1


def try_commands(commands, monkeypatch, capsys):
    """They run as printed, on fewer scenes and without a server."""
    served = []
    interface = SimpleNamespace(launch_demo=lambda shown, **options: served.append(shown))
    monkeypatch.setitem(sys.modules, "pixclip_hf.app.interface", interface)
    for program, *words in commands:
        assert program.endswith("pixclip-hf")
        assert cli.main([{"scenes:200:1": "scenes:6:1"}.get(word, word) for word in words]) == 0
    assert "a striped blue star" in capsys.readouterr().out and len(served) == 1


def test_the_estimate_is_that_of_the_recipe(family, monkeypatch):
    """Seconds per timed step times the steps of the recipe, and per timed scene times the scenes."""
    ticks = iter(range(100))
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(estimate, "TIMED_SCENES", (1, 2))
    monkeypatch.setattr(
        estimate, "evaluate_scenes", lambda model, processor, records: len(records) - 1 and next(ticks)
    )
    monkeypatch.setitem(estimate.RECIPES, family, ("--max_steps", "80", *FEW[2:]))
    # A tick from the last step that warms up to the end, over the timed steps.
    assert estimate.seconds_of_training(family) == pytest.approx(80 / estimate.TIMED_STEPS)
    # One scene takes a tick and two of them two, so that ten take ten.
    assert estimate.seconds_of_measuring(family, 10) == 10
    assert estimate.in_words(70) == "70 seconds" and estimate.in_words(600) == "10 minutes"


def test_the_estimate_of_points_is_that_of_a_model_that_reads_them(monkeypatch):
    monkeypatch.setitem(estimate.RECIPES, "cloc-points", ("--max_steps", "80", *FEW[2:], "--point_prompt_share", "1"))
    assert estimate.seconds_of_training("cloc-points") > 0


def test_towers_are_reused_by_recipe_seed_and_code(tmp_path, monkeypatch):
    from pixclip_hf.scenes import recipes

    monkeypatch.setitem(demo.RECIPES, "cloc", FEW)
    stage = demo.train_stage("cloc", 3, tmp_path)
    assert stage["seconds"] > 0 and demo.find_stage("cloc", 3, tmp_path) == stage
    assert demo.find_stage("cloc", 4, tmp_path) is None and demo.find_stage("cloc", 3, tmp_path / "none") is None
    with monkeypatch.context() as change:
        change.setitem(demo.RECIPES, "cloc", (*FEW, "--warmup_steps", "1"))
        assert demo.find_stage("cloc", 3, tmp_path) is None
    with monkeypatch.context() as change:
        change.setattr(recipes, "code_version", lambda: "another")
        assert demo.find_stage("cloc", 3, tmp_path) is None
    assert demo.find_stage("cloc", 3, tmp_path) == stage


def test_pixclip_starts_equal_to_its_towers(tokenizer, tmp_path):
    torch.manual_seed(0)
    cloc, processor = small_model("cloc", tokenizer)
    for part in (cloc.eval(), processor):
        part.save_pretrained(tmp_path / "cloc")
    model = demo.start_from_towers(tmp_path / "cloc", tmp_path / "start")
    scene = make_scene(0, "test")
    texts = [region["long_caption"] for region in scene["regions"]]
    inputs = processor(images=scene["image"], text=texts)
    masks = {"masks": [region["mask"] for region in scene["regions"]]}
    regions = AutoProcessor.from_pretrained(tmp_path / "start")(images=scene["image"], **masks)
    with torch.no_grad():
        image = cloc.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output, image)
        found = model.get_region_features(**regions).pooler_output[0]
        torch.testing.assert_close(found, image.expand_as(found), atol=1e-6, rtol=0)
        given = inputs["input_ids"], inputs["attention_mask"]
        expected = cloc.get_text_features(*given).pooler_output
        assert torch.equal(model.get_text_features(*given).pooler_output, expected)


def test_recipes_name_their_steps():
    """`report` and `metrics.json` read the number of steps from the recipe."""
    for recipe in demo.RECIPES.values():
        assert recipe[0] == "--max_steps" and int(recipe[1]) > 0
