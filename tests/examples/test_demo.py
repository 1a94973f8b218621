"""The demo's report and picture, on a model that has learned nothing yet."""

import json
import sys

import demo
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from pixclip_hf.data.scenes import make_scene
from pixclip_hf.data.tokenizer import scenes_tokenizer
from pixclip_hf.evaluation.scenes import evaluate_scenes
from pixclip_hf.training.from_scratch import small_model

KEYS = {
    "cloc": {"region_description_exact"},
    "pixclip": {"same_box_by_mask", "late_detail", "late_detail_cut_77"},
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
    metrics = {**metrics, "train_steps": 7, "train_seconds": 61.4, "seed": 3, "image_count": 12}
    if family == "pixclip":  # too few scenes to be sure of a pair
        for name in ("same_box_by_mask", "late_detail", "late_detail_cut_77", "crop_same_box", "crop_late_detail"):
            hard[name], hard[f"{name}_count"] = 0.25, 8
            metrics[name], metrics[f"{name}_count"] = 0.9, 100
    text = demo.report(family, metrics, hard, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "7 steps in 61 s, seed 3" in text and "12 unseen scenes" in text and "(regions.png)" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {4} and len(rows) == 2 + {"cloc": 7, "pixclip": 7}[family]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["image to caption, recall@1"][2] == "8.3 %"
    if family == "pixclip":
        assert cells["same box, told apart by the mask"] == ["90.0 ± 3.0 % of 100", "25.0 ± 15.3 % of 8", "50 %"]
        # What ties fix has no error.
        assert cells["… with the texts cut to 77 tokens"] == ["90.0 % of 100", "25.0 % of 8", "50 %"]
    else:
        count = metrics["region_description_count"]
        assert cells["region description, exact of 256"][0].endswith(f"% of {count}")


def test_draw(family, small, tmp_path):
    demo.draw(*small, tmp_path, seed=0)
    picture = Image.open(tmp_path / "regions.png")
    assert picture.format == "PNG" and picture.width > picture.height > 200
    assert np.asarray(picture.convert("RGB")).std() > 10


def test_use_pipeline(family, small, tmp_path, capsys):
    for part in small:
        part.save_pretrained(tmp_path)
    demo.use_pipeline(tmp_path, seed=0)
    lines = capsys.readouterr().out.splitlines()
    regions = make_scene(0, "test")["regions"]
    assert len(lines) == len(regions)
    for line, region in zip(lines, regions, strict=True):
        assert line.startswith(region["caption"]) and line.endswith("128 numbers, norm 1.000")


def test_whole(family, tmp_path, monkeypatch, capsys):
    """Everything that a run leaves behind, and that its card shows it."""
    few = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--scenes_train_images", "4"]
    monkeypatch.setitem(demo.RECIPES, family, [*few, "--scenes_eval_images", "2", "--use_cpu"])
    monkeypatch.setattr(demo, "TEST_IMAGES", 12)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", family, "--seed", "3", "--output_dir", str(tmp_path)])
    demo.main()
    folder = tmp_path / family
    assert capsys.readouterr().out.endswith(f"written: {folder}\n")
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    measured = {
        (result.metric_name.replace(" ", "_"), result.dataset_config): result.metric_value
        for result in card.data.eval_results
    }
    key = "region_description_exact" if family == "cloc" else "image_to_text_recall@1"
    assert measured[key, None] == round(metrics[key], 4) and measured[key, "hard"] == round(metrics[f"hard_{key}"], 4)
    assert "| steps | 2 |" in card.text and "| scenes_seed | 3 |" in card.text and "(regions.png)" in card.text
    assert {"run_arguments.json", "report.md", "regions.png"} <= {path.name for path in folder.iterdir()}


def test_recipes_name_their_steps():
    """`report` and `metrics.json` read the number of steps from the recipe."""
    for recipe in demo.RECIPES.values():
        assert recipe[0] == "--max_steps" and int(recipe[1]) > 0
