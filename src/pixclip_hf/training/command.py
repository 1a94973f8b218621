"""`pixclip-hf train`: from arguments to a trained model with its card in one folder."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .. import __version__
from ..cards import write_card
from ..command_help import HelpFormatter
from ..data.collator import RegionCollator
from ..data.whole_files import whole_files, write_json
from ..modeling.modeling_inherit import read_towers
from ..outgoing import public_values, public_word, recorded_name
from ..scenes.small_models import MODEL_CLASSES, small_model
from ..scenes.tokenizer import scenes_tokenizer
from .arguments import (
    DataArguments,
    EarlyStoppingArguments,
    LoraArguments,
    LossArguments,
    ModelArguments,
    OptimizerArguments,
    recipe_arguments,
)
from .checkpoints import agreed, begin_result, finish_result, finished_step, last_checkpoint, only_training
from .data import build_datasets
from .early_stopping import early_stopping
from .llm import attach_text_model, quantize_text_model
from .lora import add_lora
from .optimizer import optimizer_for
from .text_cache import TextEmbeddingCache
from .trainer import RegionTrainer

logger = logging.get_logger(__name__)

DESCRIPTION = """\
Trains CLOC or PixCLIP with the Hugging Face Trainer.

From random weights on drawn scenes, a few minutes on two CPU cores:

  pixclip-hf train --model_type cloc --output_dir runs/cloc --max_steps 200

From a CLIP and an LLM with LoRA on the LLM, on a dataset in the record schema (a Hub id or a folder of Parquet files):

  pixclip-hf train --model_type pixclip --vision_model_name_or_path openai/clip-vit-base-patch16 \\
      --text_model_name_or_path meta-llama/Llama-3.2-1B --lora_r 16 --dataset_name org/regions \\
      --output_dir runs/pixclip --per_device_train_batch_size 64 --learning_rate 1e-4 --bf16

With the settings of a paper, from a recipe, on several GPUs. What follows the recipe overrides it:

  accelerate launch --config_file examples/accelerate/8_gpus.yaml examples/run_pretrain.py \\
      examples/recipes/cloc_vit_b16.yaml --dataset_name org/regions --output_dir runs/cloc

With a frozen LLM whose states of all texts are computed once and kept in a folder for later runs:

  pixclip-hf train --model_type pixclip --vision_model_name_or_path openai/clip-vit-base-patch16 \\
      --text_model_name_or_path meta-llama/Llama-3.2-1B --config_overrides '{"bidirectional": true}' \\
      --text_max_length 512 --text_cache caches/text --dataset_name org/regions --output_dir runs/pixclip

Its checkpoints leave the LLM out and take `text_states`; the final model contains the LLM and takes texts.

