"""The coordinating process of a run over a billion records: its time per shard, its memory, and how soon it goes on.

A simulation: the plan, the shards and the manifests are those of a run of so many records, on disk; the pass is a stub
that reads and writes nothing, so that what is left is what the coordinator does. Every step is a process of its own,
at the full number of records and at a hundredth of it:

- the first half of the shards, by two workers, until the run stops;
- the start of the run that continues, up to the first shard that it hands out;
- the second half;
- what a finished run adds up from its manifests, and the shards that a search looks for.

Runs without arguments on 100 million records; `--records 1000000000` takes ten times as long and 2 GB in /dev/shm.
Prints a table and, last, one line of JSON.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pixclip_hf.embedding.folder import embedding_counts
from pixclip_hf.jobs import JobFolder, Shard, plan_shards, run_passes
from pixclip_hf.jobs.folder import done_shards

FRACTION = 100
# Files are written and synchronized by the workers; how fast a disk does that is not what is measured.
MEMORY = Path("/dev/shm")


class Stopped(Exception):
    """Ends a run from within a pass."""


@dataclass
class NoWork:
    """Stub of a pass with the manifests of an embedding run; stops before a shard where it is told to."""

    stop_at: int | None = None
    num_gpus: float = 0

    def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        for shard in shards:
            if self.stop_at is not None and shard.number >= self.stop_at:
                raise Stopped
            counts = {"images without regions": shard.number % 7, "image left out: not readable": 1}
            found = {"images": len(shard) - 1, "regions": 14 * len(shard)}
            yield shard, {"positions": [shard.start, shard.stop], **found, "counts": counts}


def run(output: str, records: int, shard_size: int, workers: int, stop_at: int | None) -> None:
    plan = plan_shards([(records, None)], shard_size)
    folder = JobFolder(output, "run.json")
    with folder.claimed({"records": records, "plan": plan.digest}):
        try:
            run_passes([NoWork(stop_at)], plan, folder, workers=workers, progress=False)
        except Stopped:
            pass


def begin(output: str, records: int, shard_size: int) -> None:
    """Up to the middle, by two workers."""
    run(output, records, shard_size, 2, records // shard_size // 2)


def go_on(output: str, records: int, shard_size: int) -> None:
    """Up to the first shard that is handed out, in this process."""
    run(output, records, shard_size, 1, 0)


def finish(output: str, records: int, shard_size: int) -> None:
    run(output, records, shard_size, 2, None)


def add_up(output: str, records: int, shard_size: int) -> None:
    """What the embedding command and a search read of a finished run."""
    sums = embedding_counts(output)
    assert sums["items"] == records and len(done_shards(output)) == sums["shards"]


STEPS: dict[str, Callable[[str, int, int], None]] = {
    "first half": begin,
    "going on": go_on,
    "second half": finish,
    "adding up": add_up,
}


def measure(step: str, output: str, records: int, shard_size: int, answer: Connection) -> None:
    """Sends the seconds of a step, the seconds of CPU of this process alone, and its peak memory in MB."""
    start, cpu = time.perf_counter(), time.process_time()
    STEPS[step](output, records, shard_size)
    answer.send({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "memory": peak_memory()})


def peak_memory() -> float:
    """MB that this process has taken at most, without its workers."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def apart(*arguments: Any) -> dict[str, float]:
    """What a step takes in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000_000, help="records that are simulated")
    parser.add_argument("--shard_size", type=int, default=2048, help="records per shard")
    arguments = parser.parse_args()

    found: dict[int, dict[str, dict[str, float]]] = {}
    for records in (arguments.records // FRACTION, arguments.records):
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            found[records] = {step: apart(step, folder, records, arguments.shard_size) for step in STEPS}
        shards = -(-records // arguments.shard_size)
        print(f"{records:,} records, {shards:,} shards")
        print(f"{'':<14}{'seconds':>10}{'CPU s':>10}{'us per shard':>14}{'peak MB':>10}")
        for step, figures in found[records].items():
            each = 1e6 * figures["cpu"] / (shards if step == "adding up" else shards / 2)
            print(
                f"{step:<14}{figures['seconds']:>10.2f}{figures['cpu']:>10.2f}{each:>14.1f}{figures['memory']:>10.0f}"
            )
    few, many = found.values()
    halves = many["first half"]["cpu"] + many["second half"]["cpu"]
    line = {
        "resume_seconds": round(many["going on"]["seconds"], 2),
        "memory_ratio": round(max(many[step]["memory"] / few[step]["memory"] for step in STEPS), 3),
        "coordinator_us_a_shard": round(1e6 * halves / shards, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
