"""Search: what it finds, what it leaves on disk, and its guide."""

import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf.data.sources import cached_source
from pixclip_hf.scenes.dataset import make_scene

pytest.importorskip("lancedb", reason="needs pip install pixclip-hf[search]")
pytest.importorskip("qdrant_client", reason="needs pip install pixclip-hf[search]")

from pixclip_hf import CLOCConfig, CLOCModel, cli  # noqa: E402
from pixclip_hf.embedding import command as embedding  # noqa: E402
from pixclip_hf.encoders.region_encoder import RegionEncoder  # noqa: E402
from pixclip_hf.processing.processing_regions import decode_rle  # noqa: E402
from pixclip_hf.search import Collection, Filter, Query, command  # noqa: E402
from pixclip_hf.search.collection import same_box  # noqa: E402
from pixclip_hf.search.queries import NEGATIVE_WEIGHT  # noqa: E402
from pixclip_hf.search.store import STORES  # noqa: E402

GUIDE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
MODEL = ["--model", "runs/demo/cloc"]


@pytest.fixture
def folder(tmp_path, tiny_cloc, monkeypatch):
    """A working folder with a model at the demo's place and photographs in a folder of folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "runs/demo/cloc")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "more/b.jpg")):
        make_scene(number, size=48)["image"].save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def stored(folder):
    rows = datasets.load_dataset("parquet", data_files=str(folder / "data/*.parquet"), split="train")
    return rows.filter(lambda kind: kind == "region", input_columns="kind")


def embed_scenes(number=10):
    embedding.main(
        ["--source", f"scenes:{number}", *MODEL, "--batch_size", "2", "--shard_size", "4", "--output", "out"]
    )


@pytest.mark.parametrize("store", STORES)
def test_scenes(folder, tiny_cloc, store):
    embed_scenes()
    hits = command.search(["out", "--store", store, "--top", "4", "--output_dir", "sheets"])
    regions = stored(folder / "out")
    # The hits are those of a plain product.
    lines = [json.loads(line) for line in (folder / "sheets/hits.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and Image.open(folder / "sheets/hits.png").width > 200
    queries = list(dict.fromkeys(line["query"] for line in lines))
    assert len(queries) == 3 and set(queries) <= set(regions["text"])
    embeds = RegionEncoder(*tiny_cloc).encode_texts(queries)
    scores = embeds @ np.array(regions["embedding"], dtype=np.float32).T
    for i, own in enumerate(scores):
        best = np.argsort(-own)[:4]
        assert [hit.cosine for hit in hits[i]] == pytest.approx(own[best], abs=1e-3)
        assert [(line["rank"], line["id"]) for line in lines[4 * i : 4 * i + 4]] == [
            (rank, hit.id) for rank, hit in enumerate(hits[i], 1)
        ]


def test_regions_and_images_find_themselves(folder, tiny_cloc):
    embed_scenes()
    image = make_scene(3, size=64)
    image["image"].save("query.png")
    box, mask = image["regions"][0]["box"], decode_rle(image["regions"][0]["mask"])
    Image.fromarray(mask.astype(np.uint8) * 255).save("mask.png")
    found = command.search(["out", "--store", "exact", "--image", "query.png", "--box", *map(str, box)])
    (by_mask,) = command.search(["out", "--store", "exact", "--image", "query.png", "--mask", "mask.png"])
    encoder = RegionEncoder(*tiny_cloc)
    own = encoder.encode_regions([image["image"]], boxes=[[box]])[0][0]
    regions = stored(folder / "out")
    scores = np.array(regions["embedding"], dtype=np.float32) @ own
    assert [hit.cosine for hit in found[0]] == pytest.approx(np.sort(scores)[::-1][:6], abs=1e-3)
    # CLOC is prompted by the tight box of a mask.
    assert [hit.id for hit in by_mask] == [hit.id for hit in found[0]]
    (whole,) = command.search(["out", "--store", "exact", "--image", "query.png", "--kinds", "image"])
    assert whole[0].box is None and whole[0].kind == "image"
    scores = np.array(regions["embedding"], dtype=np.float32) @ encoder.encode_images([image["image"]])[0]
    (hits,) = command.search(["out", "--store", "exact", "--image", "query.png"])
    assert [hit.cosine for hit in hits] == pytest.approx(np.sort(scores)[::-1][:6], abs=1e-3)

    # An embedding of the collection is not among its own hits, and needs no model.
    shutil.rmtree("runs/demo/cloc")
    name = regions["id"][0]
    (hits,) = command.search(["out", "--store", "exact", "--id", name, "--top", "1000"])
    assert sorted([name, *(hit.id for hit in hits)]) == sorted(regions["id"])


def test_points_find_regions(folder, tiny_cloc):
    """By a model that they prompt, whose regions a point inside each prompted; another one says what to do."""
    embed_scenes(3)
    make_scene(3, size=64)["image"].save("query.png")
    asked = ["--store", "exact", "--image", "query.png", "--points", "10", "12", "--points", "40", "41", "44", "50"]
    with pytest.raises(ValueError, match="`points` must be None: they prompt no such CLOCModel. Make masks of them"):
        command.search(["out", *asked])
    config = CLOCConfig.from_dict({**tiny_cloc[0].config.to_dict(), "prompter_points": True})
    for part in (CLOCModel(config), tiny_cloc[1]):
        part.save_pretrained("points")
    given = ["--source", "scenes:3", "--model", "points", "--prompt", "point", "--output", "by points"]
    embedding.main([*given, "--kinds", "region"])
    hits = command.search(["by points", *asked, "--top", "100"])
    encoder = RegionEncoder.from_pretrained("points", prompt="point")
    own = encoder.encode_regions("query.png", points=[[[10, 12]], [[40, 41], [44, 50]]])
    records = [make_scene(index) for index in range(3)]
    regions = np.concatenate(encoder.encode_records(records))
    for found, vector in zip(hits, own, strict=True):
        assert [hit.cosine for hit in found] == pytest.approx(np.sort(regions @ vector)[::-1], abs=1e-3)
    labels = [line["query"] for line in map(json.loads, Path("by points/hits.jsonl").read_text().splitlines())]
    assert set(labels) == {"what is at [10, 12] in query.png", "what is at [40, 41], [44, 50] in query.png"}
    with pytest.raises(ValueError, match="`--points` must be pairs of x and y, got 3 numbers"):
        command.search(["out", "--image", "query.png", "--points", "1", "2", "3"])
    with pytest.raises(ValueError, match=r"points\[0\]\[0\] must lie in its image of width 64"):
        command.search(["by points", "--image", "query.png", "--points", "65", "2"])
    with pytest.raises(ValueError, match="must have one of box, mask and points, got box and points"):
        Query(image="query.png", box=[0, 0, 9, 9], points=[[1, 2]])


def test_negative_queries_filters_and_duplicates(folder, tiny_cloc):
    embed_scenes()
    collection = Collection("out", "exact")
    encoder = RegionEncoder(*tiny_cloc)
    text, negative = encoder.encode_texts(["a star", "red"])
    (hits,) = collection.search(Query(text="a star", negative=("red",)), top=1000)
    vector = text - NEGATIVE_WEIGHT * negative
    regions = stored(folder / "out")
    scores = np.array(regions["embedding"], dtype=np.float32) @ (vector / np.linalg.norm(vector))
    assert [hit.cosine for hit in hits] == pytest.approx(np.sort(scores)[::-1], abs=1e-3)

    where = Filter(categories=("star", "disc"), min_side=12)
    (hits,) = collection.search("a star", top=1000, where=where)
    expected = [
        row["id"]
        for row in regions
        if row["category"] in ("star", "disc")
        and min(row["box"][2] - row["box"][0], row["box"][3] - row["box"][1]) >= 12
    ]
    assert expected and sorted(hit.id for hit in hits) == sorted(expected)

    # All regions are alike enough: one hit holds all others. And without any alike, none is folded.
    (hits,) = collection.search("a star", top=3, fold=-1)
    assert len(hits) == 1 and len(hits[0].duplicates) == len(regions) - 1
    (hits,) = collection.search("a star", top=1000, fold=1)
    embeds = dict(zip(regions["id"], np.array(regions["embedding"], dtype=np.float32), strict=True))
    assert len(hits) + sum(len(hit.duplicates) for hit in hits) == len(regions)
    # A fold that leaves few makes the search look further.
    (some,) = collection.search("a star", top=5, fold=0.5)
    assert len(some) == 5
    for i, hit in enumerate(some):
        assert all(embeds[hit.id] @ embeds[other.id] < 0.5 + 1e-2 for other in some[:i])


def test_boxes_that_overlap_show_the_same():
    assert same_box([0, 0, 10, 10], [0, 0, 10, 7.5]) and not same_box([0, 0, 10, 10], [0, 0, 10, 6.5])
    assert not same_box([0, 0, 10, 10], [20, 20, 30, 30])


def test_the_sheet_tells_right_from_wrong_where_texts_are_known(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr("pixclip_hf.search.sheet.draw_retrieval", lambda *given, title: drawn.append(given))
    embedding.main(["--source", "scenes:10", *MODEL, "--output", "out"])
    texts = list(stored(folder / "out")["text"])
    # Texts may stand behind options.
    command.search(["out", "--top", "1000", texts[0], "nothing of the kind"])
    ((path, queries, rows),) = drawn
    assert str(path) == "out/hits.png" and queries == [texts[0], "nothing of the kind"]
    assert len(rows[0]) == len(texts) and sum(known for _, _, known in rows[0]) == texts.count(texts[0])
    assert all(known is None for _, _, known in rows[1])


def test_grid(folder):
    embedding.main(["--source", "images", "folder=photos", *MODEL, "--grid", "1", "2", "--output", "out"])
    with pytest.raises(ValueError, match="A query is needed"):
        command.search(["out"])
    with pytest.raises(ValueError, match="need the `--image`"):
        command.search(["out", "--box", "0", "0", "5", "5"])
    command.search(["out", "a star", "--output_dir", "sheets"])
    assert Image.open(folder / "sheets/hits.png").width > 200
    (folder / "photos/a.png").unlink()

    cached_source.cache_clear()
    with pytest.raises(FileNotFoundError, match="The image '.*' is no longer where it was"):
        command.search(["out", "a star", "--top", "10"])


def test_no_regions(folder):
    embedding.main(["--source", "images", "folder=photos", *MODEL, "--output", "out"])
    with pytest.raises(ValueError, match="at least one region"):
        command.search(["out", "a star"])
    with pytest.raises(ValueError, match="'nowhere' must be a folder of `pixclip-hf embed`"):
        command.search(["nowhere", "a star"])


def test_a_filter_that_nothing_meets(folder, capsys):
    embed_scenes(2)
    assert command.search(["out", "a star", "--category", "zebra"]) == [[]]
    assert "nothing meets the filters" in capsys.readouterr().out


def test_guide(folder):
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert len(commands) >= 4
    for words in map(shlex.split, commands):
        assert words[0] == "pixclip-hf"
        assert cli.main(words[1:]) == 0
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S):
        exec(compile(block, "search.md", "exec"), names)
    assert len(names["hits"]) == 5 and len(names["alike"][0]) == 5
