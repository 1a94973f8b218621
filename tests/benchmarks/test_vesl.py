"""The comparison of VESL with n-grams: every arm trains, on its own regions and the source's captions."""

import json
import sys
from pathlib import Path

import pytest

from pixclip_hf.annotation.vesl import VeslArguments
from pixclip_hf.data.sources import load_records
from pixclip_hf.scenes.dataset import make_scene

pytest.importorskip("spacy")


@pytest.fixture
def vesl(monkeypatch, tmp_path):
    import vesl

    monkeypatch.chdir(tmp_path)
    for name, value in {"STEPS": 1, "TRAIN_IMAGES": 24, "TEST_IMAGES": 6}.items():
        monkeypatch.setattr(vesl, name, value)
    monkeypatch.setattr(vesl, "COMMON", [*vesl.COMMON, "--per_device_train_batch_size", "4", "--use_cpu"])
    return vesl


@pytest.mark.slow
def test_every_arm_gives_a_column(vesl, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vesl.py", "--seeds", "2", "--processes", "1"])
    vesl.main()
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    less = {"vesl_less_ngrams", "vesl_less_alt_text_phrases", "true_captions_less_vesl"}
    assert set(summary) == {"vesl_over_ngrams", *less}
    rows = [line for line in lines if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == list(vesl.ARMS)
    assert len(rows) == 2 + len(vesl.MEASURES) + 2 + len(vesl.CLAIMS)
    assert all("±" in row for row in rows[-len(vesl.CLAIMS) :])
    assert Path("runs/vesl/table.md").read_text().splitlines() == lines[lines.index(rows[0]) : -1]
    # What was done is not done again.
    monkeypatch.setattr(vesl, "run_pretrain", None)
    vesl.main()
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]


def test_only_regions_differ(vesl, tmp_path):
    """Whole-image captions stay those of the source; region texts are what each arm says they are."""
    for name, arguments in vesl.ARMS.items():
        if arguments is None:
            continue
        records = load_records(str(vesl.annotated(arguments, 3, tmp_path / name)), "train")
        scenes = {tuple(scene["captions"]): scene for scene in (make_scene(i, "train", 3) for i in range(24))}
        for record in records:
            scene = scenes[tuple(record["captions"])]
            said = scene["alt_text"] if arguments != VeslArguments() else " ".join(scene["captions"]).lower()
            assert all(region["caption"] in said for region in record["regions"])


def test_texts_are_checked_against_the_drawn_objects(vesl, monkeypatch, tmp_path):
    drawn = make_scene(0, "train", 0)["regions"]
    texture, color, shape = drawn[0]["caption"].split()[1:]
    other = "plain" if texture != "plain" else "dotted"
    texts = [f"{texture} {color} {shape}", f"{color} {shape}", f"{other} {color} {shape}", "wallpaper"]
    regions = [{"box": drawn[0]["box"], "caption": text} for text in texts]

    class Records(list):
        def select_columns(self, names):
            return self

    records = Records([{"record_id": "scene-0-00000000", "regions": regions}])
    monkeypatch.setattr(vesl, "load_dataset", lambda *arguments, **options: records)
    found = vesl.check_texts(tmp_path, 0)
    assert found == {"regions_per_image": 4 / 24, "whole_texts": 0.25, "wrong_texts": 0.25}
