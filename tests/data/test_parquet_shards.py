"""Shards that this package writes: with their images, bounded in rows and bytes, of any size together."""

import io
import itertools
import json
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from pixclip_hf import hub, load_records, make_scene, record_features, save_records, validate_record
from pixclip_hf.data import parquet_shards, stream_shards
from pixclip_hf.data.sources import records as source_records
from pixclip_hf.data.streaming import RecordStream, stream_records
from pixclip_hf.scenes.dataset import scenes_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def sizes(folder):
    """Rows, row groups and image bytes of each shard."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            images = file.read(["image"]).column("image").to_pylist()
            found.append((len(images), file.num_row_groups, sum(len(image["bytes"]) for image in images)))
    return found


def records_of_size(lengths):
    """Records whose images have about so many bytes."""
    for number, length in enumerate(lengths):
        noise = np.random.default_rng(number).integers(0, 256, (length // 30, 10, 3), dtype=np.uint8)
        scene = make_scene(number, size=32)
        yield {**scene, "image": Image.fromarray(noise), "width": 10, "height": length // 30, "regions": []}


def test_shards_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "_GROUP_BYTES", 7_000)
    lengths = [3_000, 3_000, 3_000, 60_000, 3_000, 3_000, 3_000, 3_000, 3_000, 3_000]
    paths = save_records(records_of_size(lengths), tmp_path / "a", max_shard_rows=4, max_shard_bytes=10_000)
    assert [path.name for path in paths] == [f"train-{number:05d}.parquet" for number in range(4)]
    found = sizes(tmp_path / "a")
    # The large one does not fit with any other, and is written all the same.
    assert [rows for rows, _, _ in found] == [3, 1, 3, 3] and found[0][1] == 2
    assert all(size <= 10_000 or rows == 1 for rows, _, size in found)
    assert [record["height"] for record in load_records(str(tmp_path / "a"), "train")] == [n // 30 for n in lengths]
    save_records(records_of_size(lengths), tmp_path / "b", "test", max_shard_rows=4)
    assert [rows for rows, _, _ in sizes(tmp_path / "b")] == [4, 4, 2]


def test_one_group_is_held_at_a_time(tmp_path):
    """The last records are asked for after the first are written."""
    seen = []

    def records():
        for number in range(250):
            seen.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
            yield make_scene(number % 3, size=32)

    save_records(records(), tmp_path / "a", max_shard_rows=120)
    assert seen[0] == 0 and seen[122] > 0 and seen[-1] > seen[122]


def test_large_rows_never_meet_in_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(source_records, "_BATCH_BYTES", 1_000)
    for number in range(6):
        make_scene(number, size=32)["image"].save(tmp_path / f"{number}.png")
    records = load_records("images", folder=str(tmp_path))
    table = records.data.table
    assert table.num_rows == 6 and table.column("image").num_chunks > 1
    assert all(sum(len(row["bytes"]) for row in chunk.to_pylist()) < 4_000 for chunk in table.column("image").chunks)
    records.to_parquet(tmp_path / "out" / "train.parquet")
    assert load_records(str(tmp_path / "out"), "train")[:] == records[:]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_shard_rows": 0}, "`max_shard_rows` must be at least 1"), ({"max_shard_bytes": 0}, "`max_shard_bytes`")],
)
def test_bad_limits(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_records([], tmp_path, **options)


def test_a_folder_that_holds_shards_and_a_record_without_an_image(tmp_path):
    save_records([make_scene(0, size=32)], tmp_path)
    with pytest.raises(ValueError, match="`folder` must hold no shard of the split 'train'"):
        save_records([make_scene(0, size=32)], tmp_path)
    for image in ({"bytes": None, "path": None}, {"bytes": b"x", "path": None}, {"bytes": None, "path": "gone.png"}):
        records = [make_scene(0, size=32), {**make_scene(1, size=32), "image": image}]
        with pytest.raises(ValueError, match=r"`records\[1\]` must have an image that can be read"):
            save_records(records, tmp_path, "test")
    assert not list(tmp_path.glob("test*")) and not list(tmp_path.glob(".*"))


def image_folder(folder):
    """A dataset of `datasets` whose images lie in files, as in docs/data.md."""
    folder.mkdir()
    for number in range(3):
        make_scene(number, size=32)["image"].save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "caption": "a scene"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rest = {"width": 32, "height": 32, "alt_text": None, "regions": []}
    photos = load_dataset("imagefolder", data_dir=str(folder), split="train")
    return photos.map(
        lambda row: {**rest, "captions": [row["caption"]]}, remove_columns=["caption"], features=record_features()
    )


def test_images_of_files_are_in_the_shards(tmp_path):
    own = image_folder(tmp_path / "photos")
    save_records(own, tmp_path / "own")
    own.to_parquet(tmp_path / "paths" / "train-00000.parquet")
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    cells = pq.read_table(tmp_path / "own").column("image").to_pylist()
    assert all(cell["bytes"] and cell["path"] == f"{number}.png" for number, cell in enumerate(cells))
    for number, record in enumerate(load_records(str(tmp_path / "own"), "train")):
        validate_record(record)
        assert record["image"].convert("RGB").tobytes() == make_scene(number, size=32)["image"].tobytes()
    assert "| train | 3 | 1 |" in hub.write_dataset_card(tmp_path / "own", "org/own", "vesl").read_text()
    # What `datasets` writes has none, and is not published.
    with pytest.raises(
        ValueError, match="paths/train-00000.parquet' holds no bytes of 3 of its images: .*save_records"
    ):
        hub.publish_dataset(tmp_path / "paths", "org/paths", "vesl")


def test_no_path_of_this_machine_is_published(tmp_path):
    for name in ("/home/me/a.png", "C:\\photos\\a.png", "file:///a.png", "\\\\host\\a.png"):
        cells = pa.array([{"bytes": b"x", "path": "a.png"}, {"bytes": b"y", "path": name}])
        pq.write_table(pa.table({"image": cells}), tmp_path / "train-00000.parquet")
        with pytest.raises(ValueError, match="names an image by a path of this machine"):
            hub.write_dataset_card(tmp_path, "org/name", "vesl")


# Streams.


def streamed(folder, count, warnings=None):
    stream = RecordStream(stream_records(str(folder), "train"), shuffle_buffer=3, max_corrupt_share=0.9)
    stream.max_corrupt_share = 0.99
    return [record["captions"][0] for record in itertools.islice(stream, count)]


def small(number):
    return {**make_scene(number, size=32), "captions": [f"scene {number}"]}


@pytest.fixture
def warnings(monkeypatch):
    from transformers.utils import logging

    found = []
    monkeypatch.setattr(logging.get_logger("pixclip_hf.data.streaming"), "warning", found.append)
    return found


def test_a_stream_goes_on_behind_a_broken_parquet_shard(tmp_path, warnings):
    save_records(map(small, range(6)), tmp_path, max_shard_rows=2)
    path = tmp_path / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert set(streamed(tmp_path, 8)) == {f"scene {number}" for number in (0, 1, 4, 5)}
    assert any("the rest of '" in warning and "train-00001.parquet" in warning for warning in warnings)
    path.write_bytes(b"")
    assert len(set(streamed(tmp_path, 8))) == 4
    for other in tmp_path.glob("*.parquet"):
        other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="has no Parquet file that can be read"):
        stream_records(str(tmp_path), "train")


def write_tar(path, records):
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(records):
            buffer = io.BytesIO()
            record.pop("image").save(buffer, "PNG")
            for ending, content in (("png", buffer.getvalue()), ("json", json.dumps(record).encode())):
                entry = tarfile.TarInfo(f"{number:08d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_a_stream_goes_on_behind_broken_tars_and_files_in_them(tmp_path, warnings):
    for shard in range(3):
        write_tar(tmp_path / f"train-{shard}.tar", map(small, range(3 * shard, 3 * shard + 3)))
    whole = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[: len(whole) // 2])
    found = streamed(tmp_path, 30)
    assert {f"scene {number}" for number in (0, 1, 2, 3, 6, 7, 8)} <= set(found) and "scene 5" not in found
    assert any("the rest of '" in warning and "train-1.tar" in warning for warning in warnings)
    # One `json` that is none, one that is no record, one image without.
    content = whole.replace(b'{"width"', b'["width"', 1)
    (tmp_path / "train-1.tar").write_bytes(content)
    found = streamed(tmp_path, 30)
    assert {f"scene {number}" for number in (0, 1, 2, 4, 5, 6, 7, 8)} == set(found)
    assert any("record '00000000' of" in warning and "JSONDecodeError" in warning for warning in warnings)


def test_cells_without_an_image_and_with_one_elsewhere(tmp_path, warnings):
    """Null, null in both fields, addresses and files outside of the folder: skipped, and never fetched."""
    scene = small(0)
    buffer = io.BytesIO()
    scene["image"].save(buffer, "PNG")
    (tmp_path / "private.png").write_bytes(buffer.getvalue())
    cells = [
        {"bytes": buffer.getvalue(), "path": None}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": None},
        {"bytes": None, "path": "http://127.0.0.1:1/x.png"}, {"bytes": None, "path": str(tmp_path / "private.png")},
        {"bytes": None, "path": "../private.png"},
    ]  # fmt: skip
    rows = [{**scene, "captions": [str(number)], "image": cell} for number, cell in enumerate(cells)]
    table = pa.Table.from_pylist(rows, schema=record_features().arrow_schema)
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/train-00000.parquet")
    for folder in (None, tmp_path / "data"):
        stream = RecordStream(stream_records(str(tmp_path / "data"), "train"), max_corrupt_share=0.99, folder=folder)
        assert [record["captions"] for record in itertools.islice(stream, 3)] == [["0"]] * 3
    with pytest.raises(ValueError, match="holds no bytes of 5 of its images"):
        hub.write_dataset_card(tmp_path / "data", "org/name", "vesl")


def test_tars_of_other_content_are_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("a.txt", "b.json"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"must hold one image and a `json` a record, got \['json', 'txt'\]"):
        stream_shards.shard_reader([str(tmp_path / "train.tar")], "org/name")


def test_an_annotation_run_writes_tables_of_any_size(tmp_path, monkeypatch):
    from pixclip_hf.annotation.passes import output_features

    monkeypatch.setattr(parquet_shards, "_GROUP_BYTES", 2_000)
    rows = [{**small(number), "record_id": str(number), "steps": []} for number in range(9)]
    rows = [{**row, "image": {"bytes": bytes(900), "path": None}} for row in rows]
    parquet_shards.write_parquet(tmp_path / "train-00000.parquet", rows, output_features())
    with pq.ParquetFile(tmp_path / "train-00000.parquet") as file:
        assert file.num_row_groups == 5
    found = load_dataset("parquet", data_files=str(tmp_path / "train-00000.parquet"), split="train")
    assert found.features == output_features() and found["record_id"] == [str(number) for number in range(9)]
    parquet_shards.write_parquet(tmp_path / "none.parquet", [], output_features())
    assert pq.read_metadata(tmp_path / "none.parquet").num_rows == 0


def test_scenes_are_saved_as_they_are(tmp_path):
    scenes = scenes_dataset(3, size=32)
    save_records(scenes, tmp_path)
    saved = load_records(str(tmp_path), "train")
    encoded = datasets.Image(decode=False)
    assert saved.cast_column("image", encoded)[:] == scenes.cast_column("image", encoded)[:]
