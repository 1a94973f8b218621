"""Which checkpoint a run continues from, whether it can, and what says that a checkpoint is whole."""

import json
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data.whole_files import file_fault, file_record, only_writer, remove_unfinished, sync, write_json

logger = logging.get_logger(__name__)

MANIFEST = "checkpoint_files.json"
"""Written last, with sizes and checksums of the others: a checkpoint whose files differ from them is not whole."""
RESULT = "trained_files.json"
"""The same of the trained weights in the output folder, and the step that they are of: written last of all."""
_WEIGHTS = "*.safetensors"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The latest whole checkpoint of a run, or None. Those that are damaged, or were being written when their run was
    killed, are passed over with a warning that names what is wrong."""
    folders = sorted(_checkpoints(output_dir), key=_step, reverse=True)
    for folder in folders:
        if (fault := checkpoint_fault(folder)) is None:
            return str(folder)
        logger.warning(f"The checkpoint {str(folder)!r} {fault}; it is not used.")
    if folders:
        logger.warning(f"No checkpoint of {str(output_dir)!r} can be used: the run starts from its beginning.")
    return None


def checkpoint_fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words that follow its name, or None.

    Checkpoints of earlier versions and of a plain `Trainer` have no manifest: what can be seen of their files counts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    if (fault := _noted(folder / TRAINER_STATE_NAME)[1]) is not None:
        return f"is incomplete ({TRAINER_STATE_NAME} {fault})"
    if not (folder / MANIFEST).exists():
        faults = ((path, _format_fault(path)) for path in sorted(folder.rglob("*")) if path.is_file())
        return next((f"is damaged ({path.name} {fault})" for path, fault in faults if fault), None)
    content, fault = _noted(folder / MANIFEST)
    if fault is not None:
        return f"is damaged ({MANIFEST} {fault})"
    if content.get("files") is None:
        return "is incomplete (not all of its files were written)"
    return _first_fault(folder, content["files"])


def begin_checkpoint(folder: Path) -> None:
    """Makes the folder of a checkpoint that is not whole yet, in place of an older one of the same step."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / MANIFEST, {"files": None})


def finish_checkpoint(folder: Path) -> None:
    """Says that a checkpoint is whole, when all of its files are on disk."""
    # A state is JSON, which says by itself whether it is whole, and which people edit.
    _record(folder, "**/*", MANIFEST, {}, without=(TRAINER_STATE_NAME,))


def rotate_checkpoints(output_dir: str | Path, step: int, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints above `save_total_limit`, never the one of `step`, which was just written, nor
    the best one.

    The order is that of the steps, whatever the clock said when they were written. Those beyond `step` are older: they
    belong to a run that went on from an earlier checkpoint.
    """
    if limit is None or limit <= 0:
        return
    folders = sorted(_checkpoints(output_dir), key=lambda path: (_step(path) <= step, _step(path)))
    kept = {folder for folder in folders if _step(folder) == step or (best and folder.name == Path(best).name)}
    surplus = len(folders) - max(limit, len(kept))
    for folder in [folder for folder in folders if folder not in kept][: max(surplus, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def finish_result(output_dir: str | Path, step: int) -> None:
    """Says that all results of a run of so many steps are in its folder."""
    _record(Path(output_dir), _WEIGHTS, RESULT, {"step": step})


def finished_step(output_dir: str | Path) -> int | None:
    """The step that the results in a folder are of; None where they were not written to their end, or are damaged."""
    folder = Path(output_dir)
    content, fault = _noted(folder / RESULT)
    if fault is not None:
        return None
    if (fault := _first_fault(folder, content.get("files"))) is not None:
        logger.warning(f"What was trained in {str(folder)!r} {fault}; it is written again.")
        return None
    return content.get("step")


def begin_result(output_dir: str | Path) -> None:
    """Says that the results in a folder are about to be replaced."""
    Path(output_dir, RESULT).unlink(missing_ok=True)


@contextmanager
def only_training(arguments: TrainingArguments) -> Iterator[None]:
    """Holds the output folder of a training. The ranks of the training hold it together, and a thread may hold it
    several times.

    Raises:
        ValueError: another training holds it; on every rank.
    """
    folder = Path(arguments.output_dir).resolve()
    if _HELD.get(folder) == get_ident():
        yield
        return
    refused = None
    with ExitStack() as stack:
        if arguments.process_index == 0:
            try:
                stack.enter_context(only_writer(folder, "`output_dir`"))
                remove_unfinished(folder)
            except ValueError as error:
                refused = f"{error} Two trainings in one folder would lose one of them."
        if (refused := agreed(refused, arguments)) is not None:
            raise ValueError(refused)
        _HELD[folder] = get_ident()
        stack.callback(_HELD.pop, folder)
        yield


def agreed(value: Any, arguments: TrainingArguments) -> Any:
    """What the first rank says, on every rank."""
    return broadcast_object_list([value])[0] if arguments.world_size > 1 else value


_HELD: dict[Path, int] = {}


def _checkpoints(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if path.is_dir() and path.name[len(PREFIX_CHECKPOINT_DIR) + 1 :].isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _record(folder: Path, pattern: str, name: str, content: Mapping[str, Any], without: Collection[str] = ()) -> None:
    files = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and path != folder / name:
            sync(path)
            if path.name in without:
                continue
            files[path.relative_to(folder).as_posix()] = file_record(path)
    write_json(folder / name, {**content, "files": files})


def _noted(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a file of JSON says, and what is wrong with it, in words that follow its name, or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"can't be read: {type(error).__name__}"
    return (found, None) if isinstance(found, dict) else ({}, "is no JSON of an object")


def _first_fault(folder: Path, files: Any) -> str | None:
    """What is wrong with the first of the files that a record of them lists, in words that follow their folder's
    name, or None."""
    if not isinstance(files, dict):
        return "is damaged (no files are listed)"
    faults = ((name, file_fault(folder / name, record)) for name, record in files.items())
    return next((f"is damaged ({name} {fault})" for name, fault in faults if fault), None)


def _format_fault(path: Path) -> str | None:
    """What is wrong with a file whose size and checksum nobody recorded, or None."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            return None if damaged is None else f"is damaged at {damaged!r}"
    except Exception as error:  # parsers raise anything on damaged bytes
        return f"can't be read: {error}"
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
