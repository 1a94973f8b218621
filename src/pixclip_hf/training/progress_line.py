"""The progress of a training where the output is a file: one line, which grows."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """Prints `name: 10 % 20 % ... 100 %` on one line, and the loss at its end.

    Args:
        name: what is in progress.
        parts: how many times it says so.
    """

    def __init__(self, name: str, parts: int = 10):
        self.name, self.parts = name, parts
        self._shown, self._loss = 0, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(f"{self.name}:", end="", flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        part = state.global_step * self.parts // state.max_steps
        if state.is_world_process_zero and part > self._shown:
            self._shown = part
            print(f" {100 * part // self.parts} %", end="", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print("" if self._loss is None else f", loss {float(self._loss):.3f}", flush=True)


__all__ = ["ProgressLine"]
