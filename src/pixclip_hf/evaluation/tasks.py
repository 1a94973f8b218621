"""The tasks by name: from a model and a folder of data to results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.scenes import make_scene
from .cache import CachedEncoder
from .encoders import RegionEncoder
from .grounding import refer_by_grounding, refer_by_similarity
from .image_sets import DOCCI_FILE, parse_scenes, read_images, refuse_split
from .intervals import RESAMPLES
from .mask_sensitivity import measure_sensitivity
from .region_classification import PROTOCOLS, classify_images, classify_regions
from .report import Result
from .retrieval_tasks import retrieve_images, retrieve_regions
from .scenes import measure_scenes

TASKS = (
    "region-classification",
    "region-retrieval",
    "image-text-retrieval",
    "long-text-retrieval",
    "referring",
    "zero-shot-classification",
    "mask-sensitivity",
    "scenes",
)
# Regions of a classification that the sensitivity to their prompts is measured on beside it.
SENSITIVITY_REGIONS = 100
# Published scripts do these; for the others there is nothing to repeat.
OFFICIAL_TASKS = ("region-classification", "image-text-retrieval", "long-text-retrieval", "referring")


def check_task(task: str, protocol: str | None = None) -> None:
    """
    Raises:
        ValueError: an unknown task or protocol, or `official` for a task that no published script does.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    names = ("corrected", "official", *PROTOCOLS)
    if protocol is not None and protocol not in names:
        raise ValueError(f"`protocol` must be one of {', '.join(names)}, got {protocol!r}.")
    if protocol == "official" and task not in OFFICIAL_TASKS:
        raise ValueError(f"`protocol` official is of {', '.join(OFFICIAL_TASKS)}, got it for {task}.")


def run_task(
    encoder: CachedEncoder,
    task: str,
    data_dir: str | Sequence[str],
    protocol: str | None = None,
    split: str | None = None,
    candidates: str = "objects",
    region_text: str = "caption",
    resamples: int = RESAMPLES,
    sensitivity_regions: int = SENSITIVITY_REGIONS,
) -> list[Result]:
    """Runs one task.

    Args:
        encoder: a [`CachedEncoder`].
        task: one of [`TASKS`].
        data_dir: a folder (see `image_sets.LAYOUTS`), `scenes:N:SEED`, or the words of any source, as in
            [`read_images`].
        protocol: `corrected`, `official` (of [`OFFICIAL_TASKS`]), or a name of `region_classification.PROTOCOLS`,
            which stands for `corrected` in every other task.
        split: of a dataset that has several.
        candidates: of `referring`: `"objects"` or `"detections"`.
        region_text: of `region-retrieval` and `mask-sensitivity`: field of the regions.
        resamples: of the bootstrap.
        sensitivity_regions: of `region-classification`: so many regions, the first ones, are looked at for
            `mask-sensitivity`; 0 leaves it out.

    Returns:
        A result, or two: `referring` adds the grounding head of a model that has one, `region-classification` of a
        model that takes prompts its sensitivity to them. A note says how many texts were cut, if any were.

    Raises:
        ValueError: as [`check_task`], or data that the task or protocol cannot use.
        FileNotFoundError: no data; the message shows how it must lie.
    """
    check_task(task, protocol)
    encoder.texts = encoder.cut_texts = 0
    options = protocol, split, candidates, region_text, resamples, sensitivity_regions
    results = _measure(encoder, task, data_dir, *options)
    if encoder.cut_texts:
        share = f"{100 * encoder.cut_texts / encoder.texts:.1f} %"
        note = (
            f"{encoder.cut_texts} of {encoder.texts} texts ({share}) were cut to {encoder.encoder.text_limit} tokens."
        )
        for result in results:
            result.notes.append(note)
    return results


