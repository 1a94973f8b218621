"""The search example: what it finds, what it leaves on disk, and its guide."""

import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import pixclip_hf
from pixclip_hf.data.scenes import make_scene, scenes_dataset

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "search.md").read_text()

pytest.importorskip("faiss", reason="needs pip install pixclip-hf[search]")


@pytest.fixture
def search(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import search_regions

    return search_regions


@pytest.fixture
def folder(tmp_path, tiny_cloc, monkeypatch):
    """A working folder with a model at the demo's place and photographs in a folder of folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "runs/demo/cloc")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "more/b.jpg")):
        make_scene(index, size=48)["image"].save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def stored(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "regions-*.parquet"), split="train")


def test_scenes(search, folder, tiny_cloc, monkeypatch):
    monkeypatch.setattr(search.write_shards, "__defaults__", (2,))
    sheets = []
    monkeypatch.setattr(search, "draw_retrieval", lambda path, queries, rows, title: sheets.append((queries, rows)))
    report = search.main(["--scenes", "10", "--batch_size", "2", "--top", "4", "--output_dir", "out"])
    regions = stored(folder / "out")
    assert len(list((folder / "out").glob("regions-*.parquet"))) == 3
    scenes = [make_scene(index, "test") for index in range(10)]
    assert regions["box"] == [pytest.approx(region["box"]) for scene in scenes for region in scene["regions"]]
    assert report["regions"] == len(regions) and report["pictures"] == 10
    assert json.loads((folder / "out/report.json").read_text()) == report
    # The hits are those of a plain product.
    queries, rows = sheets[0]
    embeds = pixclip_hf.RegionEncoder(*tiny_cloc).encode_texts(queries)
    scores = embeds @ np.array(regions["embedding"], dtype=np.float32).T
    for row, own, query in zip(rows, scores, queries, strict=True):
        best = np.argsort(-own)[:4]
        assert [score for _, score, _ in row] == pytest.approx(own[best], abs=1e-5)
        right = [known for _, _, known in row]
        assert right == ([regions[int(i)]["text"] == query for i in best] if any(right) else [None] * 4)
    with pytest.raises(SystemExit):
        search.main(["--scenes", "2", "--output_dir", "out"])


def test_grid(search, folder):
    search.main(["--images", "photos", "--grid", "1", "2", "--query", "a star", "--output_dir", "out"])
    regions = stored(folder / "out")
    assert set(regions["picture"]) == {"photos/a.png", "photos/more/b.jpg"}
    expected = [[0, 0, 48, 48], [0, 0, 32, 32], [16, 0, 48, 32], [0, 16, 32, 48], [16, 16, 48, 48]]
    assert np.array(regions["box"]) == pytest.approx(np.array(expected * 2))
    assert Image.open(folder / "out/hits.png").width > 200


def test_detector(search, folder, monkeypatch):
    hit = {"box": {"xmin": 4, "ymin": 6, "xmax": 20, "ymax": 30}, "label": "star", "score": 0.9}
    given = []

    def detect(image, threshold):
        given.append(threshold)
        return [hit] if len(given) == 1 else []

    monkeypatch.setattr(search, "pipeline", lambda task, model: detect)
    search.main(["--images", "photos", "--detector", "any/detr", "--batch_size", "1", "--output_dir", "out"])
    assert given == [0.3, 0.3]
    assert stored(folder / "out").remove_columns("embedding")[:] == {
        "picture": ["photos/a.png"], "box": [[4, 6, 20, 30]], "text": ["star"]
    }  # fmt: skip


def test_dataset_with_masks(search, folder, tiny_pixclip):
    for part in tiny_pixclip:
        part.save_pretrained("pixclip")
    scenes_dataset(3, size=48).to_parquet("my-regions/train.parquet")
    report = search.main(["--model", "pixclip", "--dataset", "my-regions", "--output_dir", "out"])
    assert report["regions"] == sum(len(make_scene(index, size=48)["regions"]) for index in range(3))


def test_no_regions(search, folder):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one region"):
        search.main(["--images", "empty", "--query", "a star", "--output_dir", "out"])


def test_guide(search, folder):
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S):
        words = shlex.split(block.replace("\\\n", " "))
        assert words[:2] == ["python", "examples/search_regions.py"]
        search.main([*words[2:], "--scenes", "20"])
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S):
        exec(compile(block, "search.md", "exec"), names)
    assert len(names["hits"]["box"]) == 5 and names["scores"][0] == pytest.approx(1, abs=1e-5)
