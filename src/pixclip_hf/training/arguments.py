"""Command-line arguments of a training run, beside `TrainingArguments`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class ModelArguments:
    """Which model to train, and from what weights: a checkpoint, two towers, or random."""

    _argument_group_name = "model"

    model_type: str = field(default="cloc", metadata={"help": "`cloc` or `pixclip`.", "choices": ["cloc", "pixclip"]})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of this package to continue from: Hub id or folder."}
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP whose vision tower to start from; needs the text tower too."}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Text encoder or LLM to start from, with its tokenizer."}
    )
    image_size: int = field(
        default=64, metadata={"help": "Side of the images in pixels, for a model that starts from random weights."}
    )
    freeze_vision: bool = field(
        default=False,
        metadata={
            "help": "Do not train the vision tower. This includes its mask projection, which must have been trained "
            "before."
        },
    )
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text tower."})
    text_max_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of a text; the tokenizer's own limit by default."}
    )
    text_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the states that the frozen text model gives for all texts. They are computed once, by "
            "the first run that needs them, and training does without the text model; the final model contains it."
        },
    )
    text_cache_dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the text model that fills the cache.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    text_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the text model in `4bit` or `8bit` (bitsandbytes), below LoRA or to fill the cache.",
            "choices": ["4bit", "8bit"],
        },
    )
    random_weights: bool = field(
        default=False,
        metadata={"help": "Take the architecture and the tokenizer of the two towers, not their weights."},
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the model\'s configuration, as JSON: {"grounding_loss_weight": 2}.'}
    )
    vision_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the vision tower's activations in the backward pass."}
    )
    text_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the text tower's activations in the backward pass."}
    )

    compile_towers: str | None = field(
        default=None,
        metadata={"help": "Compile the towers with this backend of torch.compile (`inductor`); all else stays eager."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.config_overrides, str):
            self.config_overrides = json.loads(self.config_overrides)
        if self.config_overrides is not None and not isinstance(self.config_overrides, dict):
            raise ValueError(f"`--config_overrides` must be a JSON object, got {self.config_overrides!r}.")
        # An empty name counts as none, so that the command line can undo what a recipe says.
        self.model_name_or_path = self.model_name_or_path or None
        self.vision_model_name_or_path = self.vision_model_name_or_path or None
        self.text_model_name_or_path = self.text_model_name_or_path or None
        towers = (self.vision_model_name_or_path, self.text_model_name_or_path)
        if (towers[0] is None) != (towers[1] is None):
            raise ValueError(
                "`--vision_model_name_or_path` and `--text_model_name_or_path` go together, "
                f"got {towers[0]!r} and {towers[1]!r}: both may name one CLIP."
            )
        if self.model_name_or_path is not None and towers[0] is not None:
            raise ValueError(
                "`--model_name_or_path` and `--vision_model_name_or_path` exclude each other, "
                f"got {self.model_name_or_path!r} and {towers[0]!r}."
            )
        if self.text_cache is not None and (self.random_weights or (self.model_name_or_path or towers[0]) is None):
            raise ValueError(
                "`--text_cache` needs a trained text model: that of a checkpoint (`--model_name_or_path`), or of two "
                "towers (`--vision_model_name_or_path` and `--text_model_name_or_path`)."
            )
        if self.random_weights and towers[0] is None:
            raise ValueError("`--random_weights` needs `--vision_model_name_or_path` and `--text_model_name_or_path`.")
        if self.config_overrides and self.model_name_or_path is None and towers[0] is None:
            raise ValueError(
                "`--config_overrides` needs a checkpoint or two towers (`--model_name_or_path`, or "
                "`--vision_model_name_or_path` and `--text_model_name_or_path`); the small model has its own sizes."
            )


@dataclass
class DataArguments:
    """What to train on, and how batches are drawn from it."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default="scenes", metadata={"help": "`scenes`, or a dataset in the record schema: Hub id or folder."}
    )
    source: list[str] | None = field(
        default=None,
        metadata={
            "help": "Records of any format in place of `dataset_name`: a kind and its arguments, such as "
            "`coco annotations=instances.json images=train2017`."
        },
    )
    eval_source: list[str] | None = field(
        default=None,
        metadata={"help": "Records to evaluate on, written as `source`; those of `eval_split` if not given."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; `test` for the scenes."})
    scenes_train_images: int = field(default=12000, metadata={"help": "Scenes to train on."})
    scenes_eval_images: int = field(default=500, metadata={"help": "Scenes to evaluate on."})
    scenes_setting: str = field(
        default="default", metadata={"help": "`default` or `hard` (smaller objects).", "choices": ["default", "hard"]}
    )
    scenes_seed: int = field(default=0, metadata={"help": "Seed of the scenes; no scene is in two splits."})
    regions_per_image: int | None = field(
        default=None, metadata={"help": "Regions drawn per image; 4 for CLOC and 1 for PixCLIP by default."}
    )
    region_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts of the regions: `caption` (default of CLOC), `long_caption` (default of PixCLIP) or "
            "`category`. If several are given, each batch draws one of them."
        },
    )
    image_captions: bool | None = field(
        default=None,
        metadata={"help": "Train on whole images and their captions too; by default CLOC does and PixCLIP does not."},
    )
    whole_image_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of images whose first region is the whole image; 0 for CLOC and 0.1 for PixCLIP by default."
        },
    )

    mask_prompt_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of batches whose regions prompt by masks instead of boxes; 0.5 for CLOC by default, always "
            "1 for PixCLIP."
        },
    )
    point_prompt_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of batches whose regions prompt by points drawn inside and beside them, before masks have "
            "their share of the others; for a CLOC with `prompter_points`, which the small one then has."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read `dataset_name` while training, from Parquet shards or WebDataset tars. Needs `max_steps`."
        },
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "How many records of a stream each worker shuffles together."}
    )
    max_corrupt_share: float = field(
        default=0.01,
        metadata={"help": "Share of a stream's records that may be unreadable; they are skipped, counted and logged."},
    )

    def __post_init__(self) -> None:
        if self.source is not None:
            if self.dataset_name not in ("scenes", self.source[0]):
                raise ValueError(
                    f"`--source` and `--dataset_name` exclude each other, got {self.source} and {self.dataset_name!r}."
                )
            if self.streaming and len(self.source) > 1:
                raise ValueError(
                    "`--streaming` reads a dataset in the record schema, whose folder or Hub id is all of `--source`, "
                    f"got {self.source}. Save it by `save_records` first, or leave `--streaming` out (`--streaming "
                    "False`)."
                )
            self.dataset_name = self.source[0]  # what the model card calls it
        if self.streaming and self.dataset_name == "scenes":
            raise ValueError(
                "`--streaming` needs a `--dataset_name`: the scenes are drawn, not read. `--streaming False` trains "
                "on them."
            )

    def collator_arguments(self, model_type: str) -> dict[str, Any]:
        """Arguments of [`RegionCollator`], with the model's own defaults for those that are not given."""
        pixclip = model_type == "pixclip"
        defaults = {
            "regions_per_image": 1 if pixclip else 4,
            "region_text": "long_caption" if pixclip else "caption",
            "image_captions": not pixclip,
            "whole_image_share": 0.1 if pixclip else 0.0,
            "mask_prompt_share": 1.0 if pixclip else 0.5,
        }
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        return {**defaults, **given, "point_prompt_share": self.point_prompt_share, "crops": pixclip}