A run that finds a whole checkpoint in its output folder continues from it; where all steps are taken, it does nothing
and says so. `--do_eval` evaluates without training unless
`--do_train` or `--eval_strategy` is given too. The options that come first below are those of TrainingArguments in
transformers; the groups behind them are this command's own.
"""


def build_model(arguments: ModelArguments, points: bool = False) -> tuple[Any, Any, TextEmbeddingCache | None]:
    """Model and processor, from a checkpoint, from two towers, or small and random; and the cache of text states, if
    there is to be one.

    Args:
        arguments: which model.
        points: whether points are to prompt it.

    Raises:
        ValueError: points for a model that takes none.
    """
    overrides: Any = arguments.config_overrides or {}
    cache = None
    if arguments.text_cache is not None:
        model, processor, cache = build_model_on_cache(arguments, overrides)
    elif arguments.model_name_or_path is not None:
        model = AutoModel.from_pretrained(arguments.model_name_or_path, **overrides)
        processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    elif arguments.vision_model_name_or_path is not None:
        _, model_class, processor_class = MODEL_CLASSES[arguments.model_type]
        towers = arguments.vision_model_name_or_path, arguments.text_model_name_or_path
        if arguments.random_weights:
            model = model_class(read_towers(model_class.config_class, *towers, **overrides).config)
        else:
            model = model_class.from_vision_text_pretrained(*towers, **overrides)
        processor = processor_class.from_vision_text_pretrained(*towers, **_sizes(overrides))
    else:
        fields: Any = {"prompter_points": True} if points and arguments.model_type == "cloc" else {}
        model, processor = small_model(arguments.model_type, scenes_tokenizer(), arguments.image_size, **fields)
    if points and "point" not in model.config.prompts:
        raise ValueError(
            "`point_prompt_share` needs a CLOC with `--config_overrides '{\"prompter_points\": true}'`, got a "
            f"{model.config.model_type} without it."
        )
    if arguments.text_max_length is not None:
        processor.tokenizer.model_max_length = arguments.text_max_length
    return model, processor, cache


def _sizes(overrides: dict) -> dict:
    """What the processor must know of the arguments of `from_vision_text_pretrained`."""
    return {name: overrides[name] for name in ("image_size", "max_position_embeddings") if name in overrides}


def build_model_on_cache(arguments: ModelArguments, overrides: dict) -> tuple[Any, Any, TextEmbeddingCache]:
    """A model without its text tower, the processor, and a cache of the states that the text tower gives."""
    name, vision = arguments.model_name_or_path, arguments.vision_model_name_or_path
    _, model_class, processor_class = MODEL_CLASSES[arguments.model_type]
    source: Any
    if name is not None:
        config = AutoConfig.from_pretrained(name, **overrides)
        processor = AutoProcessor.from_pretrained(name)
        # The text tower that the checkpoint holds, or the one that it was made without.
        source = config.text_model_name if config.text_config is None else name
        if source is None:
            raise ValueError(f"`--text_cache` needs a text model, and {name!r} neither has nor names one.")
    else:
        source = arguments.text_model_name_or_path
        config = model_class.config_class(text_config=None, text_hidden_size=1, **overrides)
        processor = processor_class.from_vision_text_pretrained(vision, source, **_sizes(overrides))
    folder: Any = arguments.text_cache
    length = arguments.text_max_length
    if length is None and processor.tokenizer is not None:
        length = processor.tokenizer.model_max_length
    cache = TextEmbeddingCache(
        folder,
        source,
        pooling=config.text_pooling,
        max_length=length,
        bidirectional=config.bidirectional,
        dtype=getattr(torch, arguments.text_cache_dtype),
        quantization=arguments.text_quantization,
    )
    if processor.tokenizer is None:
        processor.tokenizer = cache.tokenizer
    names = {"text_hidden_size": cache.width, "text_model_name": cache.text_model}
    if name is not None:
        cache.check(config)
        config.text_config, config.text_model_name = None, cache.text_model
        return AutoModel.from_pretrained(name, config=config), processor, cache
    return model_class.from_vision_text_pretrained(vision, None, **names, **overrides), processor, cache


def freeze(model: Any, arguments: ModelArguments) -> None:
    """Decides which parts of the towers train, and how."""
    new = [
        value for name, value in model.vision_model.named_parameters() if name.endswith(("mask_weight", "mask_bias"))
    ]
    if arguments.freeze_vision and new and not any(value.any() for value in new):
        raise ValueError(
            "`--freeze_vision` would leave the mask projection at zero, where no mask changes an embedding. "
            "`--vision_lr_scale 0` leaves the tower as it is and trains the mask projection."
        )
    model.vision_model.requires_grad_(not arguments.freeze_vision)
    if model.text_model is not None:
        model.text_model.requires_grad_(not arguments.freeze_text)
    for tower, checkpointed in (
        (model.vision_model, arguments.vision_gradient_checkpointing),
        (model.text_model, arguments.text_gradient_checkpointing),
    ):
        if checkpointed and tower is not None:
            tower.activation_checkpointing_enable({"use_reentrant": False})


def save_run_arguments(
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    loss: LossArguments,
    optimizer: OptimizerArguments,
    stopping: EarlyStoppingArguments,
    training: TrainingArguments,
) -> None:
    """run_arguments.json: the settings that the model card shows, without the paths of this machine."""
    collator = data.collator_arguments(model.model_type)
    of_streams = () if data.streaming else ("streaming", "shuffle_buffer", "max_corrupt_share")
    said = {name: value for name, value in asdict(data).items() if name not in of_streams}
    # Relative paths too: one of two parts would read as a Hub id elsewhere.
    said |= {name: list(map(_recorded_word, said[name])) for name in ("source", "eval_source") if said[name]}
    if data.dataset_name != "scenes" and "/" in data.dataset_name:
        said["dataset_name"] = recorded_name(data.dataset_name)
    started = {
        name: recorded_name(value) if value and name.endswith("model_name_or_path") else value
        for name, value in asdict(model).items()
    }
    content = {
        "model": started,
        "data": said | {name: collator[name] for name in collator if name in said},
        "lora": asdict(lora),
        "loss": asdict(loss),
        "optimizer": asdict(optimizer),
        "early_stopping": asdict(stopping),
        # Without the values of tokens; settings that are no plain values become text.
        "training": {**training.to_sanitized_dict(), "world_size": training.world_size},
    }
    write_json(Path(training.output_dir, "run_arguments.json"), public_values(content, start="./"))


def _recorded_word(word: str) -> str:
    """A word of a source: a kind, what to read, or an argument."""
    return public_word(word) if "=" in word or "/" not in word else recorded_name(word)


def build_parser() -> HfArgumentParser:
    return HfArgumentParser(
        (
            ModelArguments,
            DataArguments,
            LoraArguments,
            LossArguments,
            OptimizerArguments,
            EarlyStoppingArguments,
            TrainingArguments,
        ),
        prog="pixclip-hf train",
        usage="pixclip-hf train [RECIPE.yaml] --output_dir FOLDER [--ARGUMENT VALUE ...]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )


def main(argv: Sequence[str] | None = None, progress: TrainerCallback | None = None) -> Trainer:
    """Trains, saves and evaluates as the arguments say.

    Args:
        argv: arguments of the command line, with the path of a recipe in front or without; those of the process when
            None.
        progress: shows the progress in place of transformers' own bar and lines.

    Returns:
        The trainer, with the model as it was saved and the log of the run.

    Raises:
        ValueError: arguments that exclude each other or lack one that they need, or an output folder that another
            training writes to.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logger.info(f"pixclip_hf {__version__}")
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = recipe_arguments(argv[0]) + argv[1:]
    if "--bf16" in argv and "--use_cpu" not in argv and not torch.accelerator.is_available():
        # As recipes have it: `TrainingArguments` refuses a CPU for it that nobody named.
        logger.warning("There is no accelerator on this machine: training on its CPU, as with `--use_cpu`.")
        argv = [*argv, "--use_cpu"]
    arguments = build_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    training_arguments = arguments[-1]
    if not torch.accelerator.is_available():
        training_arguments.dataloader_pin_memory = False  # it serves copies to one, and torch warns without
    # `--do_eval` alone evaluates alone; an evaluation strategy, which sets it too, belongs to a training.
    during_training = training_arguments.eval_strategy != "no"
    trains = training_arguments.do_train or during_training or not training_arguments.do_eval
    with only_training(training_arguments) if trains else nullcontext():
        return _run(trains, progress, *arguments)


