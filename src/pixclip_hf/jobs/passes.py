"""Passes over shards, and the three ways to run them: in this process, in processes of this machine, with Ray."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..data.whole_files import file_names, naming_full_disk, write_json
from .folder import BETWEEN, JobFolder, manifest_path
from .plan import Plan, Shard

ENGINES = ("local", "ray")
Done = tuple[Shard, dict[str, Any]]


class Pass(Protocol):
    """Work on shards that needs the same hardware from its first line to its last."""

    @property
    def num_gpus(self) -> float:
        """GPUs that each process that runs it gets, where there are enough."""
        ...

    def __call__(self, shards: Iterator[Shard]) -> Iterator[Done]:
        """Yields each shard with its manifest when its files are written. It may take shards ahead of those that it
        yields. What all but the last pass of a job give as manifests is dropped."""
        ...


def between_path(output: Path, number: int, shard: int) -> Path:
    """Where pass `number` leaves a shard for the next one. The file is removed when the shard is done."""
    return output / BETWEEN / f"{number}" / f"{shard:05d}"


def work(passes: Sequence[Pass], output: Path, shards: Iterator[Shard], finish: bool = True) -> Iterator[Done]:
    """Runs passes in this process, and writes the manifest of each shard that leaves the last of them.

    Args:
        passes: some neighbors among the passes of a job.
        output: folder of the run.
        shards: what to work on.
        finish: whether the last of `passes` is the job's last.
    """
    for each in passes[:-1]:
        shards = (shard for shard, _ in each(shards))
    for shard, manifest in passes[-1](shards):
        if finish:
            write_json(manifest_path(output, shard.number), manifest)
            remove_between(output, shard.number)
        yield shard, manifest


def remove_between(output: Path, shard: int) -> None:
    """Removes what the passes left of a shard for each other."""
    # By name, not by a search: a pass may be far ahead, with a file for every shard of the run in its folder.
    for name in file_names(output / BETWEEN):
        if name.isdecimal():
            between_path(output, int(name), shard).unlink(missing_ok=True)


def check_engine(engine: str, workers: int) -> None:
    """
    Raises:
        ValueError: an unknown engine, or no worker.
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")


def engine_gpus(engine: str) -> float:
    """GPUs that passes of their own could have: those of the cluster, none with the local engine, whose processes run
    all passes."""
    if engine == "local":
        return 0
    from .ray_engine import start_ray

    return start_ray().get("GPU", 0)


def run_passes(
    passes: Sequence[Pass],
    plan: Plan,
    folder: JobFolder,
    *,
    engine: str = "local",
    workers: int = 1,
    progress: bool = True,
    unit: str = "image",
) -> None:
    """Runs the passes of a job over the shards that are not done. Call it within [`JobFolder.claimed`].

    Args:
        passes: every shard goes through them in this order.
        plan: the shards.
        folder: folder of the run.
        engine: `"local"` or `"ray"`.
        workers: processes. With Ray each pass has as many, with GPUs of their own as far as the cluster has them. The
            local engine works in this process where it is 1; more are processes of their own (a script then needs
            `if __name__ == "__main__":`), each of which runs all passes, and they take turns at the GPUs.
        progress: show a bar with items per second and the time left.
        unit: what an item is called there.

    Raises:
        ValueError: an unknown engine, or no worker.
        ModuleNotFoundError: the Ray engine without Ray (`pip install pixclip-hf[ray]`).
        RuntimeError: a shard whose worker has died several times.
        OSError: the disk is full.
        What a pass raises. The shards that are done stay done.
    """
    check_engine(engine, workers)
    output = folder.path
    done = folder.done(len(plan))
    for left_by in list(file_names(output / BETWEEN)):
        for name in file_names(output / BETWEEN / left_by):
            # What is hidden or has a suffix is unfinished, and goes with the folder.
            if name.isdecimal() and (int(name) >= len(plan) or done[int(name)]):
                remove_between(output, int(name))
    if not done.all():
        for number in range(len(passes) - 1):
            (output / BETWEEN / f"{number}").mkdir(parents=True, exist_ok=True)
        advice = "The shards that are done are whole: make room and start the run again, and it goes on"
        with (
            tqdm(total=plan.items, initial=plan.items_of(done), unit=unit, disable=not progress) as bar,
            naming_full_disk(f"`output` {str(output)!r}", advice),
        ):
            for shard, _ in _run(engine, passes, plan, done, output, workers):
                bar.update(len(shard))
    if (output / BETWEEN).exists():
        shutil.rmtree(output / BETWEEN)


def _run(
    engine: str, passes: Sequence[Pass], plan: Plan, done: np.ndarray, output: Path, workers: int
) -> Iterator[Done]:
    if engine == "ray":
        from .ray_engine import run_ray

        return run_ray(passes, output, plan, np.flatnonzero(~done), workers)
    if workers == 1:
        return work(passes, output, plan.shards(done))
    from .local_engine import run_processes

    return run_processes(passes, output, plan.shards(done), workers)