@dataclass
class LoraArguments:
    """LoRA on the text tower; everything else of the model trains in full."""

    _argument_group_name = "LoRA"

    lora_r: int = field(default=0, metadata={"help": "Rank of the adapters; 0 trains without LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters are scaled by `lora_alpha` / `lora_r`."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "Regular expression on module names; the attention projections by default."}
    )


@dataclass
class LossArguments:
    """What is added to the model's own loss, and how the contrastive losses of a large batch fit into memory."""

    _argument_group_name = "loss"

    gradient_cache_chunks: int = field(
        default=1,
        metadata={
            "help": "Number of parts in which a batch passes through the model; loss and gradients are those of "
            "the whole batch."
        },
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a penalty on forgetting: 1 - cosine between the embeddings of whole images and their "
            "captions and those of the model that the training starts from. Needs such a model; not with FSDP or "
            "DeepSpeed."
        },
    )
    contrastive_tile_size: int | None = field(
        default=None,
        metadata={
            "help": "Edge of the tiles in which the contrastive losses are computed; 0 turns tiles off, automatic by "
            "default."
        },
    )


@dataclass
class OptimizerArguments:
    """How the parts learn: rates relative to `learning_rate`, and which matrices step by Muon; see
    [`parameter_groups`]."""

    _argument_group_name = "optimizer"

    vision_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of the vision tower, without its mask projection, relative to `learning_rate`."
        },
    )
    text_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of the text tower, relative to `learning_rate`."}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Learning rate of each block of a tower, relative to the block above it; 1 is off."},
    )
    muon: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts whose matrices step by Muon in place of AdamW, at the same rate and decay: `vision`, "
            "`text`, `prompter`. Every process needs whole matrices: not with FSDP or DeepSpeed.",
            "choices": ["vision", "text", "prompter"],
        },
    )


@dataclass
class EarlyStoppingArguments:
    """When a training that no longer improves ends: see [`early_stopping`]."""

    _argument_group_name = "early stopping"

    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations in a row without a better `metric_for_best_model`; off by "
            "default. Needs `eval_strategy` and `load_best_model_at_end`."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much the metric must improve to count as better."}
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"`--early_stopping_patience` must be at least 1, got {self.early_stopping_patience}.")
        if self.early_stopping_threshold < 0:
            raise ValueError(f"`--early_stopping_threshold` must be at least 0, got {self.early_stopping_threshold}.")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"`--early_stopping_threshold` needs `--early_stopping_patience`, got {self.early_stopping_threshold} "
                "alone."
            )


def recipe_arguments(path: str | Path) -> list[str]:
    """A recipe as command-line arguments: put them in front of those of the user, who then has the last word.

    Args:
        path: a YAML file that maps names of arguments to values; a list gives several values, a mapping becomes JSON,
            an empty value leaves the argument out.

    Raises:
        ValueError: the file holds something else than a mapping.
    """
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} must map names of arguments to values, got {recipe!r}.")
    return [text for name, value in recipe.items() if value is not None for text in (f"--{name}", *_texts(value))]


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
