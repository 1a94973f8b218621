"""Search: what it finds, what it leaves on disk, and its guide."""

import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf.data.sources import cached_source
from pixclip_hf.scenes.dataset import make_scene

pytest.importorskip("faiss", reason="needs pip install pixclip-hf[search]")

from pixclip_hf import cli  # noqa: E402
from pixclip_hf.embedding import command as embedding  # noqa: E402
from pixclip_hf.encoders.region_encoder import RegionEncoder  # noqa: E402
from pixclip_hf.search import command  # noqa: E402

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


def test_scenes(folder, tiny_cloc, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        command, "draw_sheet", lambda path, images, queries, hits, title: sheets.append((queries, hits))
    )
    embedding.main(["--source", "scenes:10", *MODEL, "--batch_size", "2", "--shard_size", "4", "--output", "out"])
    report = command.search(["--index_dir", "out", "--top", "4"])
    regions = stored(folder / "out")
    assert report["regions"] == len(regions) and report["text_milliseconds_a_query"] > 0
    assert json.loads((folder / "out/report.json").read_text()) == report
    # The hits are those of a plain product.
    queries, hits = sheets[0]
    assert len(queries) == 3 and set(queries) <= set(regions["text"])
    embeds = RegionEncoder(*tiny_cloc).encode_texts(queries)
    scores = embeds @ np.array(regions["embedding"], dtype=np.float32).T
    for found, own in zip(hits, scores, strict=True):
        best = np.argsort(-own)[:4]
        assert found["score"] == pytest.approx(own[best], abs=1e-5)


def test_the_sheet_tells_right_from_wrong_where_texts_are_known(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr("pixclip_hf.search.sheet.draw_retrieval", lambda *given, title: drawn.append(given))
    embedding.main(["--source", "scenes:10", *MODEL, "--output", "out"])
    texts = list(stored(folder / "out")["text"])
    command.search(["--index_dir", "out", "--top", "1000", "--query", texts[0], "nothing of the kind"])
    ((path, queries, rows),) = drawn
    assert str(path) == "out/hits.png" and queries == [texts[0], "nothing of the kind"]
    assert len(rows[0]) == len(texts) and sum(known for _, _, known in rows[0]) == texts.count(texts[0])
    assert all(known is None for _, _, known in rows[1])


def test_grid(folder):
    embedding.main(["--source", "images", "folder=photos", *MODEL, "--grid", "1", "2", "--output", "out"])
    with pytest.raises(ValueError, match="`--query` is needed"):
        command.search(["--index_dir", "out"])
    command.search(["--index_dir", "out", "--query", "a star", "--output_dir", "sheets"])
    assert Image.open(folder / "sheets/hits.png").width > 200
    (folder / "photos/a.png").unlink()

    cached_source.cache_clear()
    with pytest.raises(FileNotFoundError, match="The image '.*' is no longer where it was"):
        command.search(["--index_dir", "out", "--query", "a star", "--top", "10"])


def test_no_regions(folder):
    embedding.main(["--source", "images", "folder=photos", *MODEL, "--output", "out"])
    with pytest.raises(ValueError, match="at least one region"):
        command.search(["--index_dir", "out", "--query", "a star"])
    with pytest.raises(ValueError, match="'nowhere' must be a folder of `pixclip-hf embed`"):
        command.search(["--index_dir", "nowhere", "--query", "a star"])


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
    assert len(names["hits"]["box"]) == 5 and names["scores"][0] == pytest.approx(1, abs=1e-3)
