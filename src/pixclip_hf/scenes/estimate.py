"""How long the demo's training and measuring take on this machine: a few steps and scenes are timed and multiplied."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import DataLoader

from .dataset import make_scene, scenes_dataset
from .measures import evaluate_scenes
from .recipes import COMMON, RECIPES, model_type_of, start_from_towers

# Steps that warm up, and steps that are timed.
WARM_UP, TIMED_STEPS = 2, 6
# Scenes that are measured: few, and more, for a part of the time does not grow with them.
TIMED_SCENES = (4, 20)


def seconds_of_training(recipe: str) -> float:
    """Seconds of the steps of a recipe, without the set-up and the saving.

    Args:
        recipe: a key of `RECIPES`.
    """
    from ..data.collator import RegionCollator, RegionDataset
    from ..training.distillation import distillation_loss, frozen_copy
    from ..training.optimizer import optimizer_for

    _, data, losses, groups, training = _arguments(recipe)
    model, processor = _untrained(recipe)
    model.to(training.device).train()
    optimizer_class, options = optimizer_for(model, training, groups)
    optimizer = optimizer_class(**options)
    teacher = frozen_copy(model) if losses.distillation_weight else None
    steps, size = WARM_UP + TIMED_STEPS, training.per_device_train_batch_size
    scenes = scenes_dataset(steps * size, size=processor.image_processor.size["height"])
    collator = RegionCollator(processor, **data.collator_arguments(model_type_of(recipe)))
    batches = DataLoader(RegionDataset(scenes), size, collate_fn=collator)
    begun = time.perf_counter()
    for step, batch in enumerate(batches):
        inputs = {name: value.to(training.device) if hasattr(value, "to") else value for name, value in batch.items()}
        output = model(**inputs)
        loss = output.loss
        if teacher is not None:
            loss = loss + losses.distillation_weight * distillation_loss(teacher, output, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        if step == WARM_UP - 1:
            begun = time.perf_counter()
    return (time.perf_counter() - begun) / TIMED_STEPS * training.max_steps


def seconds_of_measuring(recipe: str, scenes: int) -> float:
    """Seconds that [`evaluate_scenes`] takes.

    Args:
        recipe: a key of `RECIPES`, whose model is measured.
        scenes: how many scenes will be measured.
    """
    model, processor = _untrained(recipe)
    few, more = TIMED_SCENES
    seconds = []
    for count in (few, few, more):  # the first one warms up
        begun = time.perf_counter()
        evaluate_scenes(model, processor, [make_scene(index, "test") for index in range(count)])
        seconds.append(time.perf_counter() - begun)
    each = max(seconds[2] - seconds[1], 0) / (more - few)
    return seconds[2] + each * max(scenes - more, 0)


def _arguments(recipe: str) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments of model, data, loss, optimizer and training that a recipe gives `pixclip-hf train`."""
    from ..training.command import build_parser

    given = ["--output_dir", "unused", "--model_type", model_type_of(recipe), *RECIPES[recipe], *COMMON]
    parsed = build_parser().parse_args_into_dataclasses(given, look_for_args_file=False)
    model, data, _, losses, groups, _, training = parsed
    return model, data, losses, groups, training


def _untrained(recipe: str) -> tuple[Any, Any]:
    """The model that a recipe starts from, and its processor: PixCLIP has the towers of an untrained CLOC."""
    if model_type_of(recipe) == "cloc":
        from ..training.command import build_model

        arguments, data, *_ = _arguments(recipe)
        model, processor, _ = build_model(arguments, points=data.point_prompt_share > 0)
        return model, processor
    from ..processing.processing_pixclip import PixCLIPProcessor

    with TemporaryDirectory() as folder:
        towers, start = Path(folder, "towers"), Path(folder, "start")
        for part in _untrained("cloc"):
            part.save_pretrained(towers)
        return start_from_towers(towers, start), PixCLIPProcessor.from_pretrained(start)


def in_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes"


__all__ = ["in_words", "seconds_of_measuring", "seconds_of_training"]
