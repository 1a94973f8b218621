"""Training with the Hugging Face `Trainer`."""

from .arguments import DataArguments, LoraArguments, LossArguments, ModelArguments
from .checkpoints import last_checkpoint
from .lora import add_lora
from .trainer import RegionTrainer

__all__ = [
    "DataArguments",
    "LoraArguments",
    "LossArguments",
    "ModelArguments",
    "RegionTrainer",
    "add_lora",
    "last_checkpoint",
]
