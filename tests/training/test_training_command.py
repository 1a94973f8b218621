"""`pixclip-hf train`, end to end on few scenes: what it leaves behind loads and goes on."""

import json

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig, LlamaModel

from pixclip_hf.scenes.dataset import make_scene, scenes_dataset
from pixclip_hf.training.arguments import ModelArguments
from pixclip_hf.training.command import build_model, main

FAMILIES = {"cloc": "CLOC", "pixclip": "PixCLIP"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def towers(tmp_path, tiny_tokenizer):
    """Folders of a tiny CLIP with its image processor and of a tiny LLM with its tokenizer."""
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "image_size": 32, "patch_size": 8, **sizes}
    text = {"hidden_size": 24, "vocab_size": 259, "max_position_embeddings": 128, "eos_token_id": 258, **sizes}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    LlamaModel(LlamaConfig(**text)).save_pretrained(tmp_path / "llm")
    tiny_tokenizer.save_pretrained(tmp_path / "llm")
    return ["--vision_model_name_or_path", str(tmp_path / "clip"), "--text_model_name_or_path", str(tmp_path / "llm")]


def options(folder, *more, steps=2):
    return [
        "--output_dir", str(folder), "--max_steps", str(steps), "--per_device_train_batch_size", "4",
        "--per_device_eval_batch_size", "4", "--scenes_train_images", "12", "--scenes_eval_images", "6",
        "--image_size", "32", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True",
        *map(str, more),
    ]  # fmt: skip


def embed(model, processor):
    scene = make_scene(0, "test", size=32)
    inputs = processor(images=scene["image"], boxes=[scene["regions"][0]["box"]], text=["a plain red disc"])
    with torch.no_grad():
        output = model.eval()(**inputs)
    return torch.cat([output.region_embeds[0], output.text_embeds])


def text_length(trainer):
    """Tokens of the region texts that the collator draws."""
    return trainer.data_collator([make_scene(0)])["region_input_ids"].shape[-1]


def load(folder):
    return embed(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch(family, tmp_path):
    trainer = main(options(tmp_path / "run", "--model_type", family, "--do_train", "--do_eval"))
    assert type(AutoModel.from_pretrained(tmp_path / "run")).__name__ == f"{FAMILIES[family]}Model"
    assert type(AutoProcessor.from_pretrained(tmp_path / "run")).__name__ == f"{FAMILIES[family]}Processor"
    torch.testing.assert_close(load(tmp_path / "run"), embed(trainer.model, trainer.processing_class))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"][0]["loss"] > 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_loss"] > 0 and results["eval_loss"] > 0
    assert 0 <= results["eval_region_to_text_recall@1"] <= 1
    recorded = json.loads((tmp_path / "run" / "run_arguments.json").read_text())
    assert recorded["data"]["dataset_name"] == "scenes" and recorded["training"]["max_steps"] == 2
    assert recorded["data"]["regions_per_image"] == trainer.data_collator.regions_per_image
    card = ModelCard.load(tmp_path / "run" / "README.md")
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured["region to text recall@1"] == round(results["eval_region_to_text_recall@1"], 4)
    assert "| steps | 2 |" in card.text
    # The habits of each model's recipe.
    names = {name.removeprefix("loss_") for name in state["log_history"][0] if name.startswith("loss_")}
    if family == "cloc":
        assert names == {"image_text", "region_text", "grounding_l1", "grounding_giou"}
        assert trainer.data_collator.regions_per_image == 4
        assert text_length(trainer) < 20
    else:
        assert names == {"mask_text", "crop_text", "local_global"}
        assert trainer.data_collator.regions_per_image == 1 and trainer.data_collator.whole_image_share == 0.1
        assert text_length(trainer) > 77


def test_memory_is_pinned_for_an_accelerator_alone(tmp_path, recwarn):
    given = options(tmp_path / "run", "--model_type", "cloc", steps=1)
    trainer = main([word for word in given if word != "--use_cpu"])
    assert trainer.args.dataloader_pin_memory == torch.accelerator.is_available()
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]


