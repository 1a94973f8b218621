"""Runs over shards: whoever is killed, and whenever, nothing is lost or doubled; engines write the same."""

import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from stub_passes import Fails, First, Killed, LastDies, NeverStarts, Second, Squares

from pixclip_hf.data import whole_files
from pixclip_hf.data.sources import open_source
from pixclip_hf.jobs import JobFolder, local_engine, plan_shards, run_passes
from pixclip_hf.jobs.folder import done_shards, manifests
from pixclip_hf.jobs.passes import check_engine
from pixclip_hf.jobs.ray_engine import gpu_shares
from pixclip_hf.scenes.dataset import scenes_dataset

PLAN = plan_shards([(50, None)], 4)  # 13 shards


def run(passes, output, plan=PLAN, settings=None, **options):
    folder = JobFolder(output, "run.json")
    with folder.claimed(settings or {"version": 1}):
        run_passes(passes, plan, folder, progress=False, **options)
    return output


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def forked(monkeypatch):
    """Workers that start at once. Those of users are forked from a server, which imports everything first."""
    monkeypatch.setattr(local_engine, "worker_context", lambda: multiprocessing.get_context("fork"))


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The processes of all workers that were started, by their ids; the file `third` says that three were."""
    pids = []

    class Noted(local_engine._Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pids.append(self.process.pid)
            if len(pids) == 3:
                (tmp_path / "third").touch()

    monkeypatch.setattr(local_engine, "_Worker", Noted)
    return pids


@pytest.fixture
def whole(tmp_path):
    """The files of a run that nothing interrupted."""
    found = files(run([Squares(tmp_path / "whole", tmp_path / "calls of whole")], tmp_path / "whole"))
    assert json.loads(found["data/00012.json"]) == [48**2, 49**2] and len(found) == 2 * 13 + 1
    return found


@pytest.mark.parametrize(
    ("units", "max_items", "max_bytes", "bounds"),
    [
        ([(10, None)], 4, None, [0, 4, 8, 10]),
        ([(3, None), (2, None), (9, None), (1, None), (1, None)], 5, None, [0, 5, 10, 14, 16]),
        ([(10, 1000)], 8, 300, [0, 3, 6, 9, 10]),
        ([(2, 100), (2, 100), (2, 500)], 8, 200, [0, 4, 5, 6]),  # an item of 250 is larger than a shard may be
        ([(4, None), (0, 0), (4, 10)], 8, 100, [0, 8]),
        ([], 4, None, [0]),
    ],
)
def test_shards_follow_units_within_items_and_bytes(units, max_items, max_bytes, bounds):
    plan = plan_shards(units, max_items, max_bytes)
    assert plan.bounds.tolist() == bounds and len(plan) == len(bounds) - 1
    assert plan.items == sum(items for items, _ in units)
    done = np.arange(len(plan)) % 2 == 0
    shards = list(plan.shards(done))
    assert [shard.number for shard in shards] == list(range(1, len(plan), 2))
    assert plan.items_of(done) + sum(map(len, shards)) == plan.items
    with pytest.raises(ValueError, match="`max_bytes` must be at least 1, got 0"):
        plan_shards(units, max_items, 0)


def test_units_of_sources(tmp_path):
    assert open_source("scenes:7").units() == [(7, None)]
    scenes_dataset(5, size=32).to_parquet(tmp_path / "records/train.parquet", batch_size=2)
    units = open_source(str(tmp_path / "records")).units()
    assert [items for items, _ in units] == [2, 2, 1] and all(size > 500 for _, size in units)
    (tmp_path / "photos").mkdir()
    for name in "abc":
        scenes_dataset(1, size=32)[0]["image"].save(tmp_path / f"photos/{name}.png")
    ((items, size),) = open_source(f"images:{tmp_path / 'photos'}").units()
    assert items == 3 and size == 3 * (tmp_path / "photos/a.png").stat().st_size


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    calls = tmp_path / "calls"
    assert files(run([Squares(tmp_path / "whole", calls)], tmp_path / "whole")) == whole
    assert not calls.exists()


def test_killed_workers_are_replaced(forked, started, whole, tmp_path):
    """Before and after a shard is written, in two processes: one starts for each that dies, and no other. Which of
    those that live takes a shard again is open."""
    calls = tmp_path / "calls"
    output = run([Killed(tmp_path / "run", calls, at=(0, 3, 12))], tmp_path / "run", workers=2)
    assert files(output) == whole
    lines = [tuple(map(int, line.split())) for line in calls.read_text().splitlines()]
    by_shard = {number: [pid for shard, pid in lines if shard == number] for number in range(len(PLAN))}
    assert {number: len(pids) for number, pids in by_shard.items() if len(pids) > 1} == {0: 3, 3: 3, 12: 3}
    killed = {pid for pids in by_shard.values() for pid in pids[:-1]}
    assert len(killed) == 6 and len(set(started)) == len(started) == 2 + 6
    assert {pid for _, pid in lines} <= set(started)


def test_a_worker_that_has_ended_is_not_replaced(forked, started, whole, tmp_path):
    """It ends after another has died with the last shard, before the one in the place of that one takes the shard."""
    output = run([LastDies(tmp_path / "run", tmp_path / "calls", last=12)], tmp_path / "run", workers=2)
    assert files(output) == whole
    assert len(started) == 2 + 1


def test_a_shard_that_always_kills_its_worker_ends_the_run(forked, tmp_path):
    calls = tmp_path / "calls"
    with pytest.raises(RuntimeError, match=r"died 3 times with shard 2 \(items 8 to 11\) .* exit code -9"):
        run([Killed(tmp_path / "run", calls, at=(2,), always=True)], tmp_path / "run", workers=2)
    assert not (tmp_path / "run/shards/00002.json").exists()
    assert [line.split()[0] for line in calls.read_text().splitlines()].count("2") == 3


def test_workers_that_cannot_start_end_the_run(forked, tmp_path):
    with pytest.raises(RuntimeError, match="Workers died 3 times with no shard in hand, .* exit code 7"):
        run([NeverStarts(tmp_path / "run", tmp_path / "calls")], tmp_path / "run", workers=2)


def test_a_killed_coordinator_takes_its_workers_along(forked, whole, tmp_path):
    calls, output = tmp_path / "calls", tmp_path / "run"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=([Squares(output, calls, 0.2)], output), kwargs={"workers": 2})
    process.start()
    deadline = time.monotonic() + 300
    while not list(output.glob("shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    workers = {int(line.split()[1]) for line in calls.read_text().splitlines()}
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(map(psutil.pid_exists, workers))
    done = len(list(output.glob("shards/*.json")))
    assert 0 < done < len(PLAN)
    assert files(run([Squares(output, calls)], output)) == whole


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("odd", RuntimeError, "OddError: shard 5 is odd"),
        ("key", KeyError, "no such key"),
        ("full", OSError, "No space left for `output` .* make room and start the run again"),
    ],
)
def test_an_error_in_a_worker_ends_the_run_until_it_is_mended(forked, whole, tmp_path, error, kind, message):
    output = tmp_path / "run"
    with pytest.raises(kind, match=message):
        run([Fails(output, tmp_path / "calls", number=5, error=error)], output, workers=2)
    done = {path.name for path in (output / "shards").iterdir()}
    assert done and "00005.json" not in done
    assert files(run([Squares(output, tmp_path / "calls")], output)) == whole


def test_a_full_disk_leaves_whole_files_alone(whole, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(OSError, match="No space left"):
        run([Fails(output, tmp_path / "calls", number=5, error="full")], output)
    assert len(files(output)) == 2 * 5 + 1
    assert files(run([Squares(output, tmp_path / "calls")], output)) == whole


def test_passes_go_on_from_what_lies_between_them(tmp_path):
    output, calls = tmp_path / "run", tmp_path / "calls"
    with pytest.raises(KeyboardInterrupt):
        run([First(output, calls), Second(output, stop_at=6)], output)
    assert [path.name for path in (output / "between/0").iterdir()] == ["00006"]
    (output / "between/0/00002").write_text("left by a run that died before it could remove it")
    (output / "between/0/.00007.1234.tmp").write_text("half")
    run([First(output, calls), Second(output)], output)
    assert calls.read_text().split("\n")[:-1] == [f"first {number}" for number in range(13)]
    assert not (output / "between").exists()
    assert json.loads((output / "data/00006.json").read_text()) == [48, 50, 52, 54]
    assert sum(manifest["items"] for manifest in manifests(output)) == 50


def test_other_settings_need_another_folder(whole, tmp_path):
    with pytest.raises(ValueError, match="holds a run with other settings: its version is 1, now 2"):
        run([], tmp_path / "whole", settings={"version": 2})


@pytest.mark.parametrize(
    ("wanted", "workers", "gpus", "shares"),
    [
        ([0, 1, 0, 1], 1, 2, [0, 1, 0, 1]),
        ([0, 1, 0, 1], 1, 1, [0, 0.5, 0, 0.5]),
        ([1, 1, 1], 1, 2, [0.5, 0.5, 0.5]),  # two on one GPU, and one on the other
        ([1, 0.25], 3, 1, [0.1666, 0.1666]),
        ([2, 1], 1, 4, [2, 1]),
        ([0, 0], 2, 0, [0, 0]),
    ],
)
def test_actors_share_the_gpus_that_there_are(wanted, workers, gpus, shares):
    assert gpu_shares(wanted, workers, gpus) == shares


def test_engine_arguments():
    with pytest.raises(ValueError, match="`engine` must be one of local, ray, got 'spark'"):
        check_engine("spark", 1)
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        check_engine("local", 0)


@pytest.mark.slow  # a server of workers imports everything once
def test_workers_as_users_have_them(whole, tmp_path):
    output = run([Killed(tmp_path / "run", tmp_path / "calls", at=(3,))], tmp_path / "run", workers=2)
    assert files(output) == whole


@pytest.mark.slow  # starting Ray and its actors takes longer than the run
def test_ray_writes_the_same_though_its_actors_die(whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    # Actors import the passes too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    output = tmp_path / "run"
    try:
        run([Killed(output, tmp_path / "calls", at=(0, 7))], output, engine="ray", workers=2)
        passes = [First(tmp_path / "two", tmp_path / "calls of two"), Second(tmp_path / "two")]
        run(passes, tmp_path / "two", engine="ray")
    finally:
        ray.shutdown()
    assert files(output) == whole
    assert len(files(tmp_path / "two")) == 2 * 13 + 1 and not (tmp_path / "two/between").exists()


def test_many_shards_are_numbers(tmp_path):
    """A list of what lies in the folder of manifests would take a multiple; and names are no numbers: the shard 100000
    comes behind 99999."""
    folder = JobFolder(tmp_path, "run.json")
    with folder.claimed({}):
        pass
    numbers = [*range(0, 8_000, 2), 99_999, 100_000]
    for number in numbers:
        (tmp_path / "shards" / f"{number:05d}.json").write_text("{}")
    (tmp_path / "shards/.00001.json.1234.tmp").touch()
    tracemalloc.start()
    done = folder.done(100_001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.flatnonzero(done).tolist() == numbers
    assert peak < 100_001 + 40 * len(numbers), peak
    assert done_shards(tmp_path)[-2:].tolist() == [99_999, 100_000]


def test_a_pass_that_is_far_ahead_costs_nothing(tmp_path, monkeypatch):
    """Names that are read per shard do not grow with what a pass has left for the next one."""
    output, plan = tmp_path / "run", plan_shards([(120, None)], 1)
    (output / "between/0").mkdir(parents=True)
    for number in range(len(plan)):
        (output / f"between/0/{number:05d}").write_text(f"[{number}]")
    read, scandir = Counter(), os.scandir

    @contextmanager
    def counting(path):
        with scandir(path) as entries:
            name = path if isinstance(path, int) else Path(path).name  # removing a tree goes by descriptors
            yield (read.update([name]) or entry for entry in entries)

    monkeypatch.setattr(whole_files, "_sync", lambda path, flags: None)  # waits for the disk, four times per shard
    monkeypatch.setattr(os, "scandir", counting)
    run([First(output, tmp_path / "calls"), Second(output)], output, plan)
    monkeypatch.undo()
    assert len(list(manifests(output))) == len(plan) and not (tmp_path / "calls").exists()
    assert read["between"] <= len(plan) + 1 and read["0"] <= 2 * len(plan), read
