"""Tasks that run during training."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...encoders.cached import CachedEncoder
from ...encoders.region_encoder import RegionEncoder
from .registry import TASKS, check_options, check_task, run_task

# Of `run_task`, beside the options of the tasks.
RUN_ARGUMENTS = ("protocol", "split", "resamples")


class EvaluateTasks(TrainerCallback):
    """Runs tasks at every evaluation of a `Trainer` and adds their measures to its own, as `eval_<task>_<measure>`: in
    the log, in what `evaluate` returns, and for `metric_for_best_model`.

    Args:
        tasks: name -> data folder or `scenes:N:SEED`, as in [`run_task`].
        batch_size: images and texts per pass.
        options: further arguments of [`run_task`]; `resamples` and `sensitivity_regions` are 0 unless given.

    Raises:
        ValueError: an unknown task, or a protocol that it does not know.
        TypeError: an option that no task has.
    """

    def __init__(self, tasks: dict[str, str], batch_size: int = 32, **options: Any):
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"`tasks` must be among {', '.join(TASKS)}, got {', '.join(unknown)}.")
        for task in tasks:
            check_task(task, options.get("protocol"))
        check_options({name: value for name, value in options.items() if name not in RUN_ARGUMENTS})
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
        encoder = CachedEncoder(RegionEncoder(model, processing_class), progress=False, batch_size=self.batch_size)
        measured = {}
        for task, data_dir in self.tasks.items():
            for result in run_task(encoder, task, data_dir, **self.options):
                name = result.task if result.protocol != "grounding-head" else f"{task}_grounding"
                for measure, value in result.metrics.items():
                    measured[f"eval_{name.replace('-', '_')}_{measure}"] = value
        model.train(training)
        if metrics is not None:
            metrics.update(measured)
        if state.log_history and state.is_world_process_zero:
            state.log_history[-1].update(measured)
