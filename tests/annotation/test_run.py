"""Runs: killed ones go on without a record lost or doubled, engines agree, nothing vanishes without a reason."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any, ClassVar

import datasets
import pytest
from datasets import load_dataset
from filelock import FileLock
from PIL import Image

from pixclip_hf import hub
from pixclip_hf.annotation.passes import rejected_features
from pixclip_hf.annotation.report import report, run_counts
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.stages import active_rows, open_batch, reject_region
from pixclip_hf.annotation.vesl import VeslRegions
from pixclip_hf.annotation.vesl.captioning import CaptionColumn
from pixclip_hf.annotation.vesl.detection import BoxRules, SimulatedDetector
from pixclip_hf.annotation.vesl.phrases import NgramCandidates
from pixclip_hf.data.sources import load_records
from pixclip_hf.record import record_features, validate_record

SOURCE, SHARD_SIZE, NUMBER = "scenes:40", 7, 40
# A threshold that some images don't reach: both tables have rows.
STAGES = [NgramCandidates(), SimulatedDetector(BoxRules(threshold=0.8), miss_rate=0.5), VeslRegions()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(output, source=SOURCE, stages=STAGES, shard_size=SHARD_SIZE, **options):
    return annotate(source, stages, output, shard_size=shard_size, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never killed."""
    return run(tmp_path_factory.mktemp("whole") / "run")


