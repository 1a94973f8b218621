"""Passes in actors of Ray: one row of a `ray.data` dataset is a shard's description, and manifests come back.

Every pass is a `map_batches` of the dataset with actors of its own, so that a shard is in the second pass while the
first works on the next one. All machines must see the folder of the run under the same path.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .folder import manifest_path
from .passes import Done, Pass, work
from .plan import Plan, Shard

# Blocks of the dataset. With more shards than this, a block holds several.
_MOST_BLOCKS = 10_000


class _Actor:
    """A pass as Ray calls it: with the descriptions of some shards, to be yielded when they are done."""

    def __init__(self, pass_: Pass, output: Path, finish: bool):
        self.pass_, self.output, self.finish = pass_, output, finish

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        columns = (batch[name].tolist() for name in ("number", "start", "stop"))
        shards = []
        for shard in map(Shard, *columns):
            # Ray calls an actor's tasks again when it dies; what it had finished by then is done.
            if (path := manifest_path(self.output, shard.number)).exists():
                yield _row(shard, json.loads(path.read_text(encoding="utf-8")))
            else:
                shards.append(shard)
        for shard, manifest in work([self.pass_], self.output, iter(shards), self.finish):
            yield _row(shard, manifest)


def _row(shard: Shard, manifest: dict[str, Any]) -> dict[str, Any]:
    numbers = {"number": shard.number, "start": shard.start, "stop": shard.stop}
    row = {name: np.array([value]) for name, value in numbers.items()}
    return {**row, "manifest": np.array([json.dumps(manifest)])}


def gpu_shares(wanted: Sequence[float], workers: int, gpus: float) -> list[float]:
    """GPUs of an actor of each pass: what it wants, or where they don't all fit the cluster, a part that lets them.

    Without room for all, a pass would wait until the one before it is through with every shard.
    """
    if workers * sum(wanted) <= gpus:
        return list(wanted)
    actors_on_one = math.ceil(workers * sum(want > 0 for want in wanted) / gpus)
    # Ray counts in ten-thousandths.
    return [min(want, 10_000 // actors_on_one / 10_000) for want in wanted]


def start_ray() -> dict[str, float]:
    """Connects to a cluster, or starts one on this machine; returns its resources.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    import ray

    if not ray.is_initialized():
        ray.init(logging_level="WARNING", include_dashboard=False)
    return ray.cluster_resources()


def run_ray(passes: Sequence[Pass], output: Path, plan: Plan, numbers: np.ndarray, workers: int) -> Iterator[Done]:
    """Runs passes over the shards of these numbers, and yields each with its manifest when it is done."""
    resources = start_ray()
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    output = output.absolute()
    per_block = math.ceil(len(numbers) / _MOST_BLOCKS)
    columns = {"number": numbers, "start": plan.bounds[numbers], "stop": plan.bounds[numbers + 1]}
    whole = pa.table(columns)
    rows = ray.data.from_arrow([whole.slice(at, per_block) for at in range(0, len(numbers), per_block)])
    cpus, gpus = (resources.get(kind, 0) for kind in ("CPU", "GPU"))
    shares = gpu_shares([each.num_gpus if gpus else 0 for each in passes], workers, gpus)
    for each, share in zip(passes, shares, strict=True):
        rows = rows.map_batches(
            _Actor,
            fn_constructor_args=(each, output, each is passes[-1]),
            batch_size=per_block,
            batch_format="numpy",
            # A shard ahead of the one at work; more would let one actor take what another could do at the end.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            # All actors live from start to end: together they must fit the cluster.
            num_cpus=min(1, cpus / (workers * (len(passes) + 1))),
            num_gpus=share,
        )
    for table in rows.iter_batches(batch_format="pyarrow", batch_size=None):
        for row in table.to_pylist():
            yield Shard(row["number"], row["start"], row["stop"]), json.loads(row["manifest"])
