"""Trains CLOC or PixCLIP with the Hugging Face Trainer.

From random weights on the embedded scenes (a few minutes on two CPU cores):

    python examples/run_pretrain.py --model_type cloc --output_dir runs/cloc --max_steps 200

From a CLIP and an LLM, with LoRA on the LLM, on a dataset in the record schema (Hub id or folder of Parquet files):

    python examples/run_pretrain.py --model_type pixclip --vision_model_name_or_path openai/clip-vit-base-patch16 \
        --text_model_name_or_path meta-llama/Llama-3.2-1B --lora_r 16 --dataset_name org/regions \
        --output_dir runs/pixclip --per_device_train_batch_size 64 --learning_rate 1e-4 --bf16

A run that finds a checkpoint in its output folder goes on from it. `--do_eval` evaluates without training, unless
`--do_train` or `--eval_strategy` is given too.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import pixclip_hf
from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.readers import load_records
from pixclip_hf.data.scenes import scenes_dataset
from pixclip_hf.data.tokenizer import scenes_tokenizer
from pixclip_hf.training import (
    DataArguments,
    LoraArguments,
    LossArguments,
    ModelArguments,
    RegionTrainer,
    add_lora,
    last_checkpoint,
)
from pixclip_hf.training.from_scratch import MODEL_CLASSES, small_model

logger = logging.get_logger("run_pretrain")


def build_model(arguments: ModelArguments):
    """Model and processor: from a checkpoint, from two towers, or small and random."""
    if arguments.model_name_or_path is not None:
        model = AutoModel.from_pretrained(arguments.model_name_or_path)
        processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    elif arguments.vision_model_name_or_path is not None:
        _, model_class, processor_class = MODEL_CLASSES[arguments.model_type]
        towers = arguments.vision_model_name_or_path, arguments.text_model_name_or_path
        model = model_class.from_vision_text_pretrained(*towers)
        processor = processor_class.from_vision_text_pretrained(*towers)
    else:
        model, processor = small_model(arguments.model_type, scenes_tokenizer(), arguments.image_size)
    model.vision_model.requires_grad_(not arguments.freeze_vision)
    if model.text_model is not None:
        model.text_model.requires_grad_(not arguments.freeze_text)
    return model, processor


def build_datasets(arguments: DataArguments, image_size: int):
    """Training and evaluation records."""
    if arguments.dataset_name == "scenes":
        options = {"size": image_size, "setting": arguments.scenes_setting, "seed": arguments.scenes_seed}
        train = scenes_dataset(arguments.scenes_train_images, split=arguments.train_split, **options)
        return train, scenes_dataset(arguments.scenes_eval_images, split=arguments.eval_split or "test", **options)
    train = load_records(arguments.dataset_name, arguments.train_split)
    return train, load_records(arguments.dataset_name, arguments.eval_split) if arguments.eval_split else None


def save_run_arguments(model: ModelArguments, data: DataArguments, lora: LoraArguments, training: TrainingArguments):
    """run_arguments.json: what the model card tells of the run."""
    collator = data.collator_arguments(model.model_type)
    content = {
        "model": asdict(model),
        "data": asdict(data) | {name: collator[name] for name in collator if name in asdict(data)},
        "lora": asdict(lora),
        # Without the values of tokens; settings that are no plain values become text.
        "training": {**training.to_sanitized_dict(), "world_size": training.world_size},
    }
    Path(training.output_dir, "run_arguments.json").write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, LoraArguments, LossArguments, TrainingArguments))
    parsed = parser.parse_args_into_dataclasses(argv)
    model_arguments, data_arguments, lora_arguments, loss_arguments, training_arguments = parsed

    # 1. Model and processor.
    set_seed(training_arguments.seed)
    model, processor = build_model(model_arguments)
    if loss_arguments.contrastive_tile_size is not None:
        model.config.contrastive_tile_size = loss_arguments.contrastive_tile_size
    if lora_arguments.lora_r:
        if not model.name_or_path:
            # Adapters name the model below them: one that was made here must lie somewhere.
            model.name_or_path = str(Path(training_arguments.output_dir, "base").resolve())
            model.save_pretrained(model.name_or_path, is_main_process=training_arguments.should_save)
            if training_arguments.should_save:
                processor.save_pretrained(model.name_or_path)
        model = add_lora(
            model,
            lora_arguments.lora_r,
            lora_arguments.lora_alpha,
            lora_arguments.lora_dropout,
            lora_arguments.lora_target_modules,
        )

    # 2. Data: records in, batches out of the collator.
    train_dataset, eval_dataset = build_datasets(data_arguments, processor.image_processor.size["height"])
    if training_arguments.do_eval and eval_dataset is None:
        raise ValueError(f"An evaluation on {data_arguments.dataset_name!r} needs `--eval_split`, got None.")
    collator = RegionCollator(
        processor,
        seed=training_arguments.seed,
        **data_arguments.collator_arguments(model.config.model_type),
    )

    # 3. Train, from the last checkpoint of the output folder if there is one.
    trainer = RegionTrainer(
        model,
        training_arguments,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        gradient_cache_chunks=loss_arguments.gradient_cache_chunks,
    )
    # `--do_eval` alone evaluates alone; an evaluation strategy, which sets it too, belongs to a training.
    during_training = training_arguments.eval_strategy != "no"
    if training_arguments.do_train or during_training or not training_arguments.do_eval:
        checkpoint = training_arguments.resume_from_checkpoint or last_checkpoint(training_arguments.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)

        # 4. Save: weights (of a LoRA run: adapters), configuration, processor, code and log in one folder.
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            save_run_arguments(model_arguments, data_arguments, lora_arguments, training_arguments)

    # 5. Evaluate.
    if eval_dataset is not None and training_arguments.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    return trainer


if __name__ == "__main__":
    logger.info(f"pixclip_hf {pixclip_hf.__version__}")
    main(sys.argv[1:])
