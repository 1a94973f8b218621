"""Every store against exact search by numpy: the same rows for the same question, and what later runs add."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lancedb", reason="needs pip install pixclip-hf[search]")
pytest.importorskip("qdrant_client", reason="needs pip install pixclip-hf[search]")

from pixclip_hf.data.whole_files import write_json  # noqa: E402
from pixclip_hf.embedding.folder import EmbeddingFolder, embedding_features, shard_path  # noqa: E402
from pixclip_hf.search import StoreOptions, lance_store  # noqa: E402
from pixclip_hf.search import store_folder as store_folders  # noqa: E402
from pixclip_hf.search.store import STORES, Filter  # noqa: E402
from pixclip_hf.search.store_folder import open_store  # noqa: E402

WIDTH, ROWS, SHARDS = 16, 60, 3


def make_folder(path, rows=ROWS, shards=SHARDS, dtype="float16"):
    """A folder of embeddings of random directions: every third row an image, some without category or score."""
    generator = np.random.default_rng(0)
    for name in ("data", "shards"):
        (path / name).mkdir(parents=True)
    settings = {"format_version": 1, "width": WIDTH, "dtype": dtype, "model": "m", "kinds": ["region", "image"]}
    (path / "embeddings.json").write_text(json.dumps(settings))
    schema = embedding_features(WIDTH, dtype).arrow_schema
    for number in range(shards):
        vectors = generator.normal(size=(rows, WIDTH))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        described = []
        for i in range(rows):
            name, region = f"it's {number}-{i}.jpg", i % 3 != 0
            side = float(generator.integers(1, 80))
            described.append(
                {
                    "id": f"{name}#0" if region else name,
                    "image_id": name,
                    "kind": "region" if region else "image",
                    "box": [5.0, 5.0, 5.0 + side, 15.0 + side] if region else None,
                    "category": [None, "mug", "dog's bowl"][i % 4 % 3] if region else None,
                    "score": [None, 0.25, 0.75][i % 5 % 3] if region else None,
                    "position": i,
                    "width": 100,
                    "height": 200,
                }
            )
        columns = {name: [row.get(name) for row in described] for name in schema.names if name != "embedding"}
        columns["embedding"] = vectors.astype(dtype).tolist()
        table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        pq.write_table(table, shard_path(path, number))
        (path / "shards" / f"{number:05d}.json").write_text(json.dumps({"positions": [0, rows], "counts": {}}))
    return EmbeddingFolder.open(path)


def rows_of(folder):
    return pa.concat_tables([pq.read_table(path) for path in folder.shards()]).to_pylist()


def exact(folder, vectors, limit, where=lambda row: True):
    """Ids of the rows that meet a condition, nearest first."""
    rows = [row for row in rows_of(folder) if where(row)]
    embeds = np.array([row["embedding"] for row in rows], dtype=np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return [[rows[i]["id"] for i in np.argsort(-own)[:limit]] for own in vectors @ embeds.T]


def vectors_of(count, seed=1):
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ids(tables):
    return [table["id"].to_pylist() for table in tables]


def recall(found, expected):
    return np.mean([len(set(own) & set(best)) / len(best) for own, best in zip(found, expected, strict=True)])


def share(row):
    return 1.0 if row["box"] is None else (row["box"][2] - 5) * (row["box"][3] - 5) / 20_000


CONDITIONS = {
    "none": ((), lambda row: True),
    "kind": (Filter(kinds=("image",)), lambda row: row["kind"] == "image"),
    "category": (
        Filter(categories=("dog's bowl", "cup")),
        lambda row: row["kind"] == "region" and row["category"] == "dog's bowl",
    ),
    "score": (Filter(min_score=0.5), lambda row: (row["score"] or 0) >= 0.5),
    "side": (Filter(min_side=40), lambda row: row["kind"] == "region" and row["box"][2] - 5 >= 40),
    "share": (
        Filter(kinds=("region", "image"), min_share=0.1, max_share=0.2),
        lambda row: 0.1 <= share(row) <= 0.2,
    ),
    "column": (
        Filter(conditions=(("position", "<=", 20), ("image_id", "in", ["it's 0-4.jpg", "it's 1-50.jpg"]))),
        lambda row: row["id"] == "it's 0-4.jpg#0",
    ),
}


@pytest.mark.parametrize("store", STORES)
def test_hits_are_those_of_a_plain_product(tmp_path, store):
    folder = make_folder(tmp_path)
    opened, vectors = open_store(folder, store), vectors_of(5)
    assert len(opened) == ROWS * SHARDS
    for name, (where, meets) in CONDITIONS.items():
        found = ids(opened.search(vectors, 7, where.all_conditions() if where else ()))
        expected = exact(folder, vectors, 7, meets)
        assert found == expected and expected[0], name
    # All of them: not more, none twice. Far from the query, float16 may swap neighbors.
    everything = ids(opened.search(vectors, 1000))
    assert list(map(sorted, everything)) == list(map(sorted, exact(folder, vectors, 1000)))
    # Rows come back whole.
    rows = {row["id"]: row for row in rows_of(folder)}
    wanted = ["it's 1-4.jpg#0", "it's 2-3.jpg"]
    fetched = opened.fetch([*wanted, "nowhere"]).to_pylist()
    assert sorted(row["id"] for row in fetched) == wanted
    for row in fetched:
        own = rows[row["id"]]
        assert row["embedding"] == pytest.approx(own.pop("embedding"), abs=1e-3)
        assert {name: row[name] for name in own} == own
    opened.close()


@pytest.mark.parametrize("store", STORES)
def test_later_shards_are_added_once_whoever_is_killed(tmp_path, store, monkeypatch):
    folder = make_folder(tmp_path / "all")
    for number in (0, 2):
        (tmp_path / f"all/shards/0000{number}.json").rename(tmp_path / f"{number}.json")
    opened = open_store(folder, store)
    assert len(opened) == ROWS
    opened.close()
    shutil.move(tmp_path / "2.json", tmp_path / "all/shards/00002.json")

    # Killed when the rows of the shard are in the store and it is not marked as done; a shard before it comes late.
    class Killed(BaseException):
        pass

    def die(path, content):
        if path.parent.name == "shards":
            raise Killed
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store_folders, "write_json", die)
        with pytest.raises(Killed):
            open_store(folder, store)
    shutil.move(tmp_path / "0.json", tmp_path / "all/shards/00000.json")
    opened, vectors = open_store(folder, store), vectors_of(3)
    assert len(opened) == ROWS * SHARDS
    assert ids(opened.search(vectors, 9)) == exact(folder, vectors, 9)
    opened.close()
    # Nothing is added twice.
    opened = open_store(folder, store)
    assert len(opened) == ROWS * SHARDS
    opened.close()


def test_files_of_many_shards_are_joined(tmp_path, monkeypatch):
    """A version of a LanceDB table lists all files of the table: with one per shard, shards would add up squared."""
    monkeypatch.setattr(lance_store, "COMPACTED", 3)
    monkeypatch.setattr(lance_store.LanceStore, "build", lambda self: None)
    opened = open_store(make_folder(tmp_path, rows=5, shards=8), "lance")
    assert len(opened) == 40 and opened.table.stats()["fragment_stats"]["num_fragments"] == 3


@pytest.mark.parametrize("index", ["IVF_PQ", "IVF_SQ", "IVF_FLAT", "IVF_RQ", "IVF_HNSW_SQ"])
def test_indexes_of_lance(tmp_path, index):
    folder = make_folder(tmp_path, rows=300)
    vectors = vectors_of(20)
    options = StoreOptions(index=index, partitions=4, probes=4, sub_vectors=8 if index == "IVF_PQ" else None)
    opened = open_store(folder, "lance", options)
    (built,) = [found for found in opened.table.list_indices() if found.columns == ["embedding"]]
    assert built.name.startswith(f"{index}-4-")
    expected = exact(folder, vectors, 10)
    # The codes of IVF_RQ are drawn anew in each run: where as many hits are asked for that every row is a candidate,
    # they decide nothing.
    hits, least = (50, 0.99) if index == "IVF_RQ" else (10, 0.95)
    found = [row[:10] for row in ids(opened.search(vectors, hits))]
    assert recall(found, expected) >= least
    # An index is kept while its options are the same, and goes where an exact search is asked for.
    again = open_store(folder, "lance", options)
    assert [found.name for found in again.table.list_indices() if found.columns == ["embedding"]] == [built.name]
    without = open_store(folder, "lance", StoreOptions(index="none"))
    assert not [found for found in without.table.list_indices() if found.columns == ["embedding"]]
    # Distances of float16 may swap two neighbors.
    assert recall(ids(without.search(vectors, 10)), expected) >= 0.99


def test_a_fifth_of_the_partitions_is_looked_at(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, rows=300)
    opened, probed = open_store(folder, "lance", StoreOptions(index="IVF_FLAT", partitions=200)), []
    builder = type(opened.table.search(vectors_of(1)[0], vector_column_name="embedding"))
    look_at = builder.nprobes
    monkeypatch.setattr(builder, "nprobes", lambda self, probes: probed.append(probes) or look_at(self, probes))
    opened.search(vectors_of(2), 10)
    open_store(folder, "lance", StoreOptions(probes=3)).search(vectors_of(1), 10)
    open_store(folder, "lance", StoreOptions(index="IVF_FLAT", partitions=10)).search(vectors_of(1), 10)
    assert probed == [40, 40, 3, 20]


def test_new_rows_are_found_beside_an_index(tmp_path):
    folder = make_folder(tmp_path, rows=300)
    late = tmp_path / "shards/00002.json"
    late.rename(tmp_path / "late.json")
    options = StoreOptions(index="IVF_FLAT", partitions=4, probes=4)
    first = open_store(folder, "lance", options)
    name = first.table.list_indices()[0].name
    (tmp_path / "late.json").rename(late)
    opened, vectors = open_store(folder, "lance", options), vectors_of(5)
    assert name in [found.name for found in opened.table.list_indices()]
    assert recall(ids(opened.search(vectors, 10)), exact(folder, vectors, 10)) >= 0.99


def test_a_place_of_its_own(tmp_path):
    folder = make_folder(tmp_path / "out")
    options = StoreOptions(url=str(tmp_path / "elsewhere"))
    assert len(open_store(folder, "lance", options, tmp_path / "store")) == ROWS * SHARDS
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "out/stores").exists()
    with pytest.raises(ValueError, match="keeps its rows at `url`"):
        open_store(folder, "lance", None, tmp_path / "store")


def test_a_password_in_an_address_is_not_kept():
    options = StoreOptions(url="https://me:cret@host:6333/x?key=cret", index="HNSW")
    assert store_folders._index(options)["url"] == "https://host:6333/x"
    assert "cret" not in repr(options)
    assert store_folders._index(StoreOptions(url="/a#b?c@d"))["url"] == "/a#b?c@d"


@pytest.mark.parametrize("store", STORES)
def test_float32(tmp_path, store):
    folder = make_folder(tmp_path, dtype="float32")
    opened, vectors = open_store(folder, store), vectors_of(3)
    assert ids(opened.search(vectors, 5)) == exact(folder, vectors, 5)
    opened.close()
