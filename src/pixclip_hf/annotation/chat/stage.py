"""The base of stages that ask a language model."""

from dataclasses import dataclass

from ..stages import RowStage
from .questions import Chat


@dataclass
class ChatStage(RowStage):
    """A stage that asks a language model, and needs the GPUs that the model does.

    Args:
        chat: the model to ask.
        batch_size: rows per call.
    """

    chat: Chat

    @property
    def num_gpus(self) -> float:  # type: ignore[override]
        return self.chat.num_gpus
