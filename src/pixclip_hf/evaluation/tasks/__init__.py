"""The tasks of the evaluation, one file per task, and the registry that names them."""

from .base import Option, Task
from .callback import EvaluateTasks
from .registry import OPTIONS, PROTOCOLS, TASKS, check_options, check_task, draw_task, run_task

__all__ = [
    "OPTIONS",
    "PROTOCOLS",
    "TASKS",
    "EvaluateTasks",
    "Option",
    "Task",
    "check_options",
    "check_task",
    "draw_task",
    "run_task",
]