def files(folder):
    """Name -> bytes of everything that a run writes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def rejected_rows(folder):
    return load_dataset("parquet", data_files=str(folder / "rejected/*.parquet"), split="train")


def test_every_record_is_in_one_of_the_tables(whole):
    records = load_dataset(str(whole), split="train")
    rejected = rejected_rows(whole)
    assert records.num_rows > 10 and rejected.num_rows > 2
    assert sorted([*records["record_id"], *rejected["record_id"]]) == [f"scene-0-{i:08d}" for i in range(NUMBER)]
    assert set(rejected["rejected_reason"]) == {"no box left"} and rejected.features == rejected_features()
    for record in records:
        validate_record({name: record[name] for name in record_features()})
        assert [step["stage"] for step in record["steps"]] == ["candidates", "detection"]
    assert sorted(path.name for path in (whole / "data").iterdir()) == [f"train-{i:05d}.parquet" for i in range(6)]


def test_the_folder_is_a_dataset(whole):
    records = load_records(str(whole), "train")
    assert records.features == record_features() and records[0]["image"].size == (64, 64)


def test_the_card_counts_records_alone(whole):
    card = hub.write_dataset_card(whole, "org/name", "vesl", pictured=False).read_text()
    (whole / "README.md").unlink()
    records = sum(json.loads(path.read_text())["records"] for path in (whole / "shards").iterdir())
    assert f"| train | {records} | 6 |" in card and "rejected" not in card


def test_only_records_are_pushed(whole, monkeypatch):
    monkeypatch.setattr(hub, "_push", lambda files, *others: list(files))
    pushed = hub.publish_dataset(whole, "org/name", "vesl")
    for name in ("README.md", "samples.png"):
        (whole / name).unlink()
    shards = [f"data/train-{i:05d}.parquet" for i in range(6)]
    assert pushed == ["README.md", *shards, "samples.png", hub.PUSHED]


def run_until_killed(output, replacement, before):
    """A run that dies by SIGKILL at its n-th atomic write, just before or just after it."""
    replace = os.replace
    written = 0

    def dying(source, target):
        nonlocal written
        written += 1
        if target.parent.name == "shards" and target.exists():
            os._exit(3)  # a manifest must not show before it is whole
        if written == replacement and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if written == replacement:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    run(output)


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_killed_at_every_kind_of_write(whole, tmp_path):
    draws = random.Random(0)
    deaths = Counter()
    for _ in range(40):
        process = start(run_until_killed, tmp_path / "run", draws.randint(1, 4), draws.random() < 0.5)
        process.join()
        deaths[process.exitcode] += 1
        if process.exitcode == 0:
            break
    assert deaths[-signal.SIGKILL] >= 4 and deaths[0] == 1 and len(deaths) == 2, deaths
    assert files(tmp_path / "run") == files(whole)


def test_killed_at_random_times(whole, tmp_path):
    draws = random.Random(1)
    begin = time.monotonic()
    process = start(run, tmp_path / "timed")
    process.join()
    seconds, codes = time.monotonic() - begin, []
    for attempt in range(30):
        process = start(run, tmp_path / "run")
        # Ever later, so that the last one ends.
        time.sleep(seconds * (draws.random() + attempt / 10) / 2)
        process.kill()
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 0:
            break
    assert codes[-1] == 0
    assert files(tmp_path / "run") == files(whole)


def test_a_finished_run_is_left_as_it_is(whole):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")}
    run(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")} == times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "scenes:41"}, "its source is scenes:40, now scenes:41"),
        ({"shard_size": 8}, "its shard_size is 7, now 8"),
        ({"stages": [NgramCandidates(seed=1), *STAGES[1:]]}, "its stages is"),
    ],
)
def test_other_settings_need_another_folder(whole, change, message):
    with pytest.raises(ValueError, match=f"holds a run with other settings: {message}"):
        run(whole, **change)


def test_a_source_that_lists_other_items_needs_another_folder(tmp_path):
    picture = Image.new("RGB", (20, 10))
    for name in "abcd":
        picture.save(tmp_path / f"{name}.png")
    source = f"images:{tmp_path}"
    run(tmp_path / "run", source, [])
    (tmp_path / "b.png").rename(tmp_path / "e.png")
    with pytest.raises(ValueError, match="holds a run over other items: what 'images:.*' lists has changed"):
        run(tmp_path / "run", source, [])
    # A new run in the same process sees the files as they are now.
    run(tmp_path / "again", source, [])
    assert sorted(rejected_rows(tmp_path / "again")["record_id"]) == ["a.png", "c.png", "d.png", "e.png"]
    (tmp_path / "e.png").rename(tmp_path / "b.png")
    run(tmp_path / "run", source, [])


def test_two_processes_do_not_write_to_one_folder(whole):
    with FileLock(whole / ".lock"), pytest.raises(ValueError, match="being written to by another process"):
        run(whole)


def test_shards_and_batches_do_not_change_records(whole, tmp_path):
    resized = [dataclasses.replace(stage, batch_size=3) for stage in STAGES]
    other = run(tmp_path / "run", stages=resized, shard_size=40)
    assert load_dataset(str(other), split="train")[:] == load_dataset(str(whole), split="train")[:]


@dataclasses.dataclass
class DropsRegions:
    """Rejects each image's first region, all regions of the second image, and breaks a box of the third."""

    batch_size: int = 2
    name: ClassVar[str] = "drops"
    columns: ClassVar[dict[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch):
        batch = open_batch(batch)
        for row in active_rows(batch):
            regions = batch["regions"][row]
            for region in regions if batch["position"][row] == 1 else regions[:1]:
                reject_region(batch, row, region["id"], self.name, "because", '{"raw": 1}')
            if batch["position"][row] == 2:
                batch["regions"][row] = [{**batch["regions"][row][0], "box": [0.0, 0.0, 900.0, 1.0]}]
        return batch


def test_rejected_regions_and_bad_records(tmp_path):
    folder = run(tmp_path / "run", "scenes:4", [DropsRegions()])
    records = load_dataset(str(folder), split="train")
    assert list(records["record_id"]) == ["scene-0-00000000", "scene-0-00000003"]
    rows = rejected_rows(folder)
    whole = {row["record_id"]: row["rejected_reason"] for row in rows if row["region"] is None}
    assert whole["scene-0-00000001"] == "no region left" and len(whole) == 2
    assert whole["scene-0-00000002"].startswith("not in the record schema: `regions[0]['box']` must lie in the image")
    regions = [row for row in rows if row["region"] is not None]
    assert {row["raw_answer"] for row in regions} == {'{"raw": 1}'} and len(regions) >= 6
    assert regions[0]["region"]["caption"] and regions[0]["rejected_stage"] == "drops"
    counts = run_counts(folder)
    assert counts["rejected_regions"] == {"drops/because": len(regions)}
    assert counts["total"]["items"] == 4 and counts["total"]["records"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take names in Unicode alone")
def test_a_folder_whose_name_is_no_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    run(tmp_path / "run", ["images", f"folder={folder}"], [])
    report(tmp_path / "run")
    assert "caf\\udce9" in (tmp_path / "run/report.md").read_text(encoding="utf-8")


def test_report(whole):
    text = report(whole, pictures=2)
    assert (whole / "report.md").read_text() == text
    counts = run_counts(whole)
    assert counts["total"]["records"] + counts["rejected_records"].total() == NUMBER
    assert f"40 of 40 images are done: {counts['total']['records']} records" in text
    for name, number in counts["counts"].items():
        stage, _, what = name.partition("/")
        assert f"| {stage} | {what} | {number} |" in text
    detection = {name: counts["counts"][f"detection/{name}"] for name in ("boxes", "kept")}
    dropped = sum(value for name, value in counts["counts"].items() if name.startswith("detection/dropped"))
    assert detection["boxes"] - dropped == detection["kept"] > 0
    pictures = sorted((whole / "pictures").iterdir())
    assert [path.name for path in pictures] == ["00000.png", "00003.png"]
    for path in pictures:
        assert min(Image.open(path).size) > 100
    for path in [*pictures, whole / "report.md"]:
        path.unlink()
    (whole / "pictures").rmdir()


def test_report_of_no_run(tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a run, got .*, which has no run.json"):
        report(tmp_path)
    with pytest.raises(ValueError, match="`shard_size` must be at least 1, got 0"):
        run(tmp_path, shard_size=0)


@pytest.mark.slow
def test_ray_runs_more_models_than_gpus_side_by_side(tmp_path):
    ray = pytest.importorskip("ray")
    seen = tmp_path / "seen by the second"

    class Model:
        columns, num_gpus, batch_size = {}, 1, 1

        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return self.name

        def __call__(self, batch):
            if self.name == "second":
                seen.touch()
            elif batch["position"] == [63]:  # of the last block: by now the second must have begun
                for _ in range(300):
                    if seen.exists():
                        break
                    time.sleep(0.1)
                else:
                    raise RuntimeError("the second model waits for the end of the first")
            return open_batch(batch)

    ray.shutdown()
    ray.init(num_cpus=2, num_gpus=1, logging_level="WARNING")
    try:
        run(tmp_path / "run", "scenes:64", [Model("first"), Model("second")], shard_size=16, engine="ray")
    finally:
        ray.shutdown()
    assert run_counts(tmp_path / "run")["total"]["records"] == 64


@pytest.mark.slow  # starting Ray and its actors takes longer than the run
def test_ray_writes_the_same(whole, tmp_path):
    pytest.importorskip("ray")
    stages = [CaptionColumn(), *STAGES]
    local = run(tmp_path / "local", stages=stages)
    assert files(run(tmp_path / "ray", stages=stages, engine="ray", workers=2)) == files(local)
