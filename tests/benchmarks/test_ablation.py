"""The ablation's arms: each trains, differs from its base in one thing, and gives a row of the table."""

import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor


@pytest.fixture
def ablation(monkeypatch, tmp_path):
    import ablation

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "STEPS", {"cloc": 1, "pixclip": 1})
    monkeypatch.setattr(ablation, "TEST_IMAGES", 12)
    small = ["--scenes_train_images", "16", "--per_device_train_batch_size", "4", "--use_cpu"]
    monkeypatch.setattr(ablation, "COMMON", [*ablation.COMMON, *small])
    return ablation


@pytest.mark.slow
def test_arms_start_from_the_same_weights(ablation, tmp_path):
    """But for the one thing: what both have is equal, seed by seed, and other seeds are others."""
    for family, arms in ablation.ARMS.items():
        for name, arm in arms.items():
            ablation.start(family, arm, 0, tmp_path / family / name)
        base = AutoModel.from_pretrained(tmp_path / family / "base").state_dict()
        for name, arm in arms.items():
            model = AutoModel.from_pretrained(tmp_path / family / name)
            zero = [f"prompter.layer.{part}.weight" for part in arm.frozen_at_zero]
            for key, value in model.state_dict().items():
                if key in zero:
                    assert not value.any()
                elif key in base and arm.inherits and base[key].shape == value.shape:
                    assert torch.equal(base[key], value), (name, key)
            for field, value in arm.config.items():
                assert getattr(model.config, field) == value
            limit = AutoProcessor.from_pretrained(tmp_path / family / name).tokenizer.model_max_length
            assert limit == (arm.text_tokens or 256)
    ablation.start("cloc", ablation.ARMS["cloc"]["base"], 1, tmp_path / "other")
    other = AutoModel.from_pretrained(tmp_path / "other").state_dict()
    key = "text_projection.weight"
    assert not torch.equal(other[key], AutoModel.from_pretrained(tmp_path / "cloc/base").state_dict()[key])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_arm_gives_a_row(ablation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--seeds", "2", "--processes", "1"])
    ablation.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "±" in line and line.count("|") == 7]
    arms = [arm for arms in ablation.ARMS.values() for arm in arms.values()]
    claims = [(arm.claim, measure) for arm in arms for measure in arm.measures]
    assert len(rows) == len(claims) == len(json.loads(lines[-1]))
    for row, (claim, measure) in zip(rows, claims, strict=True):
        assert row.startswith(f"| {claim} | `{measure}` |")
        assert row.split("|")[-2].strip() in ("holds", "does not hold at this scale", "not decided")
    measured = list(Path("benchmarks/measures/ablation").glob("*/*.json"))
    models = sum(len(arms) for arms in ablation.ARMS.values()) - len(ablation.SAME_MODEL)
    # All, those that others only continue from too: another machine then knows that they are done. And the base of
    # PixCLIP before its training.
    assert len(measured) == 2 * (models + 1)
    tower = [line for line in lines if line.startswith(("| Prompter by mask", "| mask-p"))]
    assert len(tower) == 4


def test_differences_are_paired(ablation, monkeypatch):
    values = {"base": [0.5, 0.7], "roi_align": [0.4, 0.5], "similar_texts": [0.6, 0.9], "clip": [0.45, 0.72]}
    monkeypatch.setattr(
        ablation,
        "run",
        lambda family, name, seed: dict.fromkeys(
            ("region_description_exact", "crop_description_exact"), values[name][seed]
        ),
    )
    (row,) = ablation.compare("cloc", "roi_align", 2)
    assert row[2:] == ["base 60.0 ± 10.0 %", "roi_align 45.0 ± 5.0 %", "+15.0 ± 5.0", "not decided"]
    # This claim is about the arm: it gains 10 and 20 points.
    assert ablation.compare("cloc", "similar_texts", 2)[0][4:] == ["+15.0 ± 5.0", "not decided"]
    assert ablation.compare("cloc", "clip", 2)[0][4:] == ["+1.5 ± 3.5", "not decided"]


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([3.0, 4.0, 5.0], 0, "holds"),
        ([1.0, 4.0, 7.0], 0, "not decided"),  # 4.0 ± 1.7: t is 2.3, below 2.92
        ([-3.0, -4.0, -5.0], 0, "does not hold at this scale"),
        ([-0.4, -0.5, -0.6], 1, "holds"),
        ([-0.4, -0.5, -0.6], 0, "does not hold at this scale"),
        ([-4.0, 0.0, 4.0], 1, "not decided"),  # noise is no proof that nothing is lost
        ([5.0], 0, "not decided"),
    ],
)
def test_verdicts(ablation, differences, margin, verdict):
    mean, error, said = ablation.gain(differences, margin)
    assert said == verdict
    assert mean == statistics.mean(differences)
    if len(differences) == 3:
        spread = sum((value - mean) ** 2 for value in differences) / 2
        assert error == pytest.approx((spread / 3) ** 0.5)


