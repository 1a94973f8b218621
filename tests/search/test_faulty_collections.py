"""Collections with images that cannot be read, and stores that must not answer."""

import errno
import json
import shutil
import sys

import datasets
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

pytest.importorskip("lancedb", reason="needs pip install pixclip-hf[search]")
pytest.importorskip("qdrant_client", reason="needs pip install pixclip-hf[search]")

from pixclip_hf.cards import public_settings  # noqa: E402
from pixclip_hf.data.whole_files import write_json  # noqa: E402
from pixclip_hf.embedding import command as embedding  # noqa: E402
from pixclip_hf.embedding.encoder_choice import EncoderChoice  # noqa: E402
from pixclip_hf.embedding.folder import EmbeddingFolder, embedding_counts  # noqa: E402
from pixclip_hf.embedding.reading import Reader  # noqa: E402
from pixclip_hf.embedding.regions import Grid  # noqa: E402
from pixclip_hf.embedding.run import embed  # noqa: E402
from pixclip_hf.search import Collection, Filter, Query, StoreOptions, store_folder  # noqa: E402
from pixclip_hf.search.queries import encode_queries  # noqa: E402
from pixclip_hf.search.store import STORES, store_class  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path, tiny_cloc):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    return embed("scenes:6", EncoderChoice(str(tmp_path / "model")), tmp_path / "out", progress=False).path


