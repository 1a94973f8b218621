"""Work over shards: what two workers are worth, what the coordinating process does, what an engine adds per record.

Runs without arguments; `--quick` is a check of this script with small numbers. Stages are stubs, records have no
pixels. Prints tables and, last, one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import psutil
from datasets import disable_progress_bars

from pixclip_hf.annotation.passes import annotation_passes
from pixclip_hf.annotation.stages import add_step, open_batch
from pixclip_hf.data.whole_files import whole_file
from pixclip_hf.jobs import JobFolder, Shard, plan_shards, run_passes

STAGE_SECONDS = 0.01  # of CPU per record, in the stage that two workers share
SHARD = 1_000


@dataclass
class Sums:
    """Stub of a pass: burns some CPU per record, and writes one number per shard."""

    output: Path
    seconds: float = 0.0
    num_gpus: float = 0

    def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        for shard in shards:
            total = 0
            for position in shard.positions:
                end = time.process_time() + self.seconds
                while time.process_time() < end:
                    pass
                total += position
            with whole_file(self.output / "data" / f"{shard.number:05d}.json") as unfinished:
                unfinished.write_text(json.dumps(total))
            yield shard, {"total": total, "end": time.time()}


@dataclass
class OneRecord:
    """Stub of a source: every record is the same, with three regions and an image that nobody opens."""

    batch_size: int = 64
    name: ClassVar[str] = "source"
    columns: ClassVar[dict[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch):
        batch = open_batch(batch)
        empty = dict.fromkeys(("mask", "category", "long_caption", "score", "source"))
        regions = [{"id": i, "box": [1.0, 2.0, 30.0, 40.0], "caption": "a star", **empty} for i in range(3)]
        record = {
            "image": {"bytes": b"none", "path": None}, "width": 64, "height": 64, "captions": ["a star"],
            "alt_text": "star", "regions": regions,
        }  # fmt: skip
        count = len(batch["position"])
        for name, value in record.items():
            batch[name] = [value] * count
        batch["record_id"] = [str(position) for position in batch["position"]]
        return batch


@dataclass
class StubModel:
    """Stub of a model: notes that it was there."""

    number: int
    batch_size: int = 64
    columns: ClassVar[dict[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    @property
    def name(self) -> str:
        return f"stub{self.number}"

    def __call__(self, batch):
        batch = open_batch(batch)
        for row in range(len(batch["position"])):
            add_step(batch, row, self.name, "stub")
        return batch


STAGES = [OneRecord(), *(StubModel(number) for number in range(4))]


@contextmanager
def job(folders: tuple[str, ...] = ("data",)) -> Iterator[JobFolder]:
    with tempfile.TemporaryDirectory() as output:
        folder = JobFolder(output, "run.json", folders)
        with folder.claimed({}):
            yield folder


def ends(folder: JobFolder) -> list[float]:
    """When each shard was done."""
    return sorted(json.loads(path.read_text())["end"] for path in (folder.path / "shards").glob("*.json"))


def records_per_second(engine: str, workers: int, shards: int, size: int) -> float:
    """Between the first shard and the last, so that the start of the workers counts on neither side."""
    with job() as folder:
        plan = plan_shards([(shards * size, None)], size)
        run_passes([Sums(folder.path, STAGE_SECONDS)], plan, folder, engine=engine, workers=workers, progress=False)
        times = ends(folder)
    # Workers finish their first shards at about the same time.
    return (len(times) - workers) * size / (times[-1] - times[workers - 1])


def coordinator(records: int, seconds: float) -> tuple[float, float]:
    """Seconds of CPU of this process in a run with two workers, and its memory in MB at the end."""
    before = time.process_time()
    with job() as folder:
        plan = plan_shards([(records, None)], SHARD)
        run_passes([Sums(folder.path, seconds)], plan, folder, workers=2, progress=False)
    return time.process_time() - before, psutil.Process().memory_info().rss / 2**20


def annotation_seconds(engine: str, records: int) -> float:
    """A run of five stub stages with one worker, tables written."""
    begin = time.perf_counter()
    with job(("data", "rejected")) as folder:
        plan = plan_shards([(records, None)], SHARD)
        run_passes(annotation_passes(STAGES, folder.path), plan, folder, engine=engine, progress=False)
    return time.perf_counter() - begin


def loop_seconds(records: int) -> float:
    """The same stages in a plain loop, nothing written."""
    begin = time.perf_counter()
    passes = annotation_passes(STAGES, Path())
    for start in range(0, records, SHARD):
        columns = {name: [None] * SHARD for name in passes[0].features}
        columns["position"] = list(range(start, start + SHARD))
        for stage in STAGES:
            parts = [
                stage({name: values[at : at + stage.batch_size] for name, values in columns.items()})
                for at in range(0, SHARD, stage.batch_size)
            ]
            columns = {name: [value for part in parts for value in part[name]] for name in columns}
    return time.perf_counter() - begin


def overhead_milliseconds(engine: str, few: int, many: int) -> float:
    """What an engine adds to a record: the slope between two sizes, so that its start does not count, less the stages
    themselves."""
    slopes = [(run(many) - run(few)) / (many - few) for run in (lambda n: annotation_seconds(engine, n), loop_seconds)]
    return 1000 * (slopes[0] - slopes[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, whose ratios mean little")
    parser.add_argument("--engines", nargs="+", default=["local", *(["ray"] if find_spec("ray") else [])])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    disable_progress_bars()
    quick = arguments.quick
    repeats, shards, size = (1, 8, 10) if quick else (3, 24, 50)
    few, many = (1_000, 4_000) if quick else (10_000, 100_000)
    sizes = (2_000, 20_000) if quick else (10_000, 1_000_000)

    line: dict[str, float | None] = {}
    for engine in arguments.engines:
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats):
            for workers, found in rates.items():
                found.append(records_per_second(engine, workers, shards, size))
        ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
        print(f"{engine:<6} one worker {statistics.median(rates[1]):8.1f} records per second, two {ratio:.2f} x")
        line["two_workers_over_one" if engine == "local" else f"two_workers_over_one_{engine}"] = round(ratio, 3)
    # The share of a stage as light as 1 ms: with a heavier one it is smaller still.
    own, _ = coordinator(few, 0.001)
    share = own / (own + few * 0.001)
    memory = [coordinator(records, 0.0)[1] for records in sizes]
    print(f"coordinator: {100 * share:.2f} % of the CPU with 1 ms per record")
    for records, megabytes in zip(sizes, memory, strict=True):
        print(f"coordinator: {megabytes:.0f} MB after {records:,} records")
    line |= {"coordinator_share": round(share, 4), "memory_ratio": round(memory[1] / memory[0], 3)}
    for engine in arguments.engines:
        added = overhead_milliseconds(engine, few, many)
        print(f"{engine:<6} adds {added:.3f} ms per record to five stub stages")
        line[f"overhead_ms_{engine}"] = round(added, 3)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
