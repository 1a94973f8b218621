"""Which checkpoint a run continues from, and whether it can."""

import json
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The latest complete checkpoint of a run, or None.

    `Trainer` writes a checkpoint's state last: a folder without a readable one was being written when its run was
    killed, and is passed over with a warning.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"The checkpoint {str(folder)!r} is incomplete and is not used.")
            continue
        return str(folder)
    return None


class ImagesPerStep(TrainerCallback, ExportableState):
    """Keeps in checkpoints how many images a step takes, and refuses to continue from one with another number, whose
    place in the data and in the schedule would differ. The number of processes that share the images may change."""

    def __init__(self, images: int):
        self.images = images

    def state(self) -> dict:
        return {"args": {"images": self.images}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # A checkpoint of a plain Trainer has no such entry.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["args"]["images"]
        if saved != self.images and state.global_step and not args.ignore_data_skip:
            raise ValueError(
                f"The checkpoint's steps took {saved} images, the steps of this run take {self.images} "
                f"({args.world_size} processes, `per_device_train_batch_size` {args.per_device_train_batch_size}, "
                f"`gradient_accumulation_steps` {args.gradient_accumulation_steps}): it cannot go on at the same "
                f"place of the data and the schedule. Set them so that their product is {saved}, or start a new run "
                "from the checkpoint's weights."
            )
