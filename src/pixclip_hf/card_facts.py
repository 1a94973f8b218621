"""What cards say beyond names: what a model started from and which settings shaped it; what a dataset holds."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .outgoing import is_local_name, last_part, markdown_code, public_word

# Settings of `TrainingArguments` that a card shows always, and those that it shows where they are not the default.
TRAINING_FIELDS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "bf16", "fp16", "seed",
)  # fmt: skip
_CHANGED_FIELDS = (
    "adam_epsilon", "data_seed", "dataloader_drop_last", "label_smoothing_factor", "load_best_model_at_end",
    "lr_scheduler_kwargs", "metric_for_best_model", "neftune_noise_alpha", "optim", "optim_args",
    "optim_target_modules", "train_sampling_strategy",
)  # fmt: skip
# Our own arguments by their group in run_arguments.json, with the values that change nothing and are not shown. Those
# that name the starting weights have a sentence of their own, and those that only say how a step is computed are left
# out. Written down here because a card is written without the extra `train` too.
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "config_overrides": None, "freeze_text": False, "freeze_vision": False, "text_cache_dtype": "float32",
        "text_max_length": None, "text_quantization": None,
    },
    "optimizer": {"vision_lr_scale": 1.0, "text_lr_scale": 1.0, "layer_decay": 1.0, "muon": None},
    "loss": {"distillation_weight": 0.0},
    "early_stopping": {"early_stopping_patience": None, "early_stopping_threshold": 0.0},
}  # fmt: skip
# What a record may have, in the words of a card; the field of a region.
_REGION_FIELDS = {
    "with a mask": "mask",
    "with a category": "category",
    "with a caption": "caption",
    "with a long caption": "long_caption",
}
_MOST_SOURCES = 10
# Of the picture: images, regions of an image, and the records that they are chosen from.
_SAMPLES, _SHOWN_REGIONS, _LOOKED_AT = 6, 6, 60
SAMPLES = "samples.png"


def starting_sentence(made_from: Mapping[str, Any]) -> str:
    """What the weights of a run began as, in a sentence of Markdown; empty where nothing was recorded.

    Args:
        made_from: the entry `model` of run_arguments.json.
    """
    if checkpoint := made_from.get("model_name_or_path"):
        return f"Fine-tuned from {_named(checkpoint)}."
    vision, text = (made_from.get(f"{part}_model_name_or_path") for part in ("vision", "text"))
    if vision is None or text is None:
        return "Trained from random weights." if "model_type" in made_from else ""
    towers = _named(vision) if vision == text else f"{_named(vision)} and {_named(text)}"
    if made_from.get("random_weights"):
        return f"Trained from random weights, in the architecture of {towers}."
    if vision == text:
        return f"Made from both towers of {towers}."
    return f"Made from the vision tower of {_named(vision)} and the text model of {_named(text)}."


def _named(name: str) -> str:
    """A name of the Hub, or the last part of a path, which nobody else can load."""
    if is_local_name(name):
        return f"`{markdown_code(last_part(name))}`, a local folder that is not on the Hub"
    return f"`{markdown_code(name)}`"


# Where the records lie, in words of their own.
_OF_DATASETS = ("dataset_name", "source", "eval_source")


def data_table(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained on, and how batches were drawn from it.

    Args:
        data: the entry `data` of run_arguments.json.
    """
    name, words, evaluated = (data.get(key) for key in _OF_DATASETS)
    is_of_scenes = name == "scenes" and not words
    table = {"dataset": _read_from(words or [name])} if name or words else {}
    table |= {"evaluated on": _read_from(evaluated)} if evaluated else {}
    return table | {
        key: value
        for key, value in data.items()
        if value is not None and key not in _OF_DATASETS and (is_of_scenes or not key.startswith("scenes_"))
    }


def _read_from(words: Sequence[str]) -> str:
    """A source in words without paths."""
    if len(words) == 1 and "/" in words[0] and is_local_name(words[0]):
        return f"{last_part(words[0])}, a local folder"
    return " ".join(map(public_word, words))


