"""Training with the Hugging Face `Trainer`."""

from .arguments import (
    DataArguments,
    LoraArguments,
    LossArguments,
    ModelArguments,
    OptimizerArguments,
    recipe_arguments,
)
from .checkpoints import last_checkpoint
from .lora import add_lora
from .optimizer import optimizer_for, parameter_groups
from .trainer import RegionTrainer

__all__ = [
    "DataArguments",
    "LoraArguments",
    "LossArguments",
    "ModelArguments",
    "OptimizerArguments",
    "RegionTrainer",
    "add_lora",
    "last_checkpoint",
    "optimizer_for",
    "parameter_groups",
    "recipe_arguments",
]
