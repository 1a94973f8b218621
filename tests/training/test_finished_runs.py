"""Runs end where they say, one at a time, and go on from the last checkpoint that is whole."""

import json
import multiprocessing
import os
import shutil
import signal

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainingArguments

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.whole_files import only_writer
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer
from pixclip_hf.training import RegionTrainer, checkpoints, last_checkpoint
from pixclip_hf.training.command import main
from pixclip_hf.training.early_stopping import ResumedEarlyStopping


def options(folder, steps=4, *more):
    return [
        "--model_type", "cloc", "--output_dir", str(folder), "--max_steps", str(steps), "--save_steps", "2",
        "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4", "--scenes_train_images", "8",
        "--scenes_eval_images", "4", "--image_size", "32", "--logging_steps", "1", "--report_to", "none", "--use_cpu",
        "--disable_tqdm", "True", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, and the one that it is started again as."""
    folder = tmp_path_factory.mktemp("runs")
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield folder / "run", main(options(folder / "run"))
    datasets.config.HF_DATASETS_CACHE = before


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_does_nothing(finished, caplog):
    folder, first = finished
    before = content(folder)
    again = main(options(folder))
    assert again.state.global_step == first.state.global_step == 4
    assert "is done: it has taken 4 steps. Nothing is trained." in caplog.text
    assert content(folder) == before
    trained = first.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in again.model.state_dict().items())


def test_a_run_killed_behind_its_last_checkpoint_saves_its_results(finished, caplog):
    folder, first = finished
    weights = load_file(folder / "model.safetensors")
    for name in (checkpoints.RESULT, "model.safetensors", "README.md"):
        (folder / name).unlink()
    losses = (folder / "train_results.json").read_bytes()
    assert main(options(folder)).state.global_step == 4
    assert "Nothing is trained" in caplog.text and (folder / "README.md").exists()
    again = load_file(folder / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], value) for name, value in weights.items())
    assert (folder / "train_results.json").read_bytes() == losses, "a run of no step has no loss to tell"
    assert checkpoints.finished_step(folder) == 4
    # What was damaged since is written again, too.
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    main(options(folder))
    assert "What was trained in" in caplog.text and load_file(folder / "model.safetensors").keys() == weights.keys()


def test_a_finished_run_can_be_made_longer(finished):
    folder, _ = finished
    assert main(options(folder, 6)).state.global_step == 6
    assert last_checkpoint(folder).endswith("checkpoint-6") and checkpoints.finished_step(folder) == 6


def train(tiny, folder, resume=None, callbacks=None, evaluates=False, **changes):
    model, processor = tiny
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    records = [make_scene(index, size=32) for index in range(4)]
    trainer = RegionTrainer(
        model,
        TrainingArguments(**settings | changes),
        data_collator=RegionCollator(processor),
        train_dataset=records,
        eval_dataset=records if evaluates else None,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    train(small_model("cloc", scenes_tokenizer(), 32), folder)
    return folder


@pytest.mark.parametrize("epochs", (False, True))
def test_the_trainer_alone_ends_too(epochs, tiny_cloc, tmp_path, caplog):
    length = {"max_steps": -1, "num_train_epochs": 2} if epochs else {"max_steps": 3}
    train(tiny_cloc, tmp_path, **length)
    logged = len(train(tiny_cloc, tmp_path, True, **length).state.log_history)
    again = train(tiny_cloc, tmp_path, True, **length)
    assert again.state.global_step == (4 if epochs else 3) and again.trained_nothing
    assert len(again.state.log_history) == logged and "Nothing is trained" in caplog.text


def test_a_run_that_stopped_early_has_ended(tiny_cloc, tmp_path, caplog):
    options = {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "evaluates": True, "learning_rate": 0.0, "save_total_limit": 1,
    }  # fmt: skip
    first = train(tiny_cloc, tmp_path, callbacks=[ResumedEarlyStopping(2)], **options)
    assert first.state.global_step == 3
    again = train(tiny_cloc, tmp_path, True, callbacks=[ResumedEarlyStopping(2)], **options)
    assert again.state.global_step == 3 and "taken 3 steps and stopped early" in caplog.text
    assert train(tiny_cloc, tmp_path, True, callbacks=[ResumedEarlyStopping(4)], **options).state.global_step == 5


FILES = ("optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "config.json")
DAMAGES = [(name, damage) for name in FILES for damage in ("cut", "flipped", "missing")]


@pytest.mark.parametrize(
    ("name", "damage"), [*DAMAGES, ("trainer_state.json", "cut"), ("trainer_state.json", "missing")]
)
def test_a_damaged_checkpoint_falls_back(name, damage, run, caplog):
    path = run / "checkpoint-3" / name
    whole = path.read_bytes()
    assert last_checkpoint(run).endswith("checkpoint-3")
    try:
        if damage == "missing":
            path.unlink()
        else:
            half = len(whole) // 2
            path.write_bytes(whole[:half] if damage == "cut" else whole[:half] + b"~" + whole[half + 1 :])
        assert last_checkpoint(run).endswith("checkpoint-2")
        assert "checkpoint-3' is " in caplog.text and name in caplog.text
    finally:
        path.write_bytes(whole)


LISTED = ("[]", '{"a": []}', '{"a": ["x", 1]}')
NOTES = ("[]", "{}", "[" * 9999, *(f'{{"files": {files}}}' for files in LISTED))


@pytest.mark.parametrize("text", NOTES)
def test_notes_that_say_nothing_of_files_are_damaged(text, run, tmp_path, caplog):
    for step in (2, 3):
        shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / checkpoints.MANIFEST).write_text(text)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2") and "checkpoint-3' is " in caplog.text
    shutil.copy(run / "checkpoint-3" / checkpoints.MANIFEST, tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("[]")
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    (tmp_path / checkpoints.RESULT).write_text(text)
    assert checkpoints.finished_step(tmp_path) is None


def test_a_damaged_checkpoint_is_refused_by_name_where_it_is_asked_for(tiny_cloc, run, tmp_path):
    path = run / "checkpoint-3" / "optimizer.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(ValueError, match=r"checkpoint-3.* is damaged \(optimizer.pt has \d+ bytes and not \d+\)"):
            train(tiny_cloc, tmp_path, str(run / "checkpoint-3"))
    finally:
        path.write_bytes(whole)
    with pytest.raises(ValueError, match="needs a checkpoint in"):
        train(tiny_cloc, tmp_path, True)
    with pytest.raises(ValueError, match="is no folder"):
        train(tiny_cloc, tmp_path, str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("name", ("optimizer.pt", "model.safetensors", "rng_state.pth"))
def test_a_checkpoint_of_an_earlier_version_is_looked_at(name, run, tmp_path, caplog):
    """It has no manifest; what was cut is still seen."""
    for step in (2, 3):
        shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / checkpoints.MANIFEST).unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")
    path = tmp_path / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_checkpoint(tmp_path).endswith("checkpoint-2") and name in caplog.text


def test_a_checkpoint_is_whole_when_all_ranks_have_written(run, tmp_path, caplog):
    folder = tmp_path / "checkpoint-1"
    checkpoints.begin_checkpoint(folder)
    (folder / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) is None
    assert "not all of its files were written" in caplog.text and "starts from its beginning" in caplog.text
    checkpoints.finish_checkpoint(folder)
    assert last_checkpoint(tmp_path) == str(folder)


def test_the_run_goes_on_from_the_checkpoint_before(tiny_cloc, tmp_path, caplog):
    """And writes the damaged one anew."""
    train(tiny_cloc, tmp_path)
    path = tmp_path / "checkpoint-3" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:100])
    again = train(tiny_cloc, tmp_path, True)
    assert again.resumed_step == 2 and again.state.global_step == 3 and "optimizer.pt has 100 bytes" in caplog.text
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")


def test_the_clock_set_back_loses_no_checkpoint(tiny_cloc, tmp_path):
    train(tiny_cloc, tmp_path)
    for step in (1, 2, 3):
        os.utime(tmp_path / f"checkpoint-{step}", (4e9 + 10 * step,) * 2)  # in the year 2096
    train(tiny_cloc, tmp_path, True, max_steps=4, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_an_abandoned_run_left_goes_first(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate_checkpoints(tmp_path, 4, 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    checkpoints.rotate_checkpoints(tmp_path, 4, 1, str(tmp_path / "checkpoint-2"))
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.rotate_checkpoints(tmp_path, 4, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def hold(folder, held):
    with only_writer(folder, "`output_dir`"):
        held.set()
        signal.pause()


def test_a_second_run_in_one_folder_is_refused(tiny_cloc, tmp_path):
    """The lock belongs to a process: another one holds it here."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path, held))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(ValueError, match=r"`output_dir` '.*' is being written to by another process"):
            main(options(tmp_path))
        with pytest.raises(ValueError, match="Two trainings in one folder"):
            train(tiny_cloc, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.join()
    (tmp_path / ".0123.tmp").mkdir()
    train(tiny_cloc, tmp_path, max_steps=1)
    assert not (tmp_path / ".0123.tmp").exists(), "what a killed run left"
    # Within one thread the folder may be held several times.
    with only_writer(tmp_path / "other", "`output_dir`"), pytest.raises(ValueError, match="another process"):
        train(tiny_cloc, tmp_path / "other")


def test_weights_appear_whole(tiny_cloc, tmp_path, monkeypatch):
    trainer = train(tiny_cloc, tmp_path, max_steps=1, save_strategy="no")
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "README.md").write_text("mine")

    def save(folder, **options):
        (tmp_path / folder / "model.safetensors").write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.model, "save_pretrained", save)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "README.md").read_text() == "mine"
    assert AutoModel.from_pretrained(tmp_path) is not None
    assert json.loads((tmp_path / "config.json").read_text()) and not list(tmp_path.glob(".*.tmp"))
