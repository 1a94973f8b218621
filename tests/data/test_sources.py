"""One way to name a source, and datasets of every format: lazy, small in memory, never out of date."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import pixclip_hf
from pixclip_hf import load_records, record_features, validate_record
from pixclip_hf.data.sources import KINDS, open_source, parse_source
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset

SIZE = (40, 30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(path, color=(90, 120, 30), size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, compress_level=0)  # of one size, whatever the color


def write_coco(folder, images=4, name="instances.json"):
    """Two regions per image, whose annotations lie far apart in the file."""
    for number in range(images):
        picture(folder / "images" / f"{number}.png", (number, 0, 0))
    content = {
        "annotations": [
            {"id": 10 * turn + number, "image_id": number, "category_id": 7, "bbox": [1, 2, 10 + turn, 5],
             "segmentation": [[1, 2, 11, 2, 11, 7]] if turn else []}
            for turn in range(2) for number in range(images)
        ],
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 40, "height": 30} for number in range(images)
        ],
        "categories": [{"id": 7, "name": "cup"}],
    }  # fmt: skip
    path = folder / name
    path.write_text(json.dumps(content))
    return {"annotations": str(path), "images": str(folder / "images")}


@pytest.mark.parametrize(
    ("words", "kind", "arguments"),
    [
        (
            ["coco", "annotations=a b, c:d.json", "images=C:\\train 2017"],
            "coco",
            {"annotations": "a b, c:d.json", "images": "C:\\train 2017"},
        ),
        (
            ["coco", "annotations=a=b", "annotations=c", "images=i"],
            "coco",
            {"annotations": ["a=b", "c"], "images": "i"},
        ),
        (["org/regions"], "dataset", {"path": "org/regions"}),
        ("org/regions", "dataset", {"path": "org/regions"}),
        (["org/regions", "split=test"], "dataset", {"path": "org/regions", "split": "test"}),
        ("scenes:1000:0", "scenes", {"number": "1000", "seed": "0"}),
        (["scenes:10", "split=test"], "scenes", {"number": "10", "split": "test"}),
        ("regions:C:\\photos", "regions", {"folder": "C:\\photos"}),
        ("images:plates, cups", "images", {"folder": "plates, cups"}),
        ("coco:a.json,b.json:images", "coco", {"annotations": ["a.json", "b.json"], "images": "images"}),
    ],
)
def test_words_and_short_names(words, kind, arguments):
    assert parse_source(words) == (kind, arguments)


def test_a_path_alone_is_a_dataset_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "images:photos", "a, b"):
        Path(name).mkdir()
        assert parse_source([name]) == ("dataset", {"path": name})
    assert parse_source(["coco", "annotations=a", "images=b"])[0] == "coco"
    assert parse_source("coco", annotations="a", images="b")[0] == "coco"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least one word"),
        (["coco"], "coco needs annotations, images, and annotations, images is missing"),
        (["coco", "annotations=a.json"], "and images is missing"),
        (["coco", "a.json"], "words of the form name=value, got 'a.json'"),
        (["coco", "annotations=", "images=i"], "words of the form name=value, got 'annotations='"),
        (["coco", "annotations=a", "image=i", "images=i"], "coco takes annotations, images, captions, got image"),
        (["nothing here"], "`source` must be one of scenes:NUMBER.*, a kind with its arguments .*got 'nothing here'"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=message):
        parse_source(words)


def test_a_coco_file_as_a_dataset(tmp_path):
    arguments = write_coco(tmp_path)
    records = load_records("coco", **arguments)
    assert isinstance(records, datasets.Dataset) and records.features == record_features() and len(records) == 4
    for number, record in enumerate(records):
        validate_record(record)
        assert record["image"].getpixel((0, 0)) == (number, 0, 0)
        assert [region["id"] for region in record["regions"]] == [number, 10 + number]
        assert [region["mask"] is None for region in record["regions"]] == [True, False]
        assert record["regions"][0]["box"] == [1, 2, 11, 7] and record["regions"][0]["source"] == "coco"
    assert load_records(["coco", *(f"{name}={value}" for name, value in arguments.items())])[:] == records[:]
    assert str(load_records("coco", **arguments, split="validation").split) == "validation"


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records.shuffle(seed=3),
        lambda records: records.select([3, 1]),
        lambda records: records.select(range(1, 3)),
        lambda records: records.shard(2, 1),
        lambda records: records.shard(2, 1, contiguous=True),
        lambda records: records.filter(lambda row: row["regions"][0]["id"] > 1, load_from_cache_file=False),
        lambda records: records.sort("width").skip(1),
        lambda records: records.select_columns(["captions", "regions"]).select(range(2)),
        lambda records: records.remove_columns("image"),
        lambda records: records.rename_column("captions", "texts"),
        lambda records: records.cast_column("image", datasets.Image(decode=False)),
        lambda records: records.map(lambda row: {"alt_text": f"image {row['regions'][0]['id']}"}),
        lambda records: records.map(lambda row: {"count": len(row["regions"])}, num_proc=2),
        lambda records: records.add_column("number", list(range(4))),
        lambda records: records.train_test_split(2, seed=0)["test"],
        lambda records: datasets.concatenate_datasets([records, records]),
        lambda records: pickle.loads(pickle.dumps(records)),
        lambda records: list(records.to_iterable_dataset(num_shards=2)),
        lambda records: records.with_format("numpy").select_columns("width"),
        lambda records: list(records.iter(3)),
    ],
)  # fmt: skip
def test_it_is_a_dataset_like_any_other(change, tmp_path):
    """Equal to what the same records give when they lie in Arrow."""
    records = load_records("coco", **write_coco(tmp_path))
    records.to_parquet(tmp_path / "records.parquet")
    stored = datasets.Dataset.from_parquet(str(tmp_path / "records.parquet"), cache_dir=str(tmp_path / "cache"))
    found, expected = change(records), change(stored)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, Image.Image):
                value, other[name] = value.tobytes(), other[name].tobytes()
            assert np.array_equal(value, other[name]) if isinstance(value, np.ndarray) else value == other[name], name


def test_saved_records_hold_their_images_and_no_path_of_this_machine(tmp_path):
    arguments = write_coco(tmp_path / "source")
    records = load_records("coco", **arguments)
    records.save_to_disk(tmp_path / "saved")
    records.to_parquet(tmp_path / "parquet" / "train.parquet")
    (tmp_path / "source").rename(tmp_path / "gone")
    for name in ("saved", "parquet"):
        loaded = load_records(str(tmp_path / name), "train")
        assert [record["image"].getpixel((0, 0))[0] for record in loaded] == [0, 1, 2, 3]
        cell = loaded.cast_column("image", datasets.Image(decode=False))[2]["image"]
        assert cell["path"] == "2.png" and cell["bytes"]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_read_it(context, tmp_path):
    from torch.utils.data import DataLoader

    records = load_records("coco", **write_coco(tmp_path)).select_columns(["width", "regions"])
    options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": context}
    loader = DataLoader(records, sampler=[3, 0, 2, 1], **options)
    assert [row["regions"][0]["id"] for row in loader] == [3, 0, 2, 1]


def test_captions_open_no_image(tmp_path):
    arguments = write_coco(tmp_path)
    records = load_records("coco", **arguments)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    assert len(list(records.select_columns(["captions", "regions", "width"]))) == 4
    with pytest.raises(ValueError, match="Item 2 of 'coco .*' cannot be read: FileNotFoundError: .*2.png"):
        records[2]


def test_an_image_of_another_size_is_refused_by_name(tmp_path):
    records = load_records("coco", **write_coco(tmp_path))
    picture(tmp_path / "images" / "1.png", size=(30, 40))
    with pytest.raises(ValueError, match=r"Item 1 of 'coco .*the image is \(30, 40\) .* speak of \(40, 30\)"):
        records[1]


def edit_annotations(folder):
    """Another text of the same length, with the time of change of the one before."""
    path = folder / "instances.json"
    status = path.stat()
    path.write_text(path.read_text().replace('"cup"', '"mug"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_image(folder):
    path = folder / "images" / "2.png"
    status = path.stat()
    data = path.read_bytes()
    picture(path, (3, 0, 0))
    assert len(path.read_bytes()) == len(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("edit", [edit_annotations, edit_image])
def test_an_edited_file_is_never_answered_from_a_cache(edit, tmp_path):
    def seen(records):
        rows = records.map(
            lambda row: {"alt_text": f"{row['regions'][0]['category']} {row['image'].getpixel((0, 0))}"}
        )
        return list(rows["alt_text"])

    arguments = write_coco(tmp_path)
    before = load_records("coco", **arguments)
    assert load_records("coco", **arguments)._fingerprint == before._fingerprint
    texts = seen(before)
    edit(tmp_path)
    after = load_records("coco", **arguments)
    assert after._fingerprint != before._fingerprint
    assert seen(after) != texts and seen(after)[2] == (
        "mug (2, 0, 0)" if edit is edit_annotations else "cup (3, 0, 0)"
    )


def test_a_file_that_did_not_change_is_read_once(tmp_path, monkeypatch):
    from pixclip_hf.data.sources import coco

    arguments, reads = write_coco(tmp_path), []
    read = coco.read_entries
    monkeypatch.setattr(coco, "read_entries", lambda path: reads.append(path) or read(path))
    for _ in range(3):
        load_records("coco", **arguments)
    assert len(reads) == 1
    edit_annotations(tmp_path)
    load_records("coco", **arguments)
    assert len(reads) == 2


def write_parquet(folder, number=12):
    scenes = scenes_dataset(number, size=32)
    for shard in range(3):
        part = scenes.shard(3, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-00003.parquet", batch_size=2)
    return scenes


def test_parquet_files_are_opened_by_their_footers(tmp_path, monkeypatch):
    from pixclip_hf.data import parquet_shards

    scenes, opened = write_parquet(tmp_path / "shards"), []
    file = parquet_shards.pq.ParquetFile

    def open_and_note(path, **options):
        opened.append(Path(path).name)
        return file(path, **options)

    monkeypatch.setattr(parquet_shards.pq, "ParquetFile", open_and_note)
    records = load_records(str(tmp_path / "shards"))
    assert len(records) == 12 and not opened
    assert records[5]["regions"] == scenes[5]["regions"] and opened == ["train-00001-of-00003.parquet"]
    assert records[2:10]["captions"] == scenes[2:10]["captions"] and len(opened) == 3
    assert records.select([11, 3, 4, 0])["alt_text"] == [scenes[i]["alt_text"] for i in (11, 3, 4, 0)]
    # Another process finds the copies.
    again = pickle.loads(pickle.dumps(records))
    assert again[8]["image"].tobytes() == scenes[8]["image"].tobytes() and len(opened) == 3
    assert again[:0]["captions"] == []


def test_an_edited_parquet_file_is_read_again(tmp_path):
    write_parquet(tmp_path / "shards")
    before = load_records(str(tmp_path / "shards"))
    assert before[0]["regions"][0]["id"] == 0
    path = tmp_path / "shards" / "train-00000-of-00003.parquet"
    status = path.stat()
    scenes_dataset(4, start=100, size=32).to_parquet(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load_records(str(tmp_path / "shards"))
    assert after[0]["regions"][0]["id"] == 800 and after._fingerprint != before._fingerprint


def test_a_saved_dataset_that_was_edited_has_another_fingerprint(tmp_path):
    scenes_dataset(2, size=32).save_to_disk(tmp_path / "saved")
    before = load_records(str(tmp_path / "saved"))._fingerprint
    assert load_records(str(tmp_path / "saved"))._fingerprint == before
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.write_bytes(path.read_bytes())
    assert load_records(str(tmp_path / "saved"))._fingerprint != before


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "shards")
    path = tmp_path / "shards" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet' cannot be read as Parquet"):
        load_records(str(tmp_path / "shards"))


def test_splits(tmp_path):
    test, train = scenes_dataset(2, split="test", size=32), scenes_dataset(3, size=32)
    datasets.DatasetDict(test=test, train=train).save_to_disk(tmp_path / "saved")
    assert len(load_records(str(tmp_path / "saved"))) == 3 and len(load_records(str(tmp_path / "saved"), "test")) == 2
    assert load_records(["scenes:4:1"], "test")[3]["regions"] == make_scene(3, "test", 1)["regions"]
    assert load_records("scenes", number=4, size=32)[1]["width"] == 32
    with pytest.raises(ValueError, match="`split` is 'train', and 'test' in the words of 'scenes:4 split=test'"):
        load_records(["scenes:4", "split=test"], "train")


MEMORY = """
    import json, sys, threading, time
    from pathlib import Path
    import pixclip_hf.data.lazy_table
    from pixclip_hf import load_records

    def used():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

    folder, peak = Path(sys.argv[1]), 0
    load_records("coco", annotations=str(folder / "small.json"), images=str(folder / "images"))
    before, done = used(), threading.Event()

    def watch():
        global peak
        while not done.is_set():
            peak = max(peak, used())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    records = load_records("coco", annotations=str(folder / "large.json"), images=str(folder / "images"))
    done.set()
    watcher.join()
    print(json.dumps([before, peak, len(records)]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of anonymous memory")
def test_a_large_file_is_read_in_bounded_memory(tmp_path):
    """In less than the size of the file; as Python objects it would take several times as much."""
    (tmp_path / "images").mkdir()
    segmentation = json.dumps([[round(x * 1.37, 2) for x in range(200)]])
    for name, images in (("small", 10), ("large", 8_000)):
        with open(tmp_path / f"{name}.json", "w") as file:
            entries = ({"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(images))
            file.write('{"images": [' + ",".join(map(json.dumps, entries)))
            file.write('], "annotations": [')
            for number in range(8 * images):
                file.write("," * bool(number))
                file.write(
                    f'{{"id": {number}, "image_id": {number % images}, "category_id": 1, "bbox": [1, 2, 3, 4], '
                    f'"segmentation": {segmentation}}}'
                )
            file.write('], "categories": [{"id": 1, "name": "cup"}]}')
    size = (tmp_path / "large.json").stat().st_size / 2**10
    assert size > 95 * 2**10
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, peak, count = json.loads(found.stdout.splitlines()[-1])
    assert count == 8_000
    assert peak - before < 0.9 * size, (before, peak, size)


def test_every_kind_says_what_it_takes():
    for kind, source in KINDS.items():
        assert "Args:" in source.__doc__ or kind == "scenes", kind
        assert source.__module__.startswith("pixclip_hf.data.sources.")
    assert "load_records" in dir(pixclip_hf)
    assert open_source("scenes:3").categories == [] and len(open_source("scenes", number=3)) == 3