def test_verdict_is_a_t_test(ablation):
    """At the bound of three seeds, a hair either way decides."""
    for scale, verdict in ((1.01, "holds"), (0.99, "not decided")):
        mean = 2.920 * scale / 3**0.5  # of values with a standard deviation of one
        assert ablation.gain([mean - 1, mean, mean + 1])[2] == verdict


def test_needed_models_come_once_and_after_what_they_go_on_from(ablation):
    names = [f"{family}/{name}" for family, arms in ablation.ARMS.items() for name, arm in arms.items() if arm.claim]
    first, then, last = ablation.needed(names, 3)
    models = sum(len(arms) for arms in ablation.ARMS.values()) - len(ablation.SAME_MODEL)
    assert len(first + then + last) == len({*first, *then, *last}) == 3 * models
    assert {name for _, name, _ in last} == {"lora", "frozen"}
    assert ("pixclip", "short", 2) in then and ("pixclip", "scratch", 2) in first
    assert {family for family, _, _ in then} == {"pixclip"}
    assert not {"clip_images", "by_box"} & {name for _, name, _ in first}


def test_waves_run_side_by_side(ablation, tmp_path, monkeypatch):
    """A folder and, in the next wave, one inside it: the second fails where it does not wait for the first. The
    processes come from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    monkeypatch.setattr(ablation, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    waves = [[(outer,), (tmp_path / "other",)], [(inner,)]]
    ablation.side_by_side(os.mkdir, lambda folder: (folder / "x.json", {}), waves, 2)
    assert inner.is_dir()
    with pytest.raises(FileExistsError):
        ablation.side_by_side(os.mkdir, lambda folder: (folder / "x.json", {}), [[(outer,)]], 2)
    # What is done is left alone.
    ablation.keep(outer / "x.json", {}, {"exact": 0.5})
    ablation.side_by_side(os.mkdir, lambda folder: (folder / "x.json", {}), [[(outer,)]], 2)


def test_measures_of_another_recipe_are_refused(ablation, tmp_path):
    recipe = {"arguments": ["--max_steps", "1"], "config": {"weight": 0.0}, "before": None}
    file = tmp_path / "family" / "arm-0.json"
    assert ablation.done_before(file, recipe) is None
    ablation.keep(file, recipe, {"exact": 0.25})
    assert ablation.done_before(file, recipe) == {"exact": 0.25}
    with pytest.raises(ValueError, match="is of another recipe.*move it away"):
        ablation.done_before(file, {**recipe, "arguments": ["--max_steps", "2"]})


def test_filter_of_equal_texts_is_all_that_changes(ablation):
    """In the region-text loss equal texts become negatives; the loss of images and captions stays."""
    rows = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts, ids, scale = rows.roll(1, 0), torch.tensor([5, 7, 5, 9]), torch.tensor(1.0)
    logits = scale * rows @ texts.T
    targets = torch.arange(4)
    all_negatives = F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
    found = ablation.distinct_texts(rows, texts, scale, ids, similarity_threshold=None)
    filtered = ablation.gathered_contrastive_loss(rows, texts, scale, ids, similarity_threshold=None)
    assert not torch.allclose(found, filtered, atol=1e-3)
    assert any(torch.allclose(found * factor, all_negatives, atol=1e-4) for factor in (1, 2))
    assert torch.equal(ablation.distinct_texts(rows, texts, scale, ids), filtered)
