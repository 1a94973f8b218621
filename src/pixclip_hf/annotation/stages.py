"""What an annotation stage is, the columns that all stages share, and how a stage drops and counts what it drops.

A pipeline is a list of stages. A stage is called with a batch of columns (a dict of equally long lists, one row
per image) and returns such a dict with every column of the batch, those that it filled among them:

    @dataclass
    class Shout(RowStage):
        suffix: str = "!"

        name: ClassVar[str] = "shout"
        columns: ClassVar[dict[str, Any]] = {"loud": Value("string")}

        def fill(self, batch, rows):
            for row in rows:
                batch["loud"][row] = batch["alt_text"][row].upper() + self.suffix

- `__init__` is cheap and its result pickles; models, clients and the like are loaded on the first call, once per
  process.
- `repr(stage)` tells what its output depends on: a run continues only with the same stages. Batch sizes, time limits
  and numbers of workers stay out of it (`field(repr=False)`), and must not change what is written.
- What a stage draws at random comes from its seed and the row's `record_id` (`row_generator`), never from the order of
  calls. The rows of a batch must not influence each other.
- A stage puts a new value in place of an old one; it never changes a list or dict that it was given.
- A row with a `rejected_stage` is left alone (`RowStage` passes the others); no stage removes or reorders rows.
- An answer that can't be used ends in `reject` (the whole record) or `reject_region` (one region of it), with the
  reason and the raw answer. What a stage leaves out by design, such as a phrase on the stop list, is counted.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from datasets import Features, Image, List, Value

from ..outgoing import public_name
from ..record import record_features

Batch = dict[str, list]


class Stage(Protocol):
    """The shape of a stage. [`RowStage`] is the usual way to write one."""

    @property
    def name(self) -> str:
        """Its name in counts, rejections and the report."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """Feature types of the columns that it adds, None in every row until it is called."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows per call."""
        ...

    @property
    def num_gpus(self) -> float:
        """GPUs that Ray gives each of its actors when the cluster has enough."""
        ...

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch: ...


@dataclass
class RowStage:
    """The base of a stage that fills the rows that no stage before it has rejected. By default it adds no columns and
    needs no GPU.

    Args:
        batch_size: rows per call.

    Raises:
        ValueError: a batch size below 1.
    """

    batch_size: int = field(default=64, repr=False, kw_only=True)

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch_size")

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        if rows := active_rows(batch):
            self.fill(batch, rows)
        return batch

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        """Changes `rows` of the batch in place."""
        raise NotImplementedError


def pipeline_features(stages: Iterable[Stage]) -> Features:
    """The columns of every batch: those of a record, the state that all stages share, and what the stages add.

    - image: `{"bytes", "path"}`, encoded (`open_image` decodes it);
    - position: index of the item in its source; record_id: its name there, unique and the same in every run;
    - counts: `[{"name": "stage/what", "count"}]`, summed in the report;
    - steps: `[{"stage", "model", "version"}]`, what made the record, kept in the output;
    - rejected_stage, rejected_reason, raw_answer: None while the record is good;
    - rejected_regions: regions that were taken out of `regions`, with the same three values.
    """
    features = record_features()
    features["image"] = Image(decode=False)
    region = features["regions"].feature
    state = {
        "position": Value("int64"),
        "record_id": Value("string"),
        "counts": List({"name": Value("string"), "count": Value("int64")}),
        "steps": List({"stage": Value("string"), "model": Value("string"), "version": Value("string")}),
        "rejected_stage": Value("string"),
        "rejected_reason": Value("string"),
        "raw_answer": Value("string"),
        "rejected_regions": List(
            {
                "region": region,
                "rejected_stage": Value("string"),
                "rejected_reason": Value("string"),
                "raw_answer": Value("string"),
            }
        ),
    }
    features.update(state)
    for stage in stages:
        if taken := sorted(set(stage.columns) & set(features)):
            raise ValueError(f"Stage {stage.name!r} adds columns that exist already: {', '.join(taken)}.")
        features.update(stage.columns)
    return features


def check_at_least_one(owner: Any, *names: str) -> None:
    """Checks that counts are at least 1.

    Raises:
        ValueError: one is below 1.
    """
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(owner, name)}.")


def open_batch(batch: Mapping[str, Sequence]) -> Batch:
    """The columns of a batch as lists of its own, to be changed in place and returned."""
    return {name: list(values) for name, values in batch.items()}


def active_rows(batch: Batch) -> list[int]:
    """The rows that no stage has rejected."""
    return [row for row, stage in enumerate(batch["rejected_stage"]) if stage is None]


def reject(batch: Batch, row: int, stage: str, reason: str, raw_answer: str | None = None) -> None:
    """Takes a record out of the pipeline: it ends in `rejected/` with these values."""
    batch["rejected_stage"][row] = stage
    batch["rejected_reason"][row] = reason
    batch["raw_answer"][row] = raw_answer


def reject_region(
    batch: Batch, row: int, region_id: int, stage: str, reason: str, raw_answer: str | None = None
) -> None:
    """Takes one region out of its record. The record stays, with its other regions.

    Raises:
        ValueError: the record has no region of that id.
    """
    regions = batch["regions"][row]
    region = next((region for region in regions if region["id"] == region_id), None)
    if region is None:
        raise ValueError(f"`region_id` must be that of a region of {batch['record_id'][row]!r}, got {region_id}.")
    batch["regions"][row] = [other for other in regions if other["id"] != region_id]
    rejected = {"region": region, "rejected_stage": stage, "rejected_reason": reason, "raw_answer": raw_answer}
    batch["rejected_regions"][row] = [*(batch["rejected_regions"][row] or []), rejected]


def add_counts(batch: Batch, row: int, stage: str, counts: Mapping[str, int]) -> None:
    """Adds to the statistics of a row: `{"boxes": 3, "dropped: below the threshold": 2}`."""
    entries = [{"name": f"{stage}/{name}", "count": count} for name, count in counts.items() if count]
    batch["counts"][row] = [*(batch["counts"][row] or []), *entries]


def add_step(batch: Batch, row: int, stage: str, model: str, version: str | None = None) -> None:
    """Notes in the record what model, and what version of a prompt, made it."""
    step = {"stage": stage, "model": public_name(model), "version": version}
    batch["steps"][row] = [*(batch["steps"][row] or []), step]


def row_generator(seed: int, *keys: str | int) -> np.random.Generator:
    """Random numbers that depend on the seed and the keys (stage, `record_id`, …) alone."""
    digest = hashlib.sha256(repr((seed, keys)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def load_model(model_class: Any, name: str) -> Any:
    """A model of transformers for inference, in the precision of its weights, on the GPU where there is one.

    Args:
        model_class: an `AutoModelFor…`.
        name: folder or Hub id.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model_class.from_pretrained(name, dtype="auto").to(device).eval()
