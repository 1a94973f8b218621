"""Recipes and accelerate configurations: each runs two steps on tiny stand-ins, and says what it says."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import TEXT_CONFIG, VISION_CONFIG
from run_pretrain import main
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, HfArgumentParser, LlamaConfig, LlamaModel
from transformers.integrations import integration_utils

from pixclip_hf.data.streaming import RecordStream
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.training import ModelArguments, recipe_arguments
from pixclip_hf.training.command import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
LAUNCHERS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def stand_ins(tmp_path, tiny_tokenizer):
    """Folders of a tiny CLIP, a tiny LLM and Parquet shards, and the arguments that put them into a recipe."""
    clip = CLIPModel(CLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(tmp_path / "llm")
    for folder in ("clip", "llm"):
        tiny_tokenizer.save_pretrained(tmp_path / folder)
    records = scenes_dataset(8, size=32)
    for shard in range(2):
        records.shard(2, shard).to_parquet(tmp_path / "data" / f"train-{shard}.parquet")

    def arguments(text):
        return [
            "--vision_model_name_or_path", str(tmp_path / "clip"), "--text_model_name_or_path", str(tmp_path / text),
            "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--max_steps", "2",
            "--per_device_train_batch_size", "4", "--dataloader_num_workers", "1", "--shuffle_buffer", "4",
            "--logging_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True",
        ]  # fmt: skip

    return arguments


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(recipe, stand_ins, tmp_path):
    said = yaml.safe_load(recipe.read_text())
    trainer = main([str(recipe), *stand_ins("llm" if said["model_type"] == "pixclip" else "clip")])
    assert trainer.state.global_step == 2 and isinstance(trainer.train_dataset, RecordStream)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs) and len(logs) == 2
    config, arguments = trainer.model.config, trainer.args
    assert config.model_type == said["model_type"] and arguments.max_steps == 2 and arguments.bf16
    for name, value in (said.get("config_overrides") or {}).items():
        assert getattr(config, name) == value
    for name in ("learning_rate", "weight_decay", "adam_beta2", "warmup_steps", "lr_scheduler_type"):
        assert getattr(arguments, name) == said[name], name
    rates = {group["name"]: group["initial_lr"] for group in reversed(trainer.optimizer.param_groups)}
    assert rates["new"] == said["learning_rate"]
    # The blocks of a tower come behind its output, the slowest last: embeddings below two blocks.
    scale = said.get("vision_lr_scale", 1)
    slowest = min(g["initial_lr"] for g in trainer.optimizer.param_groups if g["name"] == "vision_model")
    assert slowest == pytest.approx(said["learning_rate"] * scale * said.get("layer_decay", 1) ** 3)
    assert ("text_model" in rates) != said.get("freeze_text", False)
    assert trainer.model.vision_model.is_activation_checkpointing == said.get("vision_gradient_checkpointing", False)
    assert not trainer.model.text_model.is_activation_checkpointing
    recorded = json.loads((tmp_path / "run" / "run_arguments.json").read_text())
    assert recorded["optimizer"]["vision_lr_scale"] == scale and recorded["data"]["streaming"] is True
    # From scratch where the recipe says so.
    same = torch.equal(
        CLIPModel.from_pretrained(tmp_path / "clip").vision_model.embeddings.class_embedding,
        main_start(recipe, stand_ins, said).vision_model.embeddings.class_embedding,
    )
    assert same != said.get("random_weights", False)


def main_start(recipe, stand_ins, said):
    """The model that the recipe begins with."""
    argv = recipe_arguments(recipe) + stand_ins("llm" if said["model_type"] == "pixclip" else "clip")
    parsed = HfArgumentParser(ModelArguments).parse_args_into_dataclasses(argv, return_remaining_strings=True)
    return build_model(parsed[0])[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_two_steps_on_a_cpu_as_they_are(recipe, stand_ins, tmp_path, monkeypatch):
    """The towers under the names of the recipe, its own batch, workers and precision; only what each reader names."""
    said = yaml.safe_load(recipe.read_text())
    for name in {said["vision_model_name_or_path"], said["text_model_name_or_path"]}:
        place = tmp_path / "here" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(tmp_path / ("clip" if "clip-vit" in name else "llm"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    trainer = main([str(recipe), "--dataset_name", "../data", "--output_dir", "../run", "--max_steps", "2"])
    assert trainer.state.global_step == 2 and trainer.args.use_cpu and trainer.args.bf16
    assert trainer.args.per_device_train_batch_size == said["per_device_train_batch_size"]
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)


def test_there_are_recipes_with_dates_and_reasons():
    assert {path.stem for path in RECIPES} >= {"cloc_vit_b16", "cloc_vit_l14", "pixclip_vit_b16_llm2clip"}
    for path in RECIPES:
        text = path.read_text()
        assert "Written 20" in text.splitlines()[0] and "Paper:" in text and "econstructed" in text


def test_a_recipe_as_arguments(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1e-4  # why\nb: [x, y]\nc:\nd: true\ne: {f: [1, 2.5], g: null}\n")
    expected = ["--a", "1e-4", "--b", "x", "y", "--d", "True", "--e", '{"f": [1, 2.5], "g": null}']
    assert recipe_arguments(recipe) == expected
    recipe.write_text("- a\n")
    with pytest.raises(ValueError, match="must map names of arguments to values, got .'a'."):
        recipe_arguments(recipe)


def test_a_recipe_with_an_unknown_argument(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nlearning_rat: 1.0e-4\nno_such_thing: 1\n")
    with pytest.raises((ValueError, SystemExit)):
        main([str(recipe)])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launchers_are_what_accelerate_takes(path):
    config = load_config_from_file(str(path))
    machines = {"1_gpu": (1, 1), "8xN_gpus": (4, 32)}.get(path.stem, (1, 8))
    assert (config.num_machines, config.num_processes) == machines and config.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "examples/run_pretrain.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == machines[1]
    assert arguments.use_fsdp == ("fsdp2" in path.stem) and arguments.use_deepspeed == ("deepspeed" in path.stem)
    if arguments.use_fsdp:
        assert int(arguments.fsdp_version) == 2
    if arguments.use_deepspeed:
        assert arguments.zero_stage == 2


def test_logs_reach_what_report_to_names(tmp_path, monkeypatch):
    """The callback that stands for TensorBoard gets losses, parts, rates and throughput."""
    from transformers import TrainerCallback

    found = []

    class Board(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            found.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    main(
        ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--per_device_train_batch_size", "4"]
        + ["--scenes_train_images", "8", "--scenes_eval_images", "2", "--image_size", "32", "--logging_steps", "1"]
        + ["--report_to", "tensorboard", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]
    )
    expected = {"loss", "learning_rate", "grad_norm", "loss_image_text", "loss_region_text", "loss_grounding_giou"}
    assert expected | {"images_per_second", "regions_per_second", "tokens_per_second"} <= found[0].keys()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["log_history"][0]["images_per_second"] == found[0]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--random_weights"], "`--random_weights` needs `--vision_model_name_or_path`"),
        (["--config_overrides", '{"grounding": false}'], "`--config_overrides` needs a checkpoint or two towers"),
        (["--config_overrides", "[1]", "--model_name_or_path", "a"], "`--config_overrides` must be a JSON object"),
        (["--streaming"], "`--streaming` needs a `--dataset_name`.*`--streaming False`"),
        (["--layer_decay", "2"], r"`layer_decay` must lie in \(0, 1\], got 2.0"),
    ],
)
def test_bad_arguments(given, message, tmp_path):
    sizes = ["--scenes_train_images", "2", "--scenes_eval_images", "2", "--image_size", "32", "--use_cpu"]
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "run"), *sizes, *given])
