"""How the demo's models learn the scenes: CLOC from random weights, PixCLIP from the towers of such a CLOC."""

import hashlib
import json
import sys
import time
from pathlib import Path

from ..data.whole_files import write_json
from ..modeling.modeling_pixclip import PixCLIPModel
from ..processing.processing_pixclip import PixCLIPProcessor

COMMON = (
    "--lr_scheduler_type", "cosine", "--weight_decay", "0.05", "--adam_beta2", "0.98",
    "--logging_steps", "100", "--save_strategy", "no", "--report_to", "none", "--dataloader_drop_last", "True",
)  # fmt: skip
RECIPES = {
    "cloc": (
        "--max_steps", "1200", "--per_device_train_batch_size", "48", "--warmup_steps", "100",
        "--region_text", "caption", "category", "--mask_prompt_share", "0.6", "--scenes_train_images", "18000",
        "--learning_rate", "1.4e-3", "--muon", "vision", "text", "prompter",
    ),
    # A CLOC that points may prompt too, in a quarter of its batches, which are smaller; boxes and masks have as many
    # batches as in `cloc`.
    "cloc-points": (
        "--max_steps", "2400", "--per_device_train_batch_size", "32", "--warmup_steps", "100",
        "--region_text", "caption", "category", "--mask_prompt_share", "0.6", "--point_prompt_share", "0.25",
        "--learning_rate", "1e-3",
    ),
    # Image captions keep what the towers know of whole images, and so does staying near their embeddings of them;
    # categories and captions say what a region is, apart from all else that a long caption says. The text tower takes
    # smaller steps, by AdamW, than what Muon steps and what is new.
    "pixclip": (
        "--max_steps", "280", "--per_device_train_batch_size", "48", "--warmup_steps", "50",
        "--regions_per_image", "2", "--region_text", "long_caption", *["caption"] * 3, *["category"] * 3,
        "--image_captions", "True", "--whole_image_share", "0", "--distillation_weight", "5",
        "--config_overrides", '{"local_global_loss_weight": 1.5}',
        "--learning_rate", "2.5e-3", "--text_lr_scale", "0.5", "--muon", "vision",
    ),
}  # fmt: skip
# Batches are made beside the steps.
LOADING = ("--dataloader_num_workers", "1")
STAGE_FILE = "stage.json"


def model_type_of(recipe: str) -> str:
    """The kind of model that a recipe trains: the part of its name before a hyphen."""
    return recipe.partition("-")[0]


def train_stage(recipe: str, seed: int, folder: Path, start: Path | None = None) -> dict:
    """Trains a model of the demo.

    Args:
        recipe: a key of `RECIPES`.
        seed: the seed of the scenes, the batches and the weights.
        folder: where the model goes.
        start: folder of the model to start from; random weights when None.

    Returns:
        What `stage.json` in `folder` says from now on: arguments, seed, code version and seconds of training.
    """
    from ..training.command import main
    from ..training.progress_line import ProgressLine

    begun = time.perf_counter()
    stage = _stage(recipe, seed)
    model_type = model_type_of(recipe)
    beginning = [] if start is None else ["--model_name_or_path", str(start)]
    # A bar redraws its line, which only a terminal can.
    line = None if sys.stdout.isatty() else ProgressLine(f"training {recipe}")
    trainer = main(
        ["--model_type", model_type, "--output_dir", str(folder), "--seed", str(seed), "--scenes_seed", str(seed)]
        + beginning
        + [*stage["arguments"], *LOADING],
        progress=line,
    )
    print(f"set-up, training and saving of {recipe} took {time.perf_counter() - begun:.0f} s")
    logs = reversed(trainer.state.log_history)
    stage["seconds"] = next(log["train_runtime"] for log in logs if "train_runtime" in log)
    write_json(folder / STAGE_FILE, stage)
    return stage


def find_stage(recipe: str, seed: int, folder: Path) -> dict | None:
    """What [`train_stage`] left in `folder`, if it was this recipe, this seed and this code."""
    file = folder / STAGE_FILE
    if not file.is_file():
        return None
    stage = json.loads(file.read_text(encoding="utf-8"))
    expected = _stage(recipe, seed)
    return stage if all(stage.get(name) == value for name, value in expected.items()) else None


def start_from_towers(towers: Path, folder: Path) -> PixCLIPModel:
    """A PixCLIP with both towers of a trained CLOC, as a CLIP and a language model would bring them, in `folder`.

    Its mask projection is zero: at this step every region embedding is that of the whole image, bit for bit.
    """
    cloc = str(towers)
    # Pooled features learn from the third branch alone: a distance to the crops, small once color and texture agree,
    # would not teach them shapes.
    branches = {"local_global_objective": "contrastive"}
    model = PixCLIPModel.from_vision_text_pretrained(cloc, cloc, text_projection="linear", **branches)
    model.save_pretrained(folder)
    PixCLIPProcessor.from_vision_text_pretrained(cloc, cloc).save_pretrained(folder)
    return model


def _stage(recipe: str, seed: int) -> dict:
    return {"arguments": [*RECIPES[recipe], *COMMON], "seed": seed, "code": code_version()}


def code_version() -> str:
    """Hash of the package's source."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


__all__ = ["COMMON", "RECIPES", "code_version", "find_stage", "model_type_of", "start_from_towers", "train_stage"]
