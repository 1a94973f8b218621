"""Files of a run or a cache that were cut or changed are named, and made again or refused."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pixclip_hf import RegionEncoder, save_records
from pixclip_hf.data.parquet_shards import ParquetShards, small_batches
from pixclip_hf.data.source_index import Index, Row, build_index
from pixclip_hf.data.stream_shards import BROKEN_SHARD, parquet_rows
from pixclip_hf.data.whole_files import file_fault, file_record, read_unchanged
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.jobs.folder import SIZES, JobFolder, file_sizes, manifest_path, write_json
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.search.store_folder import _read_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def flip(path, at=0.5):
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", (cut, flip))
def test_a_shard_of_the_encoders_cache_is_computed_again(damage, tiny_cloc, tmp_path, caplog):
    def encode():
        encoder = CachedEncoder(RegionEncoder(*tiny_cloc), tmp_path / "shards", progress=False)
        return encoder.encode_images([Image.new("RGB", (40, 30), "red")]), encoder.computed

    first, computed = encode()
    assert computed == 1 and encode()[1] == 0
    (shard,) = (tmp_path / "shards").iterdir()
    damage(shard) if damage is cut else flip(shard, 1 - 20 / shard.stat().st_size)
    again, computed = encode()
    assert computed == 1 and torch.equal(first, again) and shard.name in caplog.text
    assert encode()[1] == 0


def test_rows_that_share_a_value_are_read_some_at_a_time(tmp_path):
    """What the file says of its size counts that value once."""
    image = {"bytes": b"x" * 10**6, "path": None}
    rows = pa.Table.from_pylist([{"image": image}] * 2000)
    pq.write_table(rows, tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        group = file.metadata.row_group(0)
        assert group.num_rows == 2000 and group.total_byte_size < 2 * 10**6
        assert [len(batch) for batch in small_batches(file)] == [100] * 20


@pytest.mark.parametrize("damage", (cut, flip))
def test_a_shard_between_two_passes_is_refused_by_name(damage, tmp_path):
    table = pa.table({"a": [bytes([value]) * 999 for value in range(99)]})
    plain = {"compression": "none", "use_dictionary": False}  # of which nothing but a checksum finds the change
    pq.write_table(table, tmp_path / "00007", write_page_checksum=True, **plain)
    assert read_unchanged(tmp_path / "00007", "x") == table
    damage(tmp_path / "00007")
    with pytest.raises(ValueError, match="00007' is damaged: .* Delete it and run `x` again"):
        read_unchanged(tmp_path / "00007", "x")


@pytest.mark.parametrize("record", (None, {}, [], ["x"], [3], [3, 4], [True, "x"], "12", 7))
def test_a_checksum_that_is_none_is_a_fault(record, tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    assert file_fault(tmp_path / "a", record) == "has a checksum that can't be read"
    assert file_fault(tmp_path / "a", file_record(tmp_path / "a")) is None


@pytest.mark.parametrize("damage", (cut, flip))
def test_an_index_is_made_again(damage, tmp_path, caplog):
    def build():
        return Index([build_index("key", lambda notes: (made.append(1), [Row(f"{i}") for i in range(9)])[1])])

    made = []
    digest = build().digest
    assert build().digest == digest and len(made) == 1
    damage(tmp_path / "cache" / "pixclip_hf" / "key.arrow")
    assert [row.name for row in build().rows()] == [f"{i}" for i in range(9)] and len(made) == 2
    assert "key.arrow' has " in caplog.text
    (tmp_path / "cache" / "pixclip_hf" / "key.json").write_text("{")
    assert build().digest == digest and len(made) == 3


def parquet(folder, rows=3):
    (path,) = save_records([make_scene(index, size=32) for index in range(rows)], folder)
    return path


def test_records_that_were_changed_in_their_shard_are_refused_by_its_name(tmp_path):
    path = parquet(tmp_path / "records")
    assert len(list(parquet_rows([str(path)]))) == 3
    chunk = pq.read_metadata(path).row_group(0).column(0)
    flip(path, (chunk.data_page_offset + chunk.total_compressed_size // 2) / path.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00000.parquet' cannot be read as Parquet: .*(?i:checksum|crc)"):
        ParquetShards([str(path)], "records").make([0], ["image"])
    (row,) = parquet_rows([str(path)])
    assert row[BROKEN_SHARD] == str(path) and "CRC" in row["reason"]


def test_the_cache_of_a_shard_is_made_again(tmp_path, caplog):
    shards = ParquetShards([str(parquet(tmp_path / "records"))], "records")
    names = shards.make([0, 1, 2], ["captions"]).to_pylist()
    (cache,) = (tmp_path / "cache" / "pixclip_hf").glob("*.parquet.arrow")
    with pa.ipc.open_stream(str(cache)) as reader:
        schema = reader.schema
    with pa.ipc.new_stream(str(cache), schema):
        pass  # a whole file of no rows
    again = ParquetShards(shards.paths, "records")
    assert again.make([0, 1, 2], ["captions"]).to_pylist() == names and "is damaged and is made again" in caplog.text
    cut(cache)
    assert ParquetShards(shards.paths, "records").make([2], ["captions"]).to_pylist() == names[2:]


def test_a_shard_of_a_run_is_done_again(tmp_path, caplog):
    folder = JobFolder(tmp_path / "run", "run.json")
    with folder.claimed({"a": 1}):
        for number in range(4):
            path = folder.path / "data" / f"{number}.parquet"
            path.write_bytes(b"0123456789")
            write_json(manifest_path(folder.path, number), {SIZES: file_sizes(folder.path, [path])})
    write_json(manifest_path(folder.path, 4), {"of": "an earlier version"})
    assert folder.done(5).tolist() == [True] * 5
    cut(folder.path / "data" / "1.parquet")
    (folder.path / "data" / "2.parquet").unlink()
    manifest_path(folder.path, 3).write_text("{")
    assert folder.done(5).tolist() == [True, False, False, False, True]
    assert "data/1.parquet has 5 bytes and not 10" in caplog.text and "data/2.parquet is missing" in caplog.text
    assert not manifest_path(folder.path, 3).exists()


def test_embeddings_that_were_changed_are_refused_by_name(tmp_path):
    path = tmp_path / "train-00000.parquet"
    pq.write_table(pa.table({"embedding": list(range(1000))}), path, write_page_checksum=True, compression="none")
    assert len(_read_shard(path)) == 1000
    flip(path, 0.3)
    with pytest.raises(ValueError, match="train-00000.parquet' is damaged.*Delete it"):
        _read_shard(path)
