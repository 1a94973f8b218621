"""A `Trainer` for both models: gathers what the contrastive losses compare, logs their parts, measures retrieval."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, has_length
from transformers.utils import logging

from ..data.collator import RegionCollator, RegionDataset, sample_key
from ..data.skipping import ReadableRecords
from ..data.streaming import RecordStream, StreamLoader
from ..data.whole_files import whole_files, write_json
from ..evaluation.retrieval import retrieval_recall
from ..modeling.modeling_outputs import set_losses
from .checkpoints import (
    ImagesPerStep,
    agreed,
    begin_checkpoint,
    checkpoint_fault,
    finish_checkpoint,
    last_checkpoint,
    only_training,
    rotate_checkpoints,
)
from .distillation import distillation_loss, frozen_copy
from .gradient_cache import cached_backward
from .length_sampler import EpochLengthSampler
from .muon import MuonAdamW
from .sharding import check_shardable, scalars_to_vectors, vectors_to_scalars
from .throughput import Throughput

logger = logging.get_logger(__name__)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, `(N, ...)`, and the index of this rank's first row among them.

    Ranks may hold different numbers of rows. Gradients flow back to the rank that a row came from.
    """
    lengths = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    counts = [int(length) for length in lengths]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    if rows.is_floating_point():
        parts = all_gather(padded.contiguous())
    else:
        # Not every backend moves bools.
        moved = padded.to(torch.uint8) if rows.dtype == torch.bool else padded
        parts = [torch.empty_like(moved) for _ in counts]
        dist.all_gather(parts, moved.contiguous())
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered.to(rows.dtype), sum(counts[: dist.get_rank()])


def _readable(records: Any) -> Any:
    return ReadableRecords(records) if has_length(records) and hasattr(records, "__getitem__") else records


class SetEpoch(TrainerCallback):
    """Tells a [`RegionDataset`] its epoch. accelerate's data loader does not when it is sharded over ranks or resumes
    inside an epoch."""

    def __init__(self, records: RegionDataset):
        self.records = records

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.records.set_epoch(int(state.epoch or 0))


