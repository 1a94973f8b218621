"""Training with the Hugging Face `Trainer`."""

from .arguments import DataArguments, LoraArguments, ModelArguments
from .lora import add_lora
from .trainer import RegionTrainer

__all__ = ["DataArguments", "LoraArguments", "ModelArguments", "RegionTrainer", "add_lora"]
