"""Two ways to run stages over shards: `datasets.Dataset.map` in this process, and `ray.data` with actors."""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

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
        workers: actors of each group of stages with Ray, each with its own copy of a model. A stage that asks for a
            GPU has actors of its own where the cluster has one; where they are more than GPUs, they share them. The
            local engine has no workers.

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
    for shard, positions in shards.items():
        rows = Dataset.from_dict(_empty_rows(features, positions), features=features)
        for number, stage in enumerate(stages):
            rows = rows.map(
                stage,
                batched=True,
                batch_size=stage.batch_size,
                features=features,
                # Spares the hash of a stage with its model; nothing is cached.
                new_fingerprint=f"{shard:032x}{number:032x}",
            )
        yield shard, rows


class _Actor:
    """Stages as Ray calls them: columns as lists, and back in the types that they had."""

    def __init__(self, stages: Sequence[Stage], schema: pa.Schema):
        self.stages, self.schema = stages, schema

    def __call__(self, table: pa.Table) -> pa.Table:
        for stage in self.stages:
            parts = [
                stage(table.slice(start, stage.batch_size).to_pydict())
                for start in range(0, table.num_rows, stage.batch_size)
            ]
            columns = ([value for part in parts for value in part[name]] for name in self.schema.names)
            # Through the types after every stage, as with `Dataset.map`: the next one meets the same rounded numbers.
            arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
            table = pa.table(arrays, schema=self.schema)
        return table


def gpu_shares(wanted: Sequence[float], workers: int, gpus: float) -> list[float]:
    """GPUs of an actor of each group: what it wants, or where they don't all fit the cluster, a part that lets them.

    Without room for all, a group would wait until the one before it is through with every shard.
    """
    if workers * sum(wanted) <= gpus:
        return list(wanted)
    actors_on_one = math.ceil(workers * sum(want > 0 for want in wanted) / gpus)
    # Ray counts in ten-thousandths.
    return [min(want, 10_000 // actors_on_one / 10_000) for want in wanted]


def _run_ray(
    stages: Sequence[Stage], features: Features, shards: Shards, workers: int
) -> Iterator[tuple[int, Dataset]]:
    import ray

    if not ray.is_initialized():
        ray.init(logging_level="WARNING")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    schema = features.arrow_schema
    tables = [pa.table(_empty_rows(features, positions), schema=schema) for positions in shards.values()]
    rows = ray.data.from_arrow(tables)
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    # Stages in a row that need no GPU share an actor: a process of its own each would cost more than it brings.
    groups = [
        group
        for on_gpu, members in groupby(stages, lambda stage: bool(stage.num_gpus and gpus))
        for group in ([[stage] for stage in members] if on_gpu else [list(members)])
    ]
    shares = gpu_shares([group[0].num_gpus if gpus else 0 for group in groups], workers, gpus)
    for group, share in zip(groups, shares, strict=True):
        rows = rows.map_batches(
            _Actor,
            fn_constructor_args=(group, schema),
            batch_format="pyarrow",
            batch_size=max(stage.batch_size for stage in group),
            compute=ray.data.ActorPoolStrategy(size=workers),
            # All actors live from start to end: together they must fit the cluster.
            num_cpus=min(1, cpus / (workers * (len(groups) + 1))),
            num_gpus=share,
        )
    numbers = sorted(shards, key=lambda shard: shards[shard].start)
    starts = [shards[shard].start for shard in numbers]
    waiting: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
    for table in rows.iter_batches(batch_format="pyarrow", batch_size=None):
        for row in table.to_pylist():
            shard = numbers[bisect_right(starts, row["position"]) - 1]
            waiting[shard].append(row)
            if len(waiting[shard]) == len(shards[shard]):
                done = sorted(waiting.pop(shard), key=lambda row: row["position"])
                yield shard, Dataset.from_list(done, features=features)