class SetStreamEpoch(TrainerCallback):
    """Logs as the epoch of a stream the share of `max_steps` that is done: a pass has no known length, and `Trainer`
    starts again from 0 when it resumes."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = state.global_step / state.max_steps


class KeyedCollator:
    """Adds to the batches of a collator the keys of their records, which no model takes."""

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collator(records), "sample_keys": [sample_key(record) for record in records]}


def any_batch(collator: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """The collator, for batches of records that have nothing to learn from too: all records were looked at before."""
    if isinstance(collator, RegionCollator):
        collator = copy(collator)
        collator.allow_nothing = True
    return collator


class RegionTrainer(Trainer):
    """[`Trainer`] for [`CLOCModel`] and [`PixCLIPModel`].

    - The contrastive losses see the regions, images and texts of every rank.
    - Each part of the loss is logged beside the sum, as `loss_<part>` (`eval_loss_<part>` in an evaluation).
    - Images, regions and text tokens per second are logged too, over all ranks.
    - A [`RecordStream`] as training set is divided among ranks and workers, and resumes where it stopped.
    - An evaluation reports region-text retrieval over the whole set, `eval_region_to_text_recall@1` and
      `eval_text_to_region_recall@1`; regions with the same text count as right for each other.
    - `train_sampling_strategy="group_by_length"` puts records whose texts have similar lengths into a batch.
    - A loss that is not finite stops the training and names the records of its batch.
    - Records that lack captions or regions train on what they have. A part of the loss is logged as the mean over the
      steps that have it; `images_without_text` counts images that had neither.
    - A run resumes over another number of processes if its steps take as many images as before.
    - A run that has taken all of its steps trains nothing when it is started again, and says so.
    - Checkpoints list their files with checksums: one that is damaged is not resumed from.
    - One training at a time writes to `output_dir`.

    Takes the arguments of `Trainer`; `data_collator` is a [`RegionCollator`]. Columns are kept, since the collator
    reads them, and the training set is wrapped in a [`RegionDataset`].

    Args:
        gradient_cache_chunks: number of parts in which a batch passes through the model. The loss and the gradients
            are those of the whole batch, and only the activations of one part are in memory (see [`cached_backward`]).
        distillation_weight: weight of a part of the loss, `distillation`, that keeps whole images and their captions
            near where the model embeds them as it is given here (see [`distillation_loss`]). A copy of what trains
            stays in memory; 0 does without.

    Raises:
        ValueError: `push_to_hub`, for which there is `pixclip_hf.publish`; fewer than one chunk, or several with
            DeepSpeed; a negative weight; Muon or distillation with FSDP or DeepSpeed; several GPUs in one process; in
            training, fewer records than processes, a checkpoint that is damaged or whose steps took another number of
            images, an output folder that another training writes to, or records none of which has anything to learn
            from.
        FloatingPointError: in training, a loss that is not finite.
    """

    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, gradient_cache_chunks: int = 1, distillation_weight: float = 0.0, **kwargs: Any):
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        if arguments is not None and arguments.push_to_hub:
            raise ValueError(
                "`push_to_hub` would upload the output folder as it is, with the paths of this machine in it. "
                "`pixclip_hf.publish` and `pixclip-hf publish` push a trained model."
            )
        # `Trainer` would expect every parameter to be used once a tower recomputes its activations; without captions,
        # or with a tower's own pooler, some are not. Recomputation that is not reentrant goes with unused parameters.
        if arguments is not None and arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = True
        super().__init__(*args, **kwargs)
        if gradient_cache_chunks < 1:
            raise ValueError(f"`gradient_cache_chunks` must be at least 1, got {gradient_cache_chunks}.")
        if gradient_cache_chunks > 1 and self.is_deepspeed_enabled:
            raise ValueError(
                f"`gradient_cache_chunks` must be 1 with DeepSpeed, whose engine reduces the gradients of every "
                f"backward pass, got {gradient_cache_chunks}."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process drives {self.args.n_gpu} GPUs, where each would have its own negatives. Start one "
                "process per GPU by `accelerate launch` or `torchrun`, or use one alone with `CUDA_VISIBLE_DEVICES=0`."
            )
        self.gradient_cache_chunks = gradient_cache_chunks
        if not distillation_weight >= 0:
            raise ValueError(f"`distillation_weight` must not be negative, got {distillation_weight}.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if self.optimizer_cls_and_kwargs and self.optimizer_cls_and_kwargs[0] is MuonAdamW:
                raise ValueError("`muon` must be empty with FSDP or DeepSpeed: it steps along whole matrices.")
            if distillation_weight:
                raise ValueError(
                    "`distillation_weight` must be 0 with FSDP or DeepSpeed, which have no whole copy of the model, "
                    f"got {distillation_weight}."
                )
        self.distillation_weight = distillation_weight
        self._teacher = frozen_copy(self.model).to(self.args.device) if distillation_weight else None
        if self.is_fsdp_enabled:
            check_shardable(self.model)
        self._scalars = scalars_to_vectors(self.model) if self.accelerator.is_fsdp2 else set()
        images = self.args.train_batch_size * self.args.world_size
        if self.args.gradient_accumulation_steps > 1:
            logger.warning(
                f"`gradient_accumulation_steps={self.args.gradient_accumulation_steps}` changes the contrastive "
                f"losses: each of its batches of {images} images has only its own negatives. A larger "
                "`per_device_train_batch_size` with `gradient_cache_chunks` has them all in the memory of one part."
            )
        if images == 1:
            logger.warning("A batch of one image has no negatives for its caption: that part of the loss is always 0.")
        self.resumed_step = 0
        """The step that the last training began behind."""
        self._most_checkpoints = self.args.save_total_limit
        self.add_callback(ImagesPerStep(images * self.args.gradient_accumulation_steps))
        self._sample_keys: list[Any] = []
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        if self.train_dataset is not None and not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            self.train_dataset = RegionDataset(self.train_dataset)
            self.add_callback(SetEpoch(self.train_dataset))
        evaluated: Any = self.eval_dataset  # type: ignore[has-type]
        if isinstance(evaluated, dict):
            self.eval_dataset = {name: _readable(records) for name, records in evaluated.items()}
        elif evaluated is not None:
            self.eval_dataset = _readable(evaluated)
        self._stream: StreamLoader | None = None
        if isinstance(self.train_dataset, RecordStream):
            # The stream continues from its own position; Trainer would read again what it skips.
            self.args.ignore_data_skip = True
            self.add_callback(SetStreamEpoch())
        self._throughput = Throughput()
        self._region_collator = self.data_collator
        # Each part with the number of its rows and its weight in the mean: as in `Trainer`, a step counts once, an
        # evaluated image counts once.
        self._parts: dict[str, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
        self._eval_parts: dict[str, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
        self._eval_rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length" and dataset is not None
        if not grouped or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        return self._length_sampler(dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        grouped = self.args.train_sampling_strategy == "group_by_length" and eval_dataset is not None
        if not grouped or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return self._length_sampler(eval_dataset, self.args.eval_batch_size)

    def _length_sampler(self, dataset: Any, batch_size: int) -> EpochLengthSampler:
        lengths = self._region_collator.text_lengths(getattr(dataset, "records", dataset))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(batch_size, lengths=lengths, seed=seed)

    def get_train_dataloader(self) -> Any:
        """The loader of `Trainer`, or of a [`RecordStream`]; its batches carry the keys of their records."""
        if isinstance(self.train_dataset, RegionDataset) and len(self.train_dataset) < self.args.world_size:
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset)} records for {self.args.world_size} processes: each "
                "needs one of its own."
            )
        if isinstance(self.train_dataset, RegionDataset) and isinstance(self.data_collator, RegionCollator):
            self.data_collator.check(self.train_dataset.records, "train_dataset")
        collator, self.data_collator = self.data_collator, KeyedCollator(any_batch(self.data_collator))
        try:
            if isinstance(self.train_dataset, RecordStream):
                self._stream = self._stream_loader()
                return self._stream
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of `Trainer`, over records some of which have something to evaluate."""
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(records, str):
            records = self.eval_dataset[records]
        if isinstance(self.data_collator, RegionCollator) and has_length(records):
            self.data_collator.check(records, "eval_dataset")
        collator, self.data_collator = self.data_collator, any_batch(self.data_collator)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _stream_loader(self) -> StreamLoader:
        return StreamLoader(
            self.train_dataset,
            self.data_collator,
            self._train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            num_workers=self.args.dataloader_num_workers,
            region_collator=self._region_collator if isinstance(self._region_collator, RegionCollator) else None,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The training of `Trainer`, as the only one in `output_dir` and from a checkpoint that is whole.

        Args:
            resume_from_checkpoint: as in `Trainer`; True takes the latest whole checkpoint of `output_dir`.
            args, kwargs: as in `Trainer`.
        """
        with only_training(self.args):
            if isinstance(self.train_dataset, RecordStream) and isinstance(resume_from_checkpoint, str):
                self._check_place(resume_from_checkpoint)
            checkpoint = self._whole_checkpoint(resume_from_checkpoint)
            self.resumed_step = 0
            if checkpoint is not None:
                state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
                self.resumed_step = state.global_step
            # `Trainer` would delete checkpoints by the clock, before a new one is whole, and at the end of a run that
            # keeps its best model the last one, which tells that the run is done.
            self._most_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                self.args.save_total_limit = self._most_checkpoints
            if self.trained_nothing:
                steps = self.state.global_step
                early = "" if steps >= self.state.max_steps else " and stopped early"
                logger.warning(
                    f"The run in {self.args.output_dir!r} is done: it has taken {steps} steps{early}. Nothing is "
                    "trained. `max_steps` or `num_train_epochs` make it longer, another `output_dir` begins a new one."
                )
            return output

    @property
    def trained_nothing(self) -> bool:
        """Whether the last training found that all steps had been taken before."""
        return bool(self.resumed_step) and self.state.global_step == self.resumed_step

    def _whole_checkpoint(self, asked: str | bool | None) -> str | None:
        found, fault = None, None
        if asked and self.args.process_index == 0:
            found = last_checkpoint(self.args.output_dir) if asked is True else str(asked)
            if found is None:
                fault = f"`resume_from_checkpoint` needs a checkpoint in {self.args.output_dir!r}, got none."
            elif asked is not True and (why := checkpoint_fault(found)) is not None:
                fault = f"The checkpoint {found!r} {why}."
        found, fault = agreed((found, fault), self.args)
        if fault is not None:
            raise ValueError(fault)
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks at what is left to do behind a step only.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, run = self.state.global_step, Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder)
            rotate_checkpoints(run, step, self._most_checkpoints, self.state.best_model_checkpoint)

    # The position of a stream is saved and found with the random state: each rank has its own.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._stream is not None:
            write_json(self._stream_file(output_dir), self._stream.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._stream is not None and checkpoint is not None:
            self._check_place(checkpoint)
            place = self._stream_file(checkpoint).read_text(encoding="utf-8")
            self._stream.load_state_dict(json.loads(place))

    def _check_place(self, checkpoint: str) -> None:
        if Path(checkpoint).is_dir() and not self._stream_file(checkpoint).exists():
            raise ValueError(
                f"{checkpoint!r} holds no position of the stream for rank {self.args.process_index}: it was "
                "written without a stream, or by fewer ranks."
            )

    def _stream_file(self, folder: str) -> Path:
        return Path(folder, f"stream_{self.args.process_index}.json")

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The step of `Trainer`, or the one of a cached batch; counts the batch."""
        self._throughput.count(inputs)
        self._sample_keys = inputs.pop("sample_keys", [])
        if self.gradient_cache_chunks == 1:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        loss, outputs = cached_backward(
            model,
            self.accelerator.unwrap_model(model),
            self._prepare_inputs(inputs),
            self.gradient_cache_chunks,
            self._set_loss,
            lambda loss: self.accelerator.backward(loss / self.current_gradient_accumulation_steps),
            partial(self.accelerator.no_sync, model),
        )
        self._keep_parts(self._parts, outputs, weight=1)
        return loss / self.current_gradient_accumulation_steps

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the model's loss parts, over the rows of all ranks."""
        if self.args.world_size > 1 or self._teacher is not None:
            outputs = self._forward_with_loss(model, inputs)
        else:
            outputs = model(**{**inputs, "return_loss": True})
        if model.training:
            self._stop_unless_finite(outputs)
            self._keep_parts(self._parts, outputs, weight=1)
        else:
            self._keep_parts(self._eval_parts, outputs, weight=len(inputs["pixel_values"]))
            if outputs.region_text_embeds is not None:
                self._collect(outputs, inputs.get("region_attention_mask"))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _forward_with_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        # A hook, so that the loss belongs to the forward pass: DistributedDataParallel takes a parameter that only
        # the loss uses (the temperature) for unused, if the loss is computed behind it. The first hook, since that of
        # FSDP puts the parameters back into shards.
        hook = self.accelerator.unwrap_model(model).register_forward_hook(
            lambda module, args, kwargs, outputs: self._set_gathered_loss(module, outputs, kwargs),
            with_kwargs=True,
            prepend=True,
        )
        try:
            return model(**{**inputs, "return_loss": False})
        finally:
            hook.remove()

    def _set_gathered_loss(self, module: Any, outputs: Any, inputs: Mapping[str, Any]) -> None:
        over_ranks = (gather_rows, self.args.world_size) if self.args.world_size > 1 else ()
        regions = module.loss_regions(
            *(inputs.get(name) for name in ("region_boxes", "region_masks", "spatial_shapes"))
        )
        parts = module.compute_loss(outputs, regions, inputs.get("region_attention_mask"), *over_ranks)
        weights = module.loss_weights()
        # Not in an evaluation, whose loss says how good a model is and not how near to another.
        if self._teacher is not None and module.training and outputs.image_embeds is not None:
            with self.accelerator.autocast():
                parts["distillation"] = distillation_loss(self._teacher, outputs, inputs, *over_ranks)
            weights = {**weights, "distillation": self.distillation_weight}
        set_losses(outputs, parts, weights)

    def _set_loss(self, module: Any, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        self._set_gathered_loss(module, outputs, inputs)
        self._stop_unless_finite(outputs)
        return outputs.loss

    def _stop_unless_finite(self, outputs: Any) -> None:
        if outputs.loss.isfinite():
            return
        rows = [outputs[name] for name in outputs.representations() if outputs.get(name) is not None]
        bad = sum(~row.detach().isfinite().flatten(1).all(1) for row in rows if row.is_floating_point())
        named = [key for key, flag in zip(self._sample_keys, bad.tolist(), strict=False) if flag]
        raise FloatingPointError(
            f"The loss of step {self.state.global_step + 1} is {outputs.loss.item()}. Records of the batch, by epoch "
            f"and index in `train_dataset`: {self._sample_keys}; embeddings that are not finite: {named or 'none'}; "
            f"parts: { {name: part.item() for name, part in outputs.loss_parts.items()} }."
        )

    def _stop_if_nothing_is_learned(self, why: str | None) -> None:
        """Ranks stop together: as long as one of them learns, the run goes on."""
        if int(self._sum_over_ranks(torch.tensor(int(why is not None)))) == self.args.world_size:
            raise ValueError(f"Nothing can be learned from the records of the stream. {why}")

    def _keep_parts(self, collected: dict[str, list[tuple[Tensor, Tensor, int]]], outputs: Any, weight: int) -> None:
        for name, part in outputs.loss_parts.items():
            if name == "distillation":
                rows = outputs.image_embeds.detach().any(-1)
            else:
                # Padding has no identity. All other parts are about regions and their texts.
                rows = (outputs.text_ids if name == "image_text" else outputs.region_text_ids) != 0
            collected[name].append((part.detach(), rows.sum(), weight))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state_dict = state_dict and vectors_to_scalars(state_dict, self._scalars)
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        with whole_files(folder) as unfinished:
            if (folder / "README.md").is_file():  # PEFT adds to the card that it finds
                shutil.copyfile(folder / "README.md", unfinished / "README.md")
            super()._save(str(unfinished), state_dict)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss part and the throughput since the last log."""
        if "train_runtime" in logs and self.trained_nothing:
            return  # of no step: there is no loss to tell
        if "loss" in logs:
            logs.update(self._mean_parts(self._parts, "loss_"))
            logs.update(self._throughput.rates(self._sum_over_ranks))
            if self._stream is not None:
                logs["corrupt_records"] = int(self._sum_over_ranks(torch.tensor(self._stream.corrupt)))
                logs["left_out_parts"] = int(self._sum_over_ranks(torch.tensor(self._stream.left_out)))
        if self._stream is not None and ("loss" in logs or "train_runtime" in logs):
            self._stop_if_nothing_is_learned(self._stream.why_nothing(ended="train_runtime" in logs))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The evaluation of `Trainer` with the loss parts and the retrieval between regions and their texts."""
        self._eval_parts.clear()
        self._eval_rows.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._mean_parts(self._eval_parts, f"{metric_key_prefix}_loss_"))
        if self._eval_rows:
            regions, texts, ids = (torch.cat(columns) for columns in zip(*self._eval_rows, strict=True))
            if self.args.world_size > 1:
                regions, texts, ids = (gather_rows(rows.to(self.args.device))[0] for rows in (regions, texts, ids))
            if len(ids):
                forth, back = retrieval_recall(regions, texts, ids)
                output.metrics[f"{metric_key_prefix}_region_to_text_recall@1"] = forth
                output.metrics[f"{metric_key_prefix}_text_to_region_recall@1"] = back
        self._eval_rows.clear()
        return output

    def _collect(self, outputs: Any, attention_mask: Tensor | None) -> None:
        real = outputs.region_text_ids != 0 if attention_mask is None else attention_mask.bool()
        state = self.accelerator.gradient_state
        if self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            # The ranks' last batches are filled up with records that were seen before.
            places = torch.arange(len(real), device=real.device) + self.args.process_index * len(real)
            real = real & (places < state.remainder)[:, None]
        rows = (outputs.region_embeds, outputs.region_text_embeds, outputs.region_text_ids)
        self._eval_rows.append(tuple(row[real].detach().cpu() for row in rows))

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        return self.accelerator.reduce(counts.to(self.args.device)) if self.args.world_size > 1 else counts

    def _mean_parts(self, collected: dict[str, list[tuple[Tensor, Tensor, int]]], prefix: str) -> dict[str, float]:
        """The mean of each part over the batches that have rows of it, on any rank."""
        means = {}
        for name, parts in sorted(collected.items()):
            rows = self._sum_over_ranks(torch.stack([count for _, count, _ in parts])).tolist()
            kept = [(part, weight) for (part, _, weight), count in zip(parts, rows, strict=True) if count]
            kept = kept or [(part, weight) for part, _, weight in parts]  # zeros
            mean: Any = sum(part * weight for part, weight in kept) / sum(weight for _, weight in kept)
            if self.args.world_size > 1:
                mean = self.accelerator.reduce(mean, "mean")
            means[prefix + name] = mean.item()
        collected.clear()
        return means
