"""Collections with images that cannot be read, and indexes that cannot be made."""

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf.embedding.folder import embedding_counts
from pixclip_hf.embedding.passes import EncoderChoice
from pixclip_hf.embedding.regions import Grid
from pixclip_hf.embedding.run import embed
from pixclip_hf.search.index import check_index, open_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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
    hits = rows.select(range(2))[:]
    assert [image.size for image in open_images(folder.path, [hits]).values()] == [(30, 40), (30, 40)]
    assert embedding_counts(folder.path)["image left out: not readable"] == 1


def test_an_index_that_cannot_be_made_is_refused(tmp_path):
    check_index("Flat", 128)
    for factory in ("PQ60", "no such index"):
        with pytest.raises(ValueError, match=f"`--index` must be an index of 128 dimensions, got '{factory}'"):
            check_index(factory, 128)
