"""A run that is killed continues from its last complete checkpoint, to the same end."""

import json
import multiprocessing
import os
import signal

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer, last_checkpoint
from pixclip_hf.training.command import main


def train_until_killed(arguments):
    """Killed while it writes its third checkpoint: weights, optimizer and random state lie there, its state does
    not."""
    save = TrainerState.save_to_json

    def save_or_die(self, path):
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, path)

    TrainerState.save_to_json = save_or_die
    main(arguments)


@pytest.mark.parametrize(
    ("family", "more"),
    [("cloc", ["--lora_r", "4", "--lora_dropout", "0.3"]), pytest.param("pixclip", [], marks=pytest.mark.slow)],
)
def test_killed_and_resumed(family, more, tmp_path, monkeypatch):
    """Three steps per epoch: the checkpoint of step 4 lies inside the second. Dropout draws random numbers."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def options(folder):
        return [
            "--model_type", family, "--output_dir", str(folder), "--max_steps", "8", "--save_steps", "2",
            "--per_device_train_batch_size", "4", "--scenes_train_images", "12", "--scenes_eval_images", "4",
            "--image_size", "32", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True",
            *more,
        ]  # fmt: skip

    whole = main(options(tmp_path / "whole"))
    killed = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=[options(tmp_path / "killed")]
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-6" / "optimizer.pt").exists()
    assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-4")
    resumed = main(options(tmp_path / "killed"))

    logs = [
        [
            {name: value for name, value in log.items() if not name.endswith("_per_second")}
            for log in run.state.log_history
            if "loss" in log
        ]
        for run in (whole, resumed)
    ]
    assert len(logs[0]) == 8 and logs[0] == logs[1]
    assert len({log["loss"] for log in logs[0]}) == 8 and len({log["learning_rate"] for log in logs[0]}) == 8
    name = "adapter_model.safetensors" if more else "model.safetensors"
    weights = [load_file(tmp_path / run / name) for run in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 50
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    states = [torch.load(tmp_path / run / "checkpoint-8" / "optimizer.pt")["state"] for run in ("whole", "killed")]
    assert all(torch.equal(state["exp_avg_sq"], states[1][key]["exp_avg_sq"]) for key, state in states[0].items())


def test_last_complete_checkpoint(tmp_path, caplog):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    contents = {"checkpoint-9": "{}", "checkpoint-10": "{}", "checkpoint-11": '{"global', "checkpoint-200": None}
    contents |= {"checkpoint-best": "{}"}
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert all(f"{name}' is incomplete" in caplog.text for name in ("checkpoint-11", "checkpoint-200"))


def test_another_number_of_images_a_step(tiny_cloc, tmp_path):
    model, processor = tiny_cloc

    def train(resume=None, **changes):
        settings = {
            "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2,
            "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1,
        }  # fmt: skip
        trainer = RegionTrainer(
            model,
            TrainingArguments(**settings | changes),
            data_collator=RegionCollator(processor),
            train_dataset=[make_scene(index, size=32) for index in range(8)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    train()
    first = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="steps took 4 images, the steps of this run take 2 .*their product is 4"):
        train(first, per_device_train_batch_size=2)
    half = {"per_device_train_batch_size": 2}
    assert train(first, **half, gradient_accumulation_steps=2) == 2
    assert train(first, **half, ignore_data_skip=True) == 2
    # A checkpoint that a plain Trainer wrote says nothing of it.
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["ImagesPerStep"]
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    assert train(first, **half) == 2
