"""Command-line arguments of a training run, beside `TrainingArguments`."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """Which model to train, and from what weights: a checkpoint, two towers, or random."""

    model_type: str = field(default="cloc", metadata={"help": "`cloc` or `pixclip`.", "choices": ["cloc", "pixclip"]})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of this package to go on from: Hub id or folder."}
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP whose vision tower to start from; needs the text tower too."}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Text encoder or LLM to start from, with its tokenizer."}
    )
    image_size: int = field(default=64, metadata={"help": "Side of the images in pixels, of a model from scratch."})
    freeze_vision: bool = field(default=False, metadata={"help": "Leave the vision tower as it is."})
    freeze_text: bool = field(default=False, metadata={"help": "Leave the text tower as it is."})

    def __post_init__(self) -> None:
        towers = (self.vision_model_name_or_path, self.text_model_name_or_path)
        if (towers[0] is None) != (towers[1] is None):
            raise ValueError(
                "`vision_model_name_or_path` and `text_model_name_or_path` go together, "
                f"got {towers[0]!r} and {towers[1]!r}."
            )
        if self.model_name_or_path is not None and towers[0] is not None:
            raise ValueError(
                "`model_name_or_path` and `vision_model_name_or_path` exclude each other, "
                f"got {self.model_name_or_path!r} and {towers[0]!r}."
            )


@dataclass
class DataArguments:
    """What to train on, and how batches are drawn from it."""

    dataset_name: str = field(
        default="scenes", metadata={"help": "`scenes`, or a dataset in the record schema: Hub id or folder."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; `test` for the scenes."})
    scenes_train_images: int = field(default=12000, metadata={"help": "Scenes to train on."})
    scenes_eval_images: int = field(default=500, metadata={"help": "Scenes to evaluate on."})
    scenes_setting: str = field(
        default="default", metadata={"help": "`default` or `hard` (smaller objects).", "choices": ["default", "hard"]}
    )
    scenes_seed: int = field(default=0, metadata={"help": "Seed of the scenes; train and test never meet."})
    regions_per_image: int | None = field(
        default=None, metadata={"help": "Regions drawn from an image: 4 for CLOC, 1 for PixCLIP."}
    )
    region_text: list[str] | None = field(
        default=None,
        metadata={"help": "`caption` (CLOC), `long_caption` (PixCLIP), `category`; of several, each batch draws one."},
    )
    image_captions: bool | None = field(
        default=None, metadata={"help": "Train on whole images and their captions too: yes for CLOC, no for PixCLIP."}
    )
    whole_image_share: float | None = field(
        default=None,
        metadata={"help": "Share of images whose first region is the image: 0 for CLOC, 0.1 for PixCLIP."},
    )

    def collator_arguments(self, model_type: str) -> dict[str, object]:
        """Arguments of [`RegionCollator`], with the model's own habits where nothing is said."""
        pixclip = model_type == "pixclip"
        defaults = {
            "regions_per_image": 1 if pixclip else 4,
            "region_text": "long_caption" if pixclip else "caption",
            "image_captions": not pixclip,
            "whole_image_share": 0.1 if pixclip else 0.0,
        }
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        return {**defaults, **given, "crops": pixclip}


@dataclass
class LoraArguments:
    """LoRA on the text tower; everything else of the model trains in full."""

    lora_r: int = field(default=0, metadata={"help": "Rank; 0 is off."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "Regular expression on module names; the attention projections by default."}
    )


@dataclass
class LossArguments:
    """How the contrastive losses of a large batch fit into memory."""

    gradient_cache_chunks: int = field(
        default=1,
        metadata={"help": "Parts that a batch passes the model in; loss and gradients stay those of the whole."},
    )
    contrastive_tile_size: int | None = field(
        default=None,
        metadata={"help": "Sets the field of the model's configuration: tiles of this edge, or 0."},
    )