def test_a_cut_photograph_is_left_out_and_counted(tmp_path, tiny_cloc):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b", "c"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-300])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(pixels).save(tmp_path / ".ipynb_checkpoints/a.jpg")
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    source = ["images", f"folder={tmp_path}"]
    folder = embed(
        source, EncoderChoice(str(tmp_path / "model")), tmp_path / "out", regions=Grid((1,)), progress=False
    )
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/data/*.parquet"), split="train")
    assert rows["image_id"][:] == ["a.jpg", "c.jpg"] * 2 and set(rows["width"]) == {30} and set(rows["height"]) == {40}
    collection = Collection(folder.path, "exact")
    (hits,) = collection.search("a star")
    assert [image.size for image in collection.open_images(hits).values()] == [(30, 40), (30, 40)]
    assert embedding_counts(folder.path)["image left out: not readable"] == 1


@pytest.mark.parametrize(
    ("store", "options", "message"),
    [
        ("lance", {"index": "IVF_PQ", "sub_vectors": 7}, "`sub_vectors` must divide the width of 16, got 7"),
        ("lance", {"index": "FLAT"}, "`index` of the store 'lance' must be one of"),
        ("qdrant", {"index": "IVF_PQ"}, "`index` of the store 'qdrant' must be one of"),
        ("exact", {"index": "IVF_PQ"}, "`index` of the store 'exact' must be one of"),
        ("exact", {"url": "http://there"}, "`url` must be None"),
    ],
)
def test_an_index_that_cannot_be_made_is_refused(folder, store, options, message):
    with pytest.raises(ValueError, match=message):
        Collection(folder, store, StoreOptions(**options))
    assert not (folder / "stores" / store / "store.json").exists()


def test_an_index_that_does_not_fit_the_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'IVF_PQ' does not fit a width of 20"):
        store_class("lance")(tmp_path, "name", 20, "float16", StoreOptions(index="IVF_PQ"))
    with pytest.raises(ValueError, match="`probes` must be at least 1, got 0"):
        StoreOptions(probes=0)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """No image may be read."""

    def read(*arguments):
        raise AssertionError("an image was read")

    monkeypatch.setattr(Reader, "__call__", read)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "IVF_PQ", "--sub_vectors", "7"], "`sub_vectors` must divide the width of 16, got 7"),
        (["--index", "HNSW"], "`index` of the store 'lance' must be one of"),
        (["--probes", "0"], "`probes` must be at least 1, got 0"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_before_anything_is_embedded(
    tmp_path, tiny_cloc, nothing_is_read, options, message
):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    arguments = ["--source", "scenes:6", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        embedding.main([*arguments, "--store", "lance", *options])
    with pytest.raises(ValueError, match="Options of the store need `--store`"):
        embedding.main([*arguments, "--index", "IVF_FLAT"])
    assert not (tmp_path / "out").exists()


def test_a_store_that_takes_no_more_is_refused_before_anything_is_embedded(folder, tmp_path, nothing_is_read):
    """A store of another source, elsewhere; one that the output still has of a run before; and a newer version's."""
    Collection(folder, "exact", place=tmp_path / "own").close()
    arguments = ["--source", "scenes:5", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "new")]
    stored = ["--store", "exact", "--store_dir", str(tmp_path / "own")]
    with pytest.raises(ValueError, match="other embeddings: its source is 'scenes:6', that of the folder 'scenes:5'"):
        embedding.main([*arguments, *stored])
    shutil.copytree(tmp_path / "own", tmp_path / "new/stores/exact")
    with pytest.raises(ValueError, match="other embeddings: its source is 'scenes:6'"):
        embedding.main(arguments)
    path = tmp_path / "new/stores/exact/store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="has format 99, written by pixclip-hf"):
        embedding.main(arguments)
    assert not (tmp_path / "new/embeddings.json").exists()


def test_a_store_that_embedding_builds_is_the_one_that_search_opens(tmp_path, tiny_cloc, capsys):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    arguments = ["--source", "scenes:90", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    embedding.main([*arguments, "--store", "lance", "--index", "IVF_FLAT", "--partitions", "2", "--kinds", "region"])
    assert "lance store" in capsys.readouterr().out
    before = (tmp_path / "out/stores/lance/store.json").read_bytes()
    collection = Collection(tmp_path / "out")
    (index,) = [found.name for found in collection.store.table.list_indices() if found.columns == ["embedding"]]
    assert index.startswith("IVF_FLAT-2-") and (tmp_path / "out/stores/lance/store.json").read_bytes() == before


def test_a_folder_from_the_hub_is_searched_where_the_model_and_the_images_are(folder, tmp_path):
    """What is published: shards and settings, without manifests, and without paths of the machine that embedded."""
    pulled = tmp_path / "pulled"
    shutil.copytree(folder / "data", pulled / "data")
    (pulled / "embeddings.json").write_text(json.dumps(public_settings(folder)))
    expected = Collection(folder, "exact").search("a star")
    collection = Collection(pulled, "exact", model=tmp_path / "model")
    assert collection.search("a star") == expected
    assert collection.open_images(expected[0]).keys() == {hit.image_id for hit in expected[0]}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("when", ["add", "build", "mark"])
def test_a_disk_that_is_full_while_a_store_is_built(folder, store, when, monkeypatch):
    """The next search goes on. LanceDB says it in words alone."""
    kind = store_class(store)
    full = RuntimeError("lance error: IO error: No space left on device (os error 28)")
    if store != "lance" or when == "mark":
        full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*arguments, **options):
        if when != "mark" or arguments[0].parent.name == "shards":
            raise full
        write_json(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"add": (kind, "add"), "build": (kind, "build"), "mark": (store_folder, "write_json")}[when], fails
        )
        with pytest.raises(OSError, match="No space left for the store .* make room and search again") as error:
            Collection(folder, store)
        assert error.value.errno == errno.ENOSPC
    assert not (folder / "stores" / store / "store.json").exists()
    collection = Collection(folder, store)
    assert len(collection) == sum(embedding_counts(folder)[name] for name in ("regions", "images"))
    collection.close()


@pytest.mark.parametrize("store", STORES)
def test_a_store_of_a_newer_version_or_of_other_embeddings_is_refused(folder, store):
    Collection(folder, store).close()
    path = folder / "stores" / store / "store.json"
    stamp = json.loads(path.read_text())
    path.write_text(json.dumps({**stamp, "format_version": 99}))
    with pytest.raises(ValueError, match="has format 99, written by pixclip-hf"):
        Collection(folder, store)
    path.write_text(json.dumps({**stamp, "made": {**stamp["made"], "preprocessing": "another"}}))
    with pytest.raises(ValueError, match="other embeddings: its preprocessing is 'another'"):
        Collection(folder, store)
    path.write_text(json.dumps({**stamp, "store": "another"}))
    with pytest.raises(ValueError, match=f"of kind 'another', got '{store}'"):
        Collection(folder, store)


def test_two_writers_at_once(folder):
    (folder / "stores/lance").mkdir(parents=True)
    with FileLock(folder / "stores/lance/.lock"):
        with pytest.raises(ValueError, match="is being written to by another process"):
            Collection(folder)
    first = Collection(folder, "qdrant")
    with pytest.raises(ValueError, match="is open in another process"):
        Collection(folder, "qdrant")
    first.close()


def test_an_empty_collection_is_refused(folder):
    for manifest in (folder / "shards").glob("*.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="at least one embedding, got none"):
        Collection(folder)


def test_kinds_that_were_not_embedded_are_refused(folder):
    with pytest.raises(ValueError, match="at least one text, got none"):
        Collection(folder, "exact").search("a star", where=Filter(kinds=("text",)))


def test_another_model_is_refused(folder, tmp_path, tiny_cloc):
    model, processor = tiny_cloc
    settings = EmbeddingFolder.open(folder).settings
    assert Collection(folder, "exact", model=tmp_path / "model").search("a star")
    # The same weights elsewhere are the same model.
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "moved")
    assert Collection(folder, "exact", model=tmp_path / "moved").search("a star")

    weight = next(model.parameters())
    kept = weight.data.clone()
    weight.data += 1
    model.save_pretrained(tmp_path / "moved")
    weight.data = kept
    with pytest.raises(ValueError, match="not the one that made the collection.*: its weights is"):
        Collection(folder, "exact", model=tmp_path / "moved").search("a star")

    model.save_pretrained(tmp_path / "moved")
    processor.image_processor.do_normalize = False
    processor.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="its preprocessing is"):
        Collection(folder, "exact", model=tmp_path / "moved").search("a star")
    with pytest.raises(ValueError, match="`model` must be the folder of the collection's model"):
        Collection(folder, "exact", model="org/cloc").search("a star")

    # Of the Hub: name and revision.
    path = folder / "embeddings.json"
    path.write_text(json.dumps({**settings, "model": "org/cloc", "weights": None, "revision": "1" * 40}))
    with pytest.raises(ValueError, match="`model` must be 'org/cloc', which made the collection, got 'org/other'"):
        Collection(folder, "exact", model="org/other", place=tmp_path / "own").search("a star")
    encoder = EncoderChoice(str(tmp_path / "model")).load()
    with pytest.raises(ValueError, match="its model is"):
        Collection(folder, "exact", encoder=encoder, place=tmp_path / "own")
    path.write_text(json.dumps({**settings, "weights": None, "revision": "1" * 40}))
    with pytest.raises(ValueError, match="its revision is"):
        Collection(folder, "exact", encoder=encoder, place=tmp_path / "own2")


def test_a_store_without_its_library_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    monkeypatch.delitem(sys.modules, "pixclip_hf.search.lance_store", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'lancedb: pip install "pixclip-hf\[search\]"'):
        Collection(folder)
    assert len(Collection(folder, "exact"))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "one of text, image and id, got none"),
        ({"text": "a", "id": "b"}, "got text, id"),
        ({"text": " "}, "`text` must say something"),
        ({"text": "a", "box": [0, 0, 1, 1]}, "need the `image`"),
        (
            {"image": "x.jpg", "box": [0, 0, 1, 1], "mask": "m"},
            "must have one of box, mask and points, got box and mask",
        ),
    ],
)
def test_queries_that_say_nothing_are_refused(query, message):
    with pytest.raises(ValueError, match=message):
        Query(**query)


def test_searches_that_cannot_be_answered_are_refused(folder):
    collection = Collection(folder, "exact")
    image = Image.new("RGB", (20, 10))
    for query, message in (
        ([], "`queries` must hold at least one query"),
        (Query(id="nowhere#1"), "`id` must be one of the collection's, got 'nowhere#1'"),
        (Query(image=image, box=[0, 0, 30, 10]), "inside of the image of 20 x 10 pixels"),
        (Query(text="a", negative=(Query(text="b", negative=("c",)),)), "must not have negative queries"),
    ):
        with pytest.raises(ValueError, match=message):
            collection.search(query)
    with pytest.raises(ValueError, match="`top` must be at least 1, got 0"):
        collection.search("a", top=0)
    with pytest.raises(ValueError, match="`fold` must be a cosine"):
        collection.search("a", fold=98)
    with pytest.raises(ValueError, match="`kinds` must be some of"):
        Filter(kinds=("regions",))
    with pytest.raises(ValueError, match=r"`conditions\[0\]` must name one of"):
        Filter(conditions=(("1=1; --", "in", [1]),))
    with pytest.raises(ValueError, match=r"`conditions\[0\]` must use one of"):
        Filter(conditions=(("side", "<", 1),))
    with pytest.raises(ValueError, match="`store` must be one of"):
        Collection(folder, "faiss")


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_queries_of_no_numbers_are_refused(value):
    stored = {"a": np.ones(4, dtype=np.float32), "b": np.array([1, value, 0, 0], dtype=np.float32)}
    assert np.allclose(encode_queries([Query(id="a")], None, stored), 0.5)
    with pytest.raises(ValueError, match="The embedding of the query 'like b' has NaN or infinite values"):
        encode_queries([Query(id="a"), Query(id="b")], None, stored)