def _measure(
    encoder: CachedEncoder,
    task: str,
    data_dir: str | Sequence[str],
    protocol: str | None,
    split: str | None,
    candidates: str,
    region_text: str,
    resamples: int,
    sensitivity_regions: int,
) -> list[Result]:
    if not isinstance(data_dir, str) and len(data_dir) == 1:
        (data_dir,) = data_dir
    if task == "scenes":
        refuse_split(split, data_dir, own="test")
        return [_scenes(encoder, data_dir, resamples)]
    if task != "region-classification" and protocol in PROTOCOLS:
        protocol = None
    in_folder = isinstance(data_dir, str)
    docci = task == "long-text-retrieval" and in_folder and Path(data_dir, DOCCI_FILE).is_file()
    if docci and protocol == "official" and split is None:
        # PixCLIP's DOCCI script takes the first thousand lines of the file, whatever their split.
        split = "all"
    data = read_images("region-classification" if task == "mask-sensitivity" else task, data_dir, split, candidates)
    if task == "region-classification":
        results = [classify_regions(encoder, data, protocol, resamples)]
        if sensitivity_regions and isinstance(encoder.encoder, RegionEncoder):
            results.append(measure_sensitivity(encoder, data, "category", sensitivity_regions, resamples))
        return results
    if task == "region-retrieval":
        return [retrieve_regions(encoder, data, region_text, resamples)]
    if task in ("image-text-retrieval", "long-text-retrieval"):
        return [retrieve_images(encoder, data, task, protocol, resamples)]
    if task == "mask-sensitivity":
        return [measure_sensitivity(encoder, data, region_text, resamples=resamples)]
    if task == "referring":
        results = [refer_by_similarity(encoder, data, protocol, resamples)]
        return results + ([refer_by_grounding(encoder, data, resamples)] if encoder.grounds else [])
    return [classify_images(encoder, data, resamples=resamples)]


def _scenes(encoder: CachedEncoder, data_dir: str, resamples: int) -> Result:
    """The demo's measures, on its two settings."""
    number, seed = parse_scenes(data_dir)
    if not isinstance(encoder.encoder, RegionEncoder):
        raise ValueError(
            "`scenes` measures CLOC and PixCLIP; for other models take region-classification or region-retrieval "
            f"with `--data_dir {data_dir}`."
        )
    metrics, intervals = {}, {}
    for setting, prefix in (("default", ""), ("hard", "hard_")):
        records = [make_scene(index, "test", seed, setting=setting) for index in range(number)]
        for found, all_found in zip(measure_scenes(encoder, records, resamples), (metrics, intervals), strict=True):
            all_found |= {prefix + name: value for name, value in found.items()}
    return Result("scenes", "scenes", f"seed {seed}", metrics, intervals, split="test")


class EvaluateTasks(TrainerCallback):
    """Runs tasks at every evaluation of a `Trainer` and adds their measures to its own, as `eval_<task>_<measure>`: in
    the log, in what `evaluate` returns, and for `metric_for_best_model`.

    Args:
        tasks: name -> data folder or `scenes:N:SEED`, as in [`run_task`].
        batch_size: images and texts at a time.
        options: further arguments of [`run_task`]; `resamples` and `sensitivity_regions` are 0 unless given.
    """

    def __init__(self, tasks: dict[str, str], batch_size: int = 32, **options: Any):
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"`tasks` must be among {', '.join(TASKS)}, got {', '.join(unknown)}.")
        for task in tasks:
            check_task(task, options.get("protocol"))
        self.tasks, self.batch_size = tasks, batch_size
        self.options = {"resamples": 0, "sensitivity_regions": 0, **options}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        training = model.training
        encoder = CachedEncoder(RegionEncoder(model, processing_class, self.batch_size), progress=False)
        measured = {}
        for task, data_dir in self.tasks.items():
            for result in run_task(encoder, task, data_dir, **self.options):
                name = result.task if result.protocol != "grounding-head" else f"{task}_grounding"
                for measure, value in result.metrics.items():
                    measured[f"eval_{name.replace('-', '_')}_{measure}"] = value
        model.train(training)
        metrics.update(measured)
        if state.log_history and state.is_world_process_zero:
            state.log_history[-1].update(measured)
