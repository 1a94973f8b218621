"""Two ways to run stages over shards: `datasets.Dataset.map` in this process, and `ray.data` with an actor a stage."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled

from .stages import Stage, pipeline_features

ENGINES = ("local", "ray")
Shards = Mapping[int, range]


def run_stages(
    engine: str, stages: Sequence[Stage], shards: Shards, workers: int = 1
) -> Iterator[tuple[int, Dataset]]:
    """Runs stages over shards and yields each shard when it is done.

    Args:
        engine: `"local"` or `"ray"`.
        stages: the first of them fills the rows from their `position`.
        shards: number of a shard -> positions in the source.
        workers: actors of each stage with Ray, each with the stage's own copy of its model; the local engine has one.

    Yields:
        The number of a shard and its rows, those rejected among them, in the order of their positions. Ray may finish
        shards in another order than they were given in.

    Raises:
        ValueError: an unknown engine, or no worker.
        ModuleNotFoundError: the Ray engine without Ray (`pip install pixclip-hf[ray]`).
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    features = pipeline_features(stages)
    if engine == "ray":
        return _run_ray(stages, features, shards, workers)
    return _run_local(stages, features, shards)


def _empty_rows(features: Features, positions: Iterable[int]) -> dict[str, list]:
    positions = list(positions)
    return {name: positions if name == "position" else [None] * len(positions) for name in features}


def _run_local(stages: Sequence[Stage], features: Features, shards: Shards) -> Iterator[tuple[int, Dataset]]:
    bars_shown = not are_progress_bars_disabled()
    for shard, positions in shards.items():
        rows = Dataset.from_dict(_empty_rows(features, positions), features=features)
        disable_progress_bars()  # a bar a shard and stage is too many
        try:
            for number, stage in enumerate(stages):
                rows = rows.map(
                    stage,
                    batched=True,
                    batch_size=stage.batch_size,
                    features=features,
                    # Spares the hash of a stage with its model; nothing is cached.
                    new_fingerprint=f"{shard:032x}{number:032x}",
                )
        finally:
            if bars_shown:
                enable_progress_bars()
        yield shard, rows


class _ArrowStage:
    """A stage as Ray calls it: columns as lists, and back in the types that they had."""

    def __init__(self, stage: Stage, schema: pa.Schema):
        self.stage, self.schema = stage, schema

    def __call__(self, table: pa.Table) -> pa.Table:
        batch = self.stage(table.to_pydict())
        return pa.table([pa.array(batch[field.name], field.type) for field in self.schema], schema=self.schema)


def _run_ray(
    stages: Sequence[Stage], features: Features, shards: Shards, workers: int
) -> Iterator[tuple[int, Dataset]]:
    import ray

    if not ray.is_initialized():
        ray.init()
    schema = features.arrow_schema
    numbers = sorted(shards, key=lambda shard: shards[shard].start)
    starts = [shards[shard].start for shard in numbers]
    tables = [pa.table(_empty_rows(features, positions), schema=schema) for positions in shards.values()]
    rows = ray.data.from_arrow(tables)
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    for stage in stages:
        rows = rows.map_batches(
            _ArrowStage,
            fn_constructor_args=(stage, schema),
            batch_format="pyarrow",
            batch_size=stage.batch_size,
            concurrency=workers,
            # Every stage has its actors from start to end: together they must fit the cluster.
            num_cpus=min(1, cpus / (workers * (len(stages) + 1))),
            num_gpus=stage.num_gpus if gpus else 0,
        )
    waiting: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
    for table in rows.iter_batches(batch_format="pyarrow", batch_size=None):
        for row in table.to_pylist():
            shard = numbers[bisect_right(starts, row["position"]) - 1]
            waiting[shard].append(row)
            if len(waiting[shard]) == len(shards[shard]):
                done = sorted(waiting.pop(shard), key=lambda row: row["position"])
                yield shard, Dataset.from_list(done, features=features)
