"""Ends a training whose evaluations no longer improve."""

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import EarlyStoppingArguments


class ResumedEarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count of evaluations without improvement continues where a checkpoint left it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                control.should_training_stop = True  # it has stopped already


def early_stopping(arguments: EarlyStoppingArguments, training: TrainingArguments) -> list[TrainerCallback]:
    """The callback that the arguments ask for, if any.

    Raises:
        ValueError: early stopping without evaluations to judge by, or without the best model to end with.
    """
    patience = arguments.early_stopping_patience
    if patience is None:
        return []
    if training.eval_strategy == "no":
        raise ValueError(
            f"`early_stopping_patience` {patience} needs evaluations while training: `--eval_strategy steps` or "
            "`epoch`, got 'no'."
        )
    if not training.load_best_model_at_end:
        raise ValueError(
            f"`early_stopping_patience` {patience} needs `--load_best_model_at_end` and, where the loss is not what "
            "decides, `--metric_for_best_model`: the last model is not the best one."
        )
    return [ResumedEarlyStopping(patience, arguments.early_stopping_threshold)]
