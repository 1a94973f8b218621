"""Training with the Hugging Face `Trainer`."""

from .arguments import DataArguments, LoraArguments, ModelArguments, OptimizerArguments, recipe_arguments
from .lora import add_lora
from .optimizer import optimizer_for, parameter_groups
from .trainer import RegionTrainer

__all__ = [
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizerArguments",
    "RegionTrainer",
    "add_lora",
    "optimizer_for",
    "parameter_groups",
    "recipe_arguments",
]