def _run(
    trains: bool,
    progress: TrainerCallback | None,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    lora_arguments: LoraArguments,
    loss_arguments: LossArguments,
    optimizer_arguments: OptimizerArguments,
    stopping_arguments: EarlyStoppingArguments,
    training_arguments: TrainingArguments,
) -> Trainer:
    callbacks = early_stopping(stopping_arguments, training_arguments)

    # 1. Model and processor.
    set_seed(training_arguments.seed)
    quantization = model_arguments.text_quantization
    if model_arguments.text_cache is not None and (lora_arguments.lora_r or data_arguments.streaming):
        raise ValueError("`--text_cache` excludes `--lora_r`, which changes the states, and `--streaming`.")
    if quantization is not None and model_arguments.text_cache is None and not lora_arguments.lora_r:
        raise ValueError(f"`--text_quantization` needs `--lora_r` or `--text_cache`, got {quantization!r} alone.")
    trained = model_arguments.model_name_or_path or model_arguments.vision_model_name_or_path
    if loss_arguments.distillation_weight and (trained is None or model_arguments.random_weights):
        raise ValueError(
            f"`--distillation_weight` needs trained weights to stay near, got {loss_arguments.distillation_weight} "
            "and a start from random ones."
        )
    model, processor, cache = build_model(model_arguments, points=data_arguments.point_prompt_share > 0)
    model_arguments.model_type = model.config.model_type  # a checkpoint has its own
    if loss_arguments.contrastive_tile_size is not None:
        model.contrastive_tile_size = loss_arguments.contrastive_tile_size
    if lora_arguments.lora_r:
        if not model.name_or_path:
            # Adapters name the model below them: one that was made here must lie somewhere.
            model.name_or_path = str(Path(training_arguments.output_dir, "base").resolve())
            if training_arguments.should_save:
                with whole_files(model.name_or_path) as unfinished:
                    model.save_pretrained(unfinished)
                    processor.save_pretrained(unfinished)
        if quantization is not None:
            model = quantize_text_model(model, quantization)
    freeze(model, model_arguments)
    if lora_arguments.lora_r:
        model = add_lora(
            model,
            lora_arguments.lora_r,
            lora_arguments.lora_alpha,
            lora_arguments.lora_dropout,
            lora_arguments.lora_target_modules,
        )

    if model_arguments.compile_towers:
        # In place, so that names, checkpoints and adapters stay as they are.
        for name, module in model.named_modules():
            if name.split(".")[-1] in ("vision_model", "text_model"):
                module.compile(backend=model_arguments.compile_towers)

    # 2. Data: records in, batches out of the collator.
    train_dataset, eval_dataset = build_datasets(
        data_arguments, processor.image_processor.size["height"], training_arguments.seed
    )
    if training_arguments.do_eval and eval_dataset is None:
        raise ValueError(f"An evaluation on {data_arguments.dataset_name!r} needs `--eval_split`, got None.")
    collator = RegionCollator(
        processor,
        seed=training_arguments.seed,
        text_cache=cache,
        **data_arguments.collator_arguments(model_arguments.model_type),
    )
    if cache is not None:
        cache.fill(text for records in (train_dataset, eval_dataset or ()) for text in collator.texts(records))

    # 3. Train, from the last checkpoint of the output folder if there is one.
    trainer = RegionTrainer(
        model,
        training_arguments,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
        gradient_cache_chunks=loss_arguments.gradient_cache_chunks,
        distillation_weight=loss_arguments.distillation_weight,
        optimizer_cls_and_kwargs=optimizer_for(model, training_arguments, optimizer_arguments),
    )
    if progress is not None:
        trainer.remove_callback(PrinterCallback if training_arguments.disable_tqdm else ProgressCallback)
        trainer.add_callback(progress)
    main_process, output_dir = trainer.is_world_process_zero(), training_arguments.output_dir
    if trains:
        checkpoint = training_arguments.resume_from_checkpoint
        if not checkpoint:
            checkpoint = agreed(last_checkpoint(output_dir) if main_process else None, training_arguments)
        if cache is not None and checkpoint is not None:
            cache.check(AutoConfig.from_pretrained(checkpoint))
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.trained_nothing:
            finished = agreed(finished_step(output_dir) if main_process else None, training_arguments)
            if finished == trainer.state.global_step:
                return trainer
        if main_process:
            begin_result(output_dir)
        if not trainer.trained_nothing:
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)

        # 4. Save: weights (of a LoRA run: adapters), configuration, processor, code and log in one folder.
        trainer.save_model()
        trainer.save_state()
        if main_process:
            save_run_arguments(
                model_arguments,
                data_arguments,
                lora_arguments,
                loss_arguments,
                optimizer_arguments,
                stopping_arguments,
                training_arguments,
            )

    # 5. Evaluate.
    if eval_dataset is not None and training_arguments.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    # 6. A model that was trained on cached states gets its text tower back, and is saved again.
    if cache is not None and trains and main_process:
        whole = attach_text_model(AutoModel.from_pretrained(output_dir), cache.text_model)
        with whole_files(output_dir) as unfinished:
            whole.save_pretrained(unfinished)

    # 7. The model card, from these records.
    if trains and main_process:
        write_card(output_dir, output_dir, model_type=model_arguments.model_type)
        finish_result(output_dir, trainer.state.global_step)
    return trainer
