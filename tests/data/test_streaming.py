"""Streams of records: every record once per pass, shuffled, and resumed where it stopped, on any ranks and workers."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice

import datasets
import pytest
from PIL import ExifTags, Image
from transformers.utils import logging

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.sources import load_records
from pixclip_hf.data.streaming import RecordStream, StreamLoader, stream_records
from pixclip_hf.record import record_features
from pixclip_hf.scenes.dataset import make_scene

SIZE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def small_record(number):
    """A record whose only region has the id `number`."""
    region = {
        "id": number, "box": [0, 0, 8, 8], "mask": None, "category": "thing", "caption": f"thing {number}",
        "long_caption": None, "score": 1.0, "source": "test",
    }  # fmt: skip
    image = Image.new("RGB", (SIZE, SIZE), (number % 256, 0, 0))
    return {
        "image": image, "width": SIZE, "height": SIZE, "captions": [f"picture {number}"], "alt_text": None,
        "regions": [region],
    }  # fmt: skip


def encoded(record, name):
    buffer = io.BytesIO()
    record["image"].save(buffer, "PNG")
    return {**record, "image": {"bytes": buffer.getvalue(), "path": name}}


def write_parquet(folder, records, shards):
    folder.mkdir()
    for shard in range(shards):
        rows = [encoded(record, f"{i}.png") for i, record in enumerate(records)][shard::shards]
        columns = {name: [row[name] for row in rows] for name in record_features()}
        datasets.Dataset.from_dict(columns, features=record_features()).to_parquet(
            folder / f"train-{shard:05d}.parquet", batch_size=3
        )


def write_tars(folder, records, shards):
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for number, record in list(enumerate(records))[shard::shards]:
                row = encoded(record, "")
                image = row.pop("image")["bytes"]
                for ending, content in (("png", image), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


WRITERS = {"parquet": write_parquet, "tars": write_tars}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def ids(batch):
    return [record["regions"][0]["id"] for record in batch]


def loader(folder, rank=0, world_size=1, workers=0, batch_size=2, **options):
    stream = RecordStream(stream_records(str(folder), "train"), shuffle_buffer=4, **options)
    return StreamLoader(stream, ids, batch_size, rank, world_size, workers)


def take(batches, count):
    return list(islice(batches, count))


def flat(batches):
    return [number for batch in batches for number in batch]


def test_records_are_those_of_the_map_style_reader(write, tmp_path):
    scenes = [make_scene(index, size=32) for index in range(4)]
    write(tmp_path / "data", scenes, 2)
    stream = RecordStream(stream_records(str(tmp_path / "data"), "train"))
    found = {record["regions"][0]["id"]: record for record in islice(stream, 4)}
    assert len(found) == 4
    for scene in scenes:
        record = found[scene["regions"][0]["id"]]
        assert record.pop("sample_key")[0] == 0
        assert record.pop("image").convert("RGB").tobytes() == scene["image"].tobytes()
        assert record["captions"] == scene["captions"] and len(record["regions"]) == len(scene["regions"])
        for region, expected in zip(record["regions"], scene["regions"], strict=True):
            assert region["mask"] == expected["mask"] and region["long_caption"] == expected["long_caption"]
            assert region["box"] == pytest.approx(expected["box"])


def test_records_without_score_and_source_are_read(tmp_path):
    """As `load_records` reads them."""
    rows = [encoded(small_record(i), f"image{i}.png") for i in range(3)]
    for row in rows:
        row["regions"][0] |= {"score": None, "source": None}
    write_rows(tmp_path / "data", rows)
    assert sorted(flat(take(loader(tmp_path / "data", batch_size=1), 3))) == [0, 1, 2]


@pytest.mark.parametrize("workers", (0, 2))
def test_every_pass_has_every_record_once_in_another_order(workers, write, tmp_path):
    write(tmp_path / "data", [small_record(i) for i in range(24)], 4)
    found = flat(take(loader(tmp_path / "data", workers=workers), 36))
    passes = [found[:24], found[24:48], found[48:]]
    for numbers in passes:
        assert sorted(numbers) == list(range(24))
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    again = flat(take(loader(tmp_path / "data", workers=workers), 12))
    other = flat(take(loader(tmp_path / "data", workers=workers, seed=5), 12))
    assert again == passes[0] != other and sorted(other) == sorted(again)


def test_every_pass_has_the_shards_in_another_order(tmp_path):
    """Without any shuffling inside a shard."""
    write_parquet(tmp_path / "data", [small_record(i) for i in range(12)], 6)
    records = islice(RecordStream(stream_records(str(tmp_path / "data"), "train"), shuffle_buffer=1), 36)
    found = ids(records)
    passes = [found[:12], found[12:24], found[24:]]
    assert passes[0] != passes[1] != passes[2] and all(sorted(numbers) == list(range(12)) for numbers in passes)


@pytest.mark.parametrize(("shards", "workers"), [(4, 0), (4, 2), (3, 0), (1, 0)])
def test_ranks_share_the_records(shards, workers, write, tmp_path):
    """Whole shards each, or every second record where the shards do not divide."""
    write(tmp_path / "data", [small_record(i) for i in range(16)], shards)
    found = [flat(take(loader(tmp_path / "data", rank, 2, workers), 4)) for rank in range(2)]
    assert sorted(found[0] + found[1]) == list(range(16))


@pytest.mark.parametrize(
    ("write", "workers", "world_size"),
    [
        (write_parquet, 0, 1), (write_parquet, 2, 1), (write_parquet, 3, 1), (write_parquet, 2, 2), (write_tars, 2, 1),
    ],
)  # fmt: skip
def test_resumes_anywhere(write, workers, world_size, tmp_path):
    """State through JSON after each batch of two and a half passes, uneven shards and blocks, one corrupt record."""
    records = [small_record(i) for i in range(23)]
    records[7]["width"] = 0
    write(tmp_path / "data", records, 6)
    options = {"rank": world_size - 1, "world_size": world_size, "workers": workers, "max_corrupt_share": 0.5}
    whole = take(loader(tmp_path / "data", **options), 24 // world_size)
    assert 7 not in flat(whole)
    if world_size == 1:
        counts = Counter(flat(whole))
        assert set(counts) == set(range(23)) - {7} and max(counts.values()) - min(counts.values()) <= 2
    for stop in (1, 2, 5, 9, 11):
        first = loader(tmp_path / "data", **options)
        begun = take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(tmp_path / "data", **options)
        second.load_state_dict(state)
        rest = take(second, len(whole) - stop)
        assert begun + rest == whole
        assert second.corrupt >= first.corrupt


def test_a_state_of_another_layout_is_refused(tmp_path):
    write_parquet(tmp_path / "data", [small_record(i) for i in range(8)], 4)
    state = loader(tmp_path / "data", workers=2).state_dict()
    for changes in ({"workers": 0}, {"workers": 2, "world_size": 2}, {"workers": 2, "batch_size": 3}):
        with pytest.raises(ValueError, match="cannot go on with"):
            loader(tmp_path / "data", **changes).load_state_dict(state)


@pytest.fixture
def warnings(monkeypatch):
    """Warnings of the stream, in this process."""
    found = []
    monkeypatch.setattr(logging.get_logger("pixclip_hf.data.streaming"), "warning", found.append)
    return found


def break_image(row):
    row["image"] = {"bytes": row["image"]["bytes"][:40], "path": row["image"]["path"]}


def break_mask(row):
    row["regions"][0]["mask"] = {"size": [SIZE, SIZE], "counts": "nonsense"}


def break_box(row):
    row["regions"][0]["box"] = [0, 0, 2 * SIZE, 8]


def turn_image(row):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.open(io.BytesIO(row["image"]["bytes"])).save(buffer, "JPEG", exif=exif)
    row["image"] = {"bytes": buffer.getvalue(), "path": row["image"]["path"]}


def write_rows(folder, rows):
    folder.mkdir()
    columns = {name: [row[name] for row in rows] for name in record_features()}
    features = record_features()
    features["image"] = datasets.Image(decode=False)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("break_row", (break_image, turn_image))
def test_corrupt_records_are_skipped_counted_and_named(break_row, warnings, tmp_path):
    rows = [encoded(small_record(i), f"image{i}.png") for i in range(6)]
    break_row(rows[3])
    write_rows(tmp_path / "data", rows)
    batches = loader(tmp_path / "data", batch_size=1)
    found = flat(take(batches, 10))
    assert Counter(found) == dict.fromkeys((0, 1, 2, 4, 5), 2)
    assert batches.corrupt == 2 and len(warnings) == 2
    assert "Skipped a corrupt record" in warnings[0] and "image3.png" in warnings[0] and "regions [3]" in warnings[0]


@pytest.mark.parametrize(("break_row", "left_out"), [(break_mask, 1), (break_box, 0)])
def test_a_broken_mask_costs_the_mask_and_boxes_are_clipped(break_row, left_out, warnings, tmp_path):
    rows = [encoded(small_record(i), f"image{i}.png") for i in range(6)]
    break_row(rows[3])
    write_rows(tmp_path / "data", rows)
    batches = loader(tmp_path / "data", batch_size=1)
    assert Counter(flat(take(batches, 6))) == dict.fromkeys(range(6), 1)
    assert (batches.corrupt, batches.left_out) == (0, left_out)
    reason = "mask left out: empty or not readable (1)"
    assert warnings == [f"Left out of image 'image3.png' with regions [3]: {reason}"] * left_out


@pytest.mark.parametrize("workers", (0, 1))
def test_too_many_corrupt_records_stop_the_training(workers, tmp_path):
    rows = [encoded(small_record(i), f"image{i}.png") for i in range(40)]
    for row in rows[::2]:
        break_image(row)
    write_rows(tmp_path / "data", rows)
    # Half of them are corrupt: of 1,000 records at least, 10 may be.
    with pytest.raises(ValueError, match="11 of the .* records .* are corrupt, more than `max_corrupt_share` = 0.01"):
        take(loader(tmp_path / "data", workers=workers), 20)


def test_more_ranks_than_records(tmp_path):
    write_parquet(tmp_path / "data", [small_record(0)], 1)
    with pytest.raises(ValueError, match="no record for rank 1 of 2"):
        take(loader(tmp_path / "data", 1, 2), 1)


def test_no_more_workers_than_shards(warnings, tmp_path):
    write_parquet(tmp_path / "data", [small_record(i) for i in range(8)], 2)
    batches = loader(tmp_path / "data", workers=5)
    assert batches.layout["workers"] == 2 and "2 workers in place of 5" in warnings[0]


def test_collates_in_the_workers(tiny_pixclip, tmp_path):
    """Images and masks arrive as tensors, and as those of the map-style reader."""
    scenes = [make_scene(index, size=32) for index in range(4)]
    write_parquet(tmp_path / "data", scenes, 1)
    collator = RegionCollator(tiny_pixclip[1], regions_per_image=2)
    stream = RecordStream(stream_records(str(tmp_path / "data"), "train"), shuffle_buffer=1)
    batch = take(StreamLoader(stream, collator, 4, num_workers=1), 1)[0]
    records = load_records(str(tmp_path / "data"), "train")
    expected = collator([{**records[i], "sample_key": key} for i, key in enumerate(keys_of(stream, 4))])
    assert batch["return_loss"] is True and batch.keys() == expected.keys()
    for name in batch.keys() - {"return_loss"}:
        assert batch[name].equal(expected[name]), name


def keys_of(stream, count):
    return [record["sample_key"] for record in islice(stream, count)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_buffer": 0}, "`shuffle_buffer` must be at least 1, got 0"),
        ({"max_corrupt_share": 1}, r"`max_corrupt_share` must lie in \[0, 1\), got 1"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RecordStream(None, **options)


def test_other_datasets_are_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(ValueError, match="not in the record schema: it lacks the columns alt_text"):
        stream_records(str(tmp_path / "text"), "train")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        info = tarfile.TarInfo("0.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"a"))
    with pytest.raises(ValueError, match="must hold one image and a `json` a record"):
        stream_records(str(tmp_path / "tars"), "train")