def test_goes_on_from_its_output_folder(tmp_path):
    whole = main(options(tmp_path / "whole", "--save_steps", 2, steps=4))
    first = main(options(tmp_path / "run", "--save_steps", 2, "--lr_scheduler_type", "linear", steps=4))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], value)
    # As if the run had been stopped behind its first checkpoint.
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    second = main(options(tmp_path / "run", "--save_steps", 2, steps=4))
    losses = [log["loss"] for log in second.state.log_history if "loss" in log]
    assert losses == [log["loss"] for log in whole.state.log_history if "loss" in log] and len(losses) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_from_a_checkpoint_and_evaluation_alone(tmp_path):
    main(options(tmp_path / "first", "--model_type", "pixclip"))
    start = ["--model_name_or_path", tmp_path / "first"]
    trainer = main(options(tmp_path / "second", *start, "--do_eval"))
    assert not {"model.safetensors", "README.md"} & {path.name for path in (tmp_path / "second").iterdir()}
    assert type(trainer.model).__name__ == "PixCLIPModel" and trainer.data_collator.crops
    torch.testing.assert_close(embed(trainer.model, trainer.processing_class), load(tmp_path / "first"))
    results = json.loads((tmp_path / "second" / "eval_results.json").read_text())
    main(options(tmp_path / "third", *start))
    assert results["eval_loss"] > 0
    assert (load(tmp_path / "third") - load(tmp_path / "first")).abs().max() > 1e-5
    # The type is the checkpoint's, not the default of the arguments.
    recorded = json.loads((tmp_path / "third" / "run_arguments.json").read_text())
    assert recorded["model"]["model_type"] == "pixclip" and recorded["data"]["regions_per_image"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_from_towers_with_frozen_parts(family, towers, tmp_path):
    frozen = ["--model_type", family, "--freeze_vision", "--freeze_text"]
    if family == "pixclip":
        # Its mask projection starts at zero: no mask would ever do anything.
        with pytest.raises(ValueError, match="`--freeze_vision` would leave the mask projection at zero.*lr_scale 0`"):
            main(options(tmp_path / "run", *towers, *frozen))
        frozen[2:3] = ["--vision_lr_scale", 0]
    trainer = main(options(tmp_path / "run", *towers, *frozen))
    model = AutoModel.from_pretrained(tmp_path / "run")
    for part, source in (("vision_model", CLIPModel.from_pretrained(tmp_path / "clip").vision_model),
                         ("text_model", LlamaModel.from_pretrained(tmp_path / "llm"))):  # fmt: skip
        state = getattr(model, part).state_dict()
        for name, value in source.state_dict().items():
            assert torch.equal(state[name], value), name
    if family == "pixclip":
        assert all(
            value.any() for name, value in model.vision_model.named_parameters() if name.endswith("mask_weight")
        )
    else:
        assert not any(parameter.requires_grad for parameter in trainer.model.vision_model.parameters())
    torch.testing.assert_close(load(tmp_path / "run"), embed(trainer.model, trainer.processing_class))


@pytest.mark.parametrize("family", ("cloc", pytest.param("pixclip", marks=pytest.mark.slow)))
def test_lora_on_towers(family, towers, tmp_path):
    """The output folder loads, though the model below the adapters was made in the run."""
    lora = ["--lora_r", 4, "--lora_alpha", 8, "--save_steps", 1]
    lora += ["--freeze_vision"] if family == "cloc" else ["--vision_lr_scale", 0]
    lora += ["--learning_rate", 1e-3, "--lr_scheduler_type", "constant"]
    trainer = main(options(tmp_path / "run", *towers, "--model_type", family, *lora))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "lora" in card.data.tags and card.data.base_model is None and "| lora_r | 4 |" in card.text
    if family == "cloc":
        assert not any("vision_model" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    expected = embed(trainer.model, trainer.processing_class)
    torch.testing.assert_close(load(tmp_path / "run"), expected)
    again = main(options(tmp_path / "run", *towers, "--model_type", family, *lora, steps=3))
    assert again.state.global_step == 3 and len(again.state.log_history) > len(trainer.state.log_history)
    assert (load(tmp_path / "run") - expected).abs().max() > 1e-4


def test_lora_targets(tmp_path):
    target = ["--lora_target_modules", r"text_model\..*\.fc2"]
    trainer = main(options(tmp_path / "run", "--lora_r", 2, *target, steps=1))
    adapted = [name for name, _ in trainer.model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 and all(".fc2." in name for name in adapted)


def test_on_a_dataset(tmp_path):
    """A folder of Parquet files, with an evaluation on another split while training."""
    scenes_dataset(12, size=32).to_parquet(tmp_path / "data" / "train.parquet")
    scenes_dataset(5, split="test", size=32).to_parquet(tmp_path / "data" / "test.parquet")
    data = ["--dataset_name", tmp_path / "data", "--eval_split", "test", "--eval_strategy", "steps", "--eval_steps", 1]
    draws = ["--regions_per_image", 2, "--region_text", "long_caption", "--image_captions", "False"]
    trainer = main(options(tmp_path / "run", *data, *draws))
    assert len(trainer.train_dataset) == 12 and len(trainer.eval_dataset) == 5
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert batch["region_attention_mask"].shape == (2, 2) and "input_ids" not in batch
    assert text_length(trainer) > 77
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 3


def test_a_dataset_without_an_evaluation_split(tmp_path):
    scenes_dataset(8, size=32).save_to_disk(tmp_path / "data")
    trainer = main(options(tmp_path / "run", "--dataset_name", tmp_path / "data"))
    assert trainer.eval_dataset is None and trainer.state.global_step == 2
    with pytest.raises(ValueError, match="needs `--eval_split`"):
        main(options(tmp_path / "run", "--dataset_name", tmp_path / "data", "--do_eval"))
    with pytest.raises(ValueError, match="`split` must be one of"):
        main(options(tmp_path / "run", "--dataset_name", tmp_path / "data", "--train_split", "validation"))


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("pixclip", "eager"),
        pytest.param("pixclip", "aot_eager", marks=pytest.mark.slow),
        pytest.param("cloc", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_towers(family, backend, towers, tmp_path):
    """The same losses and checkpoints, and each tower in one graph, adapters included."""
    given = [*towers, "--model_type", family, "--lora_r", 2, "--learning_rate", 1e-3]
    eager = main(options(tmp_path / "eager", *given))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = main(options(tmp_path / "compiled", *given, "--compile_towers", backend))
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    names = [set(trainer.model.state_dict()) for trainer in (eager, compiled)]
    assert names[0] == names[1]
    torch.testing.assert_close(load(tmp_path / "compiled"), load(tmp_path / "eager"), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("given", (["--compile_towers", "inductor"], ["--torch_compile_backend", "aot_eager"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family, given, tmp_path):
    """With real kernels, and the whole model, whose graph breaks in places."""
    eager = main(options(tmp_path / "eager", "--model_type", family))
    torch._dynamo.reset()
    compiled = main(options(tmp_path / "compiled", "--model_type", family, *given))
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-3)


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a text cache loads the LLM."""
    from pixclip_hf.training import text_cache

    count, original = [], text_cache.load_text_model
    monkeypatch.setattr(text_cache, "load_text_model", lambda *a, **k: (count.append(a), original(*a, **k))[1])
    return count


@pytest.mark.parametrize("family", ("cloc", pytest.param("pixclip", marks=pytest.mark.slow)))
def test_on_a_text_cache(family, towers, tmp_path, loads):
    """The states of a frozen LLM are computed once; checkpoints are without the LLM, the end has it."""
    given = [*towers, "--model_type", family, "--config_overrides", '{"bidirectional": true, "text_pooling": "mean"}']
    given += ["--text_max_length", 200, "--do_train", "--do_eval", "--save_steps", 2]
    given += ["--lr_scheduler_type", "constant"]
    cached = main(options(tmp_path / "cached", *given, "--text_cache", tmp_path / "cache", steps=3))
    assert cached.model.text_model is None and len(loads) == 1
    checkpoint = AutoModel.from_pretrained(tmp_path / "cached" / "checkpoint-2")
    assert checkpoint.text_model is None and checkpoint.config.text_model_name == str(tmp_path / "llm")
    model = AutoModel.from_pretrained(tmp_path / "cached")
    processor = AutoProcessor.from_pretrained(tmp_path / "cached")
    assert model.config.bidirectional and model.config.text_config.is_causal is False
    assert processor.tokenizer.model_max_length == 200
    source = LlamaModel.from_pretrained(tmp_path / "llm").state_dict()
    for name, value in source.items():
        assert torch.equal(model.text_model.state_dict()[name], value), name
    # A second run computes no state, and continues from a checkpoint.
    again = main(options(tmp_path / "cached", *given, "--text_cache", tmp_path / "cache", steps=4))
    assert len(loads) == 1 and again.state.global_step == 4
    assert (load(tmp_path / "cached") - embed(model, processor)).abs().max() > 1e-5


@pytest.mark.parametrize("family", ("pixclip", pytest.param("cloc", marks=pytest.mark.slow)))
def test_a_text_cache_of_the_checkpoint(family, towers, tmp_path, loads):
    """A saved model trains and evaluates on the states of its own text tower, as it does with the tower online."""
    main(options(tmp_path / "first", *towers, "--model_type", family, "--text_max_length", 512, steps=1))
    start = ["--model_name_or_path", tmp_path / "first", "--do_train", "--do_eval"]
    cache = ["--text_cache", tmp_path / "cache"]
    cached = main(options(tmp_path / "cached", *start, *cache, steps=3))
    online = main(options(tmp_path / "online", *start, "--freeze_text", steps=3))
    assert cached.model.text_model is None and len(loads) == 1 and online.model.text_model is not None
    for name in ("loss", "eval_loss", "eval_region_to_text_recall@1"):
        values = [[log[name] for log in run.state.log_history if name in log] for run in (cached, online)]
        assert values[0] == pytest.approx(values[1], abs=1e-3) and values[0], name
    torch.testing.assert_close(load(tmp_path / "cached"), load(tmp_path / "online"), atol=1e-3, rtol=1e-2)
    # A checkpoint without its text tower names it, and continues from there.
    cached.model.save_pretrained(tmp_path / "bare")
    cached.processing_class.save_pretrained(tmp_path / "bare")
    again = main(options(tmp_path / "fifth", "--model_name_or_path", tmp_path / "bare", *cache, "--do_eval"))
    assert len(loads) == 1
    losses = [run.state.log_history[-1]["eval_loss"] for run in (again, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_text_cache_of_another_model(towers, tmp_path, tiny_tokenizer):
    """A run does not go on with the states of another LLM."""
    given = ["--model_type", "cloc", "--text_cache", tmp_path / "cache", "--save_steps", 1]
    main(options(tmp_path / "run", *towers, *given, steps=1))
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": 258}
    LlamaModel(LlamaConfig(hidden_size=24, vocab_size=259, **sizes)).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    other = [*towers[:-1], tmp_path / "other"]
    with pytest.raises(
        ValueError, match=r"other states than the model expects: text_model_name '.*other', not '.*llm'"
    ):
        main(options(tmp_path / "run", *other, *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--vision_model_name_or_path", "a"], "go together, got 'a' and None"),
        (["--text_model_name_or_path", "b"], "go together, got None and 'b'"),
        (
            ["--model_name_or_path", "c", "--vision_model_name_or_path", "a", "--text_model_name_or_path", "b"],
            "exclude each other, got 'c' and 'a'",
        ),
        (["--image_size", "30"], "must be a multiple of its `patch_size`"),
        (["--text_cache", "c"], "`--text_cache` needs a trained text model"),
        (["--model_name_or_path", "a", "--text_cache", "c", "--lora_r", "2"], "`--text_cache` excludes `--lora_r`"),
        (
            ["--text_quantization", "4bit"],
            "`--text_quantization` needs `--lora_r` or `--text_cache`, got '4bit' alone",
        ),
        (["--regions_per_image", "0"], "`regions_per_image` must be at least 1"),
        (["--whole_image_share", "2"], "`whole_image_share` must lie in"),
        (["--region_text", "alt_text"], "`region_text` must be one .* got .*alt_text"),
        (["--lora_r", "2", "--lora_target_modules", "nothing"], "`target_modules` 'nothing' matches no module"),
    ],
)
def test_bad_arguments(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(options(tmp_path / "run", *given))


@pytest.mark.parametrize("given", (["--model_type", "clip"], ["--scenes_setting", "easy"], ["--no_such_option", "1"]))
def test_unknown_choices(given, tmp_path):
    with pytest.raises((SystemExit, ValueError)):
        main(options(tmp_path / "run", *given))


def stopping(folder, *more, steps=6):
    """Evaluates and saves at every step; a rate of zero, so that nothing gets better after the first evaluation."""
    evaluation = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end", "True"]
    return options(folder, *evaluation, "--learning_rate", 0, "--save_total_limit", 1, *more, steps=steps)


def test_early_stopping(tmp_path):
    trainer = main(stopping(tmp_path / "run", "--early_stopping_patience", 2))
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1
    recorded = json.loads((tmp_path / "run" / "run_arguments.json").read_text())
    assert recorded["early_stopping"] == {"early_stopping_patience": 2, "early_stopping_threshold": 0.0}
    assert main(stopping(tmp_path / "other", steps=4)).state.global_step == 4


def test_early_stopping_by_a_metric_and_a_threshold(tmp_path):
    """A recall cannot get better by more than one."""
    metric = ["--metric_for_best_model", "eval_region_to_text_recall@1", "--early_stopping_threshold", 1.5]
    trainer = main(stopping(tmp_path / "run", "--early_stopping_patience", 1, *metric, "--learning_rate", 1e-2))
    assert trainer.state.global_step == 2 and trainer.args.greater_is_better


def test_early_stopping_counts_on_over_a_stop(tmp_path):
    """Step 1 is the best; 2 is counted before the stop, 3 and 4 behind it."""
    first = main(stopping(tmp_path / "run", "--early_stopping_patience", 3, steps=2))
    assert first.state.global_step == 2
    second = main(stopping(tmp_path / "run", "--early_stopping_patience", 3))
    assert second.state.global_step == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--eval_strategy", "no", "--load_best_model_at_end", "False"],
         "`early_stopping_patience` 2 needs evaluations while training: `--eval_strategy"),
        (["--load_best_model_at_end", "False"], "2 needs `--load_best_model_at_end` and, .*`--metric_for_best_model`"),
        (["--early_stopping_patience", "0"], "`--early_stopping_patience` must be at least 1, got 0"),
        (["--early_stopping_threshold", "-1"], "`--early_stopping_threshold` must be at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_early_stopping_needs_something_to_judge_by(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(stopping(tmp_path / "run", "--early_stopping_patience", 2, *given))
    with pytest.raises(
        ValueError, match="`--early_stopping_threshold` needs `--early_stopping_patience`, got 0.1 alone"
    ):
        main(options(tmp_path / "run", "--early_stopping_threshold", 0.1))


def test_points_prompt_the_small_cloc_and_no_other_model():
    model, _, _ = build_model(ModelArguments(model_type="cloc"), points=True)
    assert model.config.prompter_points
    assert not build_model(ModelArguments(model_type="cloc"))[0].config.prompter_points
    with pytest.raises(ValueError, match="`point_prompt_share` needs a CLOC with `--config_overrides"):
        build_model(ModelArguments(model_type="pixclip"), points=True)
