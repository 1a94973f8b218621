"""The tasks by name: from an encoder and a folder of data to results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...encoders.cached import CachedEncoder
from ..intervals import RESAMPLES
from ..report import Result
from .base import Option, Task, joined_options
from .detection import OpenVocabularyDetection
from .image_classification import ImageClassification
from .mask_sensitivity import MaskSensitivity
from .phrase_grounding import PhraseGrounding
from .referring import Referring
from .region_classification import RegionClassification
from .retrieval import ImageTextRetrieval, LongTextRetrieval, RegionRetrieval
from .scenes import Scenes

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        RegionClassification(),
        RegionRetrieval(),
        ImageTextRetrieval(),
        LongTextRetrieval(),
        OpenVocabularyDetection(),
        PhraseGrounding(),
        Referring(),
        ImageClassification(),
        MaskSensitivity(),
        Scenes(),
    )
}
OPTIONS: dict[str, Option] = joined_options(list(TASKS.values()))
PROTOCOLS: tuple[str, ...] = tuple(
    dict.fromkeys(["corrected", "official", *(name for task in TASKS.values() for name in task.protocols)])
)


def check_task(task: str, protocol: str | None = None) -> str | None:
    """The protocol as [`Task.run`] takes it: None for `corrected`, for which the names of other tasks' protocols stand
    too.

    Raises:
        ValueError: an unknown task or protocol, or `official` for a task that no published script does.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    if protocol in TASKS[task].protocols:
        return protocol
    if protocol == "official":
        official = [name for name, one in TASKS.items() if protocol in one.protocols]
        raise ValueError(f"`protocol` official is of {', '.join(official)}, got it for {task}.")
    return None


def run_task(
    encoder: CachedEncoder,
    task: str,
    data_dir: str | Sequence[str],
    protocol: str | None = None,
    split: str | None = None,
    resamples: int = RESAMPLES,
    **options: Any,
) -> list[Result]:
    """Runs one task.

    Args:
        encoder: a [`CachedEncoder`].
        task: one of [`TASKS`].
        data_dir: a folder, as the task's `layout` says, `scenes:N:SEED`, or the words of any source, as in
            [`read_images`].
        protocol: `corrected` (or None), `official` or another of the task's `protocols`; a name that only other tasks
            know stands for `corrected`.
        split: the split of a dataset that has several.
        resamples: the number of resamples of the bootstrap.
        options: among [`OPTIONS`]; those of other tasks change nothing.

    Returns:
        A result, or two: `referring` adds the grounding head of a model that has one, `region-classification` of a
        model that takes prompts its sensitivity to them. A note says how many texts were cut, if any were.

    Raises:
        ValueError: as [`check_task`], or data that the task or protocol cannot use.
        TypeError: an option that no task has.
        FileNotFoundError: no data; the message shows how it must lie.
    """
    protocol = check_task(task, protocol)
    check_options(options)
    if not isinstance(data_dir, str) and len(data_dir) == 1:
        (data_dir,) = data_dir  # the one word of a source that needs no arguments, such as scenes:N:SEED
    encoder.texts = encoder.cut_texts = 0
    results = TASKS[task].run(encoder, data_dir, protocol, split, resamples, **options)
    if encoder.cut_texts:
        share = f"{100 * encoder.cut_texts / encoder.texts:.1f} %"
        note = (
            f"{encoder.cut_texts} of {encoder.texts} texts ({share}) were cut to {encoder.encoder.text_limit} tokens."
        )
        for result in results:
            result.notes.append(note)
    return results


def draw_task(
    encoder: CachedEncoder,
    task: str,
    data_dir: str | Sequence[str],
    protocol: str | None,
    split: str | None,
    folder: str,
    name: str,
    **options: Any,
) -> list[str]:
    """The pictures of what [`run_task`] measured with the same arguments: the names of their files, which begin with
    `name`; none for a task that has no pictures."""
    if type(TASKS[task]).draw is Task.draw:
        return []
    protocol = check_task(task, protocol)
    data, own = TASKS[task].prepared(data_dir, protocol, split, options)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return TASKS[task].draw(encoder, data, protocol, folder, name, **own)


def check_options(options: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: an option that no task has.
        ValueError: a value that an option cannot have.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise TypeError(f"`{name}` is no option of a task, which are {', '.join(OPTIONS)}.")
        choices = OPTIONS[name].choices
        if choices is not None and value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
