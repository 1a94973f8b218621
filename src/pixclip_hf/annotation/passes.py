"""Stages as passes over shards: a shard's rows go through them, and end in the tables of the run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from ..data.parquet_shards import write_parquet
from ..data.whole_files import read_unchanged, whole_file
from ..jobs import Shard, between_path
from ..jobs.folder import SIZES, file_sizes
from ..record import record_features, validate_record
from .stages import Batch, Stage, pipeline_features

_STAGE = "run"


def run_stages(stages: Sequence[Stage], positions: Iterable[int]) -> Dataset:
    """Runs stages in this process.

    Args:
        stages: the first of them fills the rows from their `position`.
        positions: positions in the source.

    Returns:
        A row for each position, those rejected among them.
    """
    features = pipeline_features(stages)
    columns = apply_stages(stages, _empty_columns(features, positions), features.arrow_schema)
    return _as_dataset(columns, features)


def apply_stages(stages: Sequence[Stage], columns: Batch, schema: pa.Schema) -> Batch:
    """The columns after the stages, with the values that the types of `schema` hold.

    A stage meets what the stages before it left as it would come back from disk (a score in float32, say), so that
    the output does not depend on where passes begin.
    """
    count = len(columns["position"])
    for stage in stages:
        parts = [
            stage({name: values[start : start + stage.batch_size] for name, values in columns.items()})
            for start in range(0, count, stage.batch_size)
        ]
        for field in schema:
            new = [value for part in parts for value in part[field.name]]
            before = columns[field.name]
            # Most stages fill one column or two. What they left alone has been through its type already.
            if len(new) != count or any(value is not old for value, old in zip(new, before, strict=True)):
                columns[field.name] = pa.array(new, field.type).to_pylist()
    return columns


def _as_dataset(columns: Batch, features: Features) -> Dataset:
    # Not `from_dict`, which looks at every value for something to encode; a fingerprint spares the hash of the rows.
    return Dataset(pa.table(columns, schema=features.arrow_schema), fingerprint="0" * 32)


def _empty_columns(features: Features, positions: Iterable[int]) -> Batch:
    positions = list(positions)
    return {name: positions if name == "position" else [None] * len(positions) for name in features}


@dataclass
class AnnotationPass:
    """Some neighboring stages of a run.

    Args:
        stages: what it runs.
        features: the columns of all stages of the run.
        output: folder of the run.
        number: its place among the passes.
        last: whether it writes the tables of the run, and not rows for the next pass.
    """

    stages: Sequence[Stage]
    features: Features
    output: Path
    number: int = 0
    last: bool = True

    @property
    def num_gpus(self) -> float:
        """What the most demanding of its stages needs."""
        return max((stage.num_gpus for stage in self.stages), default=0)

    def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        schema = self.features.arrow_schema
        for shard in shards:
            target = between_path(self.output, self.number, shard.number)
            if self.last:
                yield shard, write_shard(self.output, shard, apply_stages(self.stages, self._read(shard), schema))
            else:
                if not target.exists():
                    columns = apply_stages(self.stages, self._read(shard), schema)
                    with whole_file(target) as unfinished:
                        pq.write_table(pa.table(columns, schema=schema), unfinished, write_page_checksum=True)
                yield shard, {}

    def _read(self, shard: Shard) -> Batch:
        if self.number == 0:
            return _empty_columns(self.features, shard.positions)
        path = between_path(self.output, self.number - 1, shard.number)
        return read_unchanged(path, "pixclip-hf annotate").to_pydict()


def annotation_passes(stages: Sequence[Stage], output: Path, gpus: float = 0) -> list[AnnotationPass]:
    """The passes of a run.

    Args:
        stages: all stages, the source first.
        output: folder of the run.
        gpus: GPUs that stages get for themselves. Where there are some, each stage that asks for one is a pass. Stages
            in a row that need none share a process: one of its own each would cost more than it brings.
    """
    groups = [
        group
        for on_gpu, members in groupby(stages, lambda stage: bool(stage.num_gpus and gpus))
        for group in ([[stage] for stage in members] if on_gpu else [list(members)])
    ]
    features, last = pipeline_features(stages), len(groups) - 1
    return [AnnotationPass(group, features, output, number, number == last) for number, group in enumerate(groups)]


def output_features() -> Features:
    """The record schema, and `record_id` and `steps` of each record."""
    return Features({**record_features(), "record_id": Value("string"), "steps": _steps()})


def rejected_features() -> Features:
    """What is kept of a rejected record (`region` is None) or of a rejected region."""
    regions = record_features()["regions"]
    texts = ("record_id", "rejected_stage", "rejected_reason", "raw_answer", "alt_text")
    return Features(
        {
            **{name: Value("string") for name in texts},
            "position": Value("int64"),
            "captions": List(Value("string")),
            "region": regions.feature,
            "regions": regions,
            "steps": _steps(),
        }
    )


def _steps() -> Any:
    return List({"stage": Value("string"), "model": Value("string"), "version": Value("string")})


def write_shard(output: Path, shard: Shard, columns: Batch) -> dict[str, Any]:
    """Writes the tables of a shard, and returns its manifest.

    Raises:
        RuntimeError: the rows are not those of the shard's positions, each once.
    """
    accepted, rejected, counts = [], [], Counter()
    fields = list(record_features())
    if list(columns["position"]) != list(shard.positions):
        raise RuntimeError(
            f"Shard {shard.number} must hold the positions {shard.positions}, got {list(columns['position'])}."
        )
    for row in (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)):
        for entry in row["counts"] or ():
            counts[entry["name"]] += entry["count"]
        rejected += [
            {**region, "record_id": row["record_id"], "position": row["position"], "steps": row["steps"]}
            for region in row["rejected_regions"] or ()
        ]
        record = {name: row[name] for name in fields}
        stage, reason = row["rejected_stage"], row["rejected_reason"]
        if stage is None:
            stage, reason = _final_check(record)
        if stage is None:
            accepted.append({**record, "record_id": row["record_id"], "steps": row["steps"]})
        else:
            kept = {name: row[name] for name in ("record_id", "position", "raw_answer", "captions", "alt_text")}
            reasons = {"rejected_stage": stage, "rejected_reason": reason}
            rejected.append({**kept, **reasons, "regions": row["regions"], "steps": row["steps"]})
    tables = (
        (output / "data" / f"train-{shard.number:05d}.parquet", accepted, output_features()),
        (output / "rejected" / f"rejected-{shard.number:05d}.parquet", rejected, rejected_features()),
    )
    for table in tables:
        _write_table(*table)
    whole = [row for row in rejected if row.get("region") is None]
    return {
        "positions": [shard.start, shard.stop],
        "records": len(accepted),
        "regions": sum(len(record["regions"]) for record in accepted),
        "rejected_records": _reasons(whole),
        "rejected_regions": _reasons(row for row in rejected if row.get("region") is not None),
        "counts": dict(sorted(counts.items())),
        SIZES: file_sizes(output, [path for path, *_ in tables]),
    }


def _final_check(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """(stage, reason) of a record that can't go into the dataset, else two None."""
    if not record["regions"]:
        return _STAGE, "no region left"
    try:
        validate_record(record)
    except (TypeError, ValueError) as error:
        return _STAGE, f"not in the record schema: {error}"
    return None, None


def _reasons(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(f"{row['rejected_stage']}/{row['rejected_reason']}" for row in rows).items()))


def _write_table(path: Path, rows: Sequence[dict[str, Any]], features: Features) -> None:
    with whole_file(path) as unfinished:
        write_parquet(unfinished, rows, features)