def training_table(run: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that shaped the weights, by the name of its argument.

    Args:
        run: the content of run_arguments.json.
        state: the content of trainer_state.json.
    """
    table = {"steps": state["global_step"]} if "global_step" in state else {}
    training = run.get("training", {})
    left_out = "num_train_epochs" if training.get("max_steps", -1) > 0 else "max_steps"
    table |= {name: training[name] for name in TRAINING_FIELDS if name in training and name != left_out}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name in _CHANGED_FIELDS:
        if name in training and _as_recorded(training[name]) != _as_recorded(defaults.get(name)):
            table[name] = training[name]
    table = {name: value for name, value in table.items() if value is not None and value is not False}
    lora = run.get("lora", {})
    if lora.get("lora_r"):
        table |= {name: value for name, value in lora.items() if value is not None}
    for group, unchanged in SETTINGS.items():
        for name, usual in unchanged.items():
            value = run.get(group, {}).get(name, usual)
            if value != usual:
                value = json.dumps(value) if isinstance(value, dict) else value
                table[name] = " ".join(value) if isinstance(value, list) else value
    if run.get("model", {}).get("text_cache"):
        table["freeze_text"] = True  # as whoever caches the states of a text model does without saying
    return table


def _as_recorded(value: Any) -> str:
    """A setting as run_arguments.json has it: an enum as its value, a container as text."""
    return str(getattr(value, "value", value))


def count_records(shards: Sequence[Path]) -> dict[str, Any]:
    """What records in Parquet shards hold, without opening an image.

    Args:
        shards: the files.

    Returns:
        `counts` (what -> how many) and `region_sources` (source -> regions; None where a region names none).

    Raises:
        ValueError: a shard is not in the record schema; the message names what it lacks.
    """
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    sources: Counter[str | None] = Counter()
    categories: set[str] = set()
    for path in shards:
        for batch in _without_pixels(path):
            captions = batch.column("captions")
            lengths = pc.fill_null(pc.list_value_length(captions), 0)
            counts["images"] += len(batch)
            counts["images with a caption"] += pc.sum(pc.greater(lengths, 0)).as_py() or 0
            regions = batch.column("regions")
            lengths = pc.fill_null(pc.list_value_length(regions), 0)
            counts["images without regions"] += pc.sum(pc.equal(lengths, 0)).as_py() or 0
            flat = regions.flatten()
            counts["regions"] += len(flat)
            for label, field in _REGION_FIELDS.items():
                values = flat.field(field)
                counts[f"regions {label}"] += len(values) - values.null_count
            categories |= set(pc.unique(flat.field("category")).to_pylist()) - {None}
            for entry in flat.field("source").value_counts().to_pylist():
                sources[entry["values"]] += entry["counts"]
    counts["different categories"] = len(categories)
    return {"counts": dict(counts), "region_sources": dict(sources.most_common(_MOST_SOURCES))}


def _without_pixels(path: Path) -> Iterator[Any]:
    """Captions and regions of a shard, as batches of Arrow. Masks are told by their sizes: their pixels are most of a
    record without its image."""
    from pyarrow.parquet import ParquetFile

    from .record import record_features

    with ParquetFile(path) as file:
        if missing := sorted(set(record_features()) - set(file.schema_arrow.names)):
            raise ValueError(f"{str(path)!r} is not in the record schema: it lacks the columns {', '.join(missing)}.")
        leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
        wanted = [leaf for leaf in leaves if leaf.startswith(("captions", "regions")) and not leaf.endswith("counts")]
        yield from file.iter_batches(columns=wanted)


def draw_samples(folder: Path, shards: Sequence[Path], count: int) -> str | None:
    """Writes samples.png: images from all over the shards with their first regions and texts.

    Args:
        folder: where it goes.
        shards: Parquet files in the record schema.
        count: the number of their records.

    Returns:
        The name of the file; None where the looked-at part of the shards has no image with a region.

    Raises:
        ImportError: matplotlib is missing.
    """
    from .data.whole_files import whole_files
    from .visualization import draw_labels

    images, boxes, masks, texts = [], [], [], []
    for image, regions, own_masks in _samples(shards):
        images.append(image)
        boxes.append([region["box"] for region in regions])
        masks.append(own_masks)
        texts.append([_text_of(region) for region in regions])
    if not images:
        return None
    title = f"{len(images)} of {count:,} images, at most {_SHOWN_REGIONS} regions of each"
    with whole_files(folder) as unfinished:
        draw_labels(unfinished / SAMPLES, images, boxes, texts, masks, title)
    return SAMPLES


def _samples(shards: Sequence[Path]) -> Iterator[tuple[Any, list[dict[str, Any]], list[Any]]]:
    """Images with regions and their masks, as many from each of the shards that are looked at; what cannot be read is
    passed over."""
    from pyarrow.parquet import ParquetFile

    from .images import open_image
    from .processing.processing_regions import read_mask
    from .record import LeftOut, foreign

    looked_at = shards[:: max(len(shards) // _SAMPLES, 1)][:_SAMPLES]
    share = -(-_SAMPLES // len(looked_at))
    for path in looked_at:
        with ParquetFile(path) as file:
            batch = next(file.iter_batches(_LOOKED_AT // len(looked_at), columns=["image", "regions"]), None)
        records = [] if batch is None else [record for record in batch.to_pylist() if record["regions"]]
        for record in records[:: max(len(records) // share, 1)][:share]:
            regions = record["regions"][:_SHOWN_REGIONS]
            try:
                with foreign("record not readable"):
                    image = open_image(record["image"])
                    size = (image.height, image.width)
                    masks = [region["mask"] and read_mask(region["mask"], size, "mask") for region in regions]
            except LeftOut:
                continue
            yield image, regions, masks


def _text_of(region: Mapping[str, Any]) -> str:
    text = next(filter(None, (region.get(name) for name in ("caption", "category", "long_caption"))), "")
    return text if len(text) <= 60 else text[:59] + "…"


__all__ = ["SAMPLES", "count_records", "data_table", "draw_samples", "starting_sentence", "training_table"]
