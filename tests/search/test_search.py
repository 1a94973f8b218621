"""Search: what it finds, what it leaves on disk, and its guide."""

import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf.scenes.dataset import make_scene, scenes_dataset

pytest.importorskip("faiss", reason="needs pip install pixclip-hf[search]")

from pixclip_hf import cli  # noqa: E402
from pixclip_hf.encoders.region_encoder import RegionEncoder  # noqa: E402
from pixclip_hf.search import collection, command, index  # noqa: E402

GUIDE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()


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
    return datasets.load_dataset("parquet", data_files=str(folder / "regions-*.parquet"), split="train")


def test_scenes(folder, tiny_cloc, monkeypatch):
    monkeypatch.setattr(index.write_shards, "__defaults__", (2,))
    sheets = []
    monkeypatch.setattr(
        command, "draw_sheet", lambda path, images, queries, hits, title: sheets.append((queries, hits))
    )
    embedded = command.embed(["--scenes", "10", "--batch_size", "2", "--output_dir", "out"])
    report = command.search(["--index_dir", "out", "--top", "4"])
    regions = stored(folder / "out")
    assert len(list((folder / "out").glob("regions-*.parquet"))) == 3
    scenes = [make_scene(number, "test") for number in range(10)]
    assert regions["box"] == [pytest.approx(region["box"]) for scene in scenes for region in scene["regions"]]
    assert report["regions"] == len(regions) and report["pictures"] == 10
    assert json.loads((folder / "out/report.json").read_text()) == report
    assert embedded.items() < report.items() and report["text_milliseconds_a_query"] > 0
    # The hits are those of a plain product.
    queries, hits = sheets[0]
    assert len(queries) == 3 and set(queries) <= set(regions["text"])
    embeds = RegionEncoder(*tiny_cloc).encode_texts(queries)
    scores = embeds @ np.array(regions["embedding"], dtype=np.float32).T
    for found, own in zip(hits, scores, strict=True):
        best = np.argsort(-own)[:4]
        assert found["score"] == pytest.approx(own[best], abs=1e-5)
    with pytest.raises(ValueError, match="'out' holds embeddings already"):
        command.embed(["--scenes", "2", "--output_dir", "out"])


def test_the_sheet_tells_right_from_wrong_where_texts_are_known(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr("pixclip_hf.search.sheet.draw_retrieval", lambda *given, title: drawn.append(given))
    command.embed(["--scenes", "10", "--output_dir", "out"])
    texts = list(stored(folder / "out")["text"])
    command.search(["--index_dir", "out", "--top", "1000", "--query", texts[0], "nothing of the kind"])
    ((path, queries, rows),) = drawn
    assert str(path) == "out/hits.png" and queries == [texts[0], "nothing of the kind"]
    assert len(rows[0]) == len(texts) and sum(known for _, _, known in rows[0]) == texts.count(texts[0])
    assert all(known is None for _, _, known in rows[1])


def test_grid(folder):
    command.embed(["--images", "photos", "--grid", "1", "2", "--output_dir", "out"])
    regions = stored(folder / "out")
    assert set(regions["picture"]) == {"photos/a.png", "photos/more/b.jpg"}
    expected = [[0, 0, 48, 48], [0, 0, 32, 32], [16, 0, 48, 32], [0, 16, 32, 48], [16, 16, 48, 48]]
    assert np.array(regions["box"]) == pytest.approx(np.array(expected * 2))
    with pytest.raises(ValueError, match="`--query` is needed"):
        command.search(["--index_dir", "out"])
    command.search(["--index_dir", "out", "--query", "a star", "--output_dir", "sheets"])
    assert Image.open(folder / "sheets/hits.png").width > 200
    (folder / "photos/a.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 images .* no longer there, 'photos/a.png'"):
        command.search(["--index_dir", "out", "--query", "a star", "--top", "10"])


def test_detector(folder, monkeypatch):
    hit = {"box": {"xmin": 4, "ymin": 6, "xmax": 20, "ymax": 30}, "label": "star", "score": 0.9}
    given = []

    def detect(image, threshold):
        given.append(threshold)
        return [hit] if len(given) == 1 else []

    monkeypatch.setattr(collection, "pipeline", lambda task, model: detect)
    command.embed(["--images", "photos", "--detector", "any/detr", "--batch_size", "1", "--output_dir", "out"])
    assert given == [0.3, 0.3]
    assert stored(folder / "out").remove_columns("embedding")[:] == {
        "picture": ["photos/a.png"], "box": [[4, 6, 20, 30]], "text": ["star"]
    }  # fmt: skip


def test_dataset_with_masks(folder, tiny_pixclip):
    for part in tiny_pixclip:
        part.save_pretrained("pixclip")
    scenes_dataset(3, size=48).to_parquet("my-regions/train.parquet")
    report = command.embed(["--model", "pixclip", "--dataset", "my-regions", "--output_dir", "out"])
    assert report["regions"] == sum(len(make_scene(number, size=48)["regions"]) for number in range(3))


def test_prompt(folder, tiny_cloc):
    """Masks prompt a CLOC where they are asked for."""
    for name, given in (("box", []), ("mask", ["--prompt", "mask"])):
        command.embed(["--scenes", "3", "--output_dir", name, *given])
        encoder = RegionEncoder(*tiny_cloc, prompt=name)
        expected = np.concatenate(encoder.encode_records([make_scene(number, "test") for number in range(3)]))
        assert np.array(stored(folder / name)["embedding"]) == pytest.approx(expected, abs=1e-5)
        assert json.loads((folder / name / "embedding.json").read_text())["prompt"] == name
    boxes, masks = (np.array(stored(folder / name)["embedding"]) for name in ("box", "mask"))
    assert np.abs(boxes - masks).max() > 1e-3


def test_no_regions(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one region"):
        command.embed(["--images", "empty", "--output_dir", "out"])
    with pytest.raises(ValueError, match="`images` must be a folder, got 'nowhere'"):
        command.embed(["--images", "nowhere", "--output_dir", "out"])
    with pytest.raises(ValueError, match="`images` and `dataset` exclude each other, got 'photos' and 'd'"):
        command.embed(["--images", "photos", "--dataset", "d", "--output_dir", "out"])


def test_an_untrained_model_stands_in_for_the_demo(folder, capsys):
    (folder / "runs/demo/cloc").rename(folder / "model")
    command.embed(["--scenes", "3", "--output_dir", "out"])
    command.search(["--index_dir", "out"])
    assert capsys.readouterr().out.count("an untrained model takes its place") == 2
    (folder / "model").rename(folder / "runs/demo/cloc")
    with pytest.raises(ValueError, match="embedded by an untrained model, and 'runs/demo/cloc' is there now"):
        command.search(["--index_dir", "out"])


def test_guide(folder):
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert len(commands) >= 5
    for words in map(shlex.split, commands):
        assert words[0] == "pixclip-hf"
        assert cli.main([*words[1:], *(["--scenes", "20"] if words[1] == "embed" else [])]) == 0
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S):
        exec(compile(block, "search.md", "exec"), names)
    assert len(names["hits"]["box"]) == 5 and names["scores"][0] == pytest.approx(1, abs=1e-5)
