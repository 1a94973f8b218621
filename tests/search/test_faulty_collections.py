"""Collections with images that cannot be read, and indexes that cannot be made."""

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf.search.collection import Collection
from pixclip_hf.search.index import check_index


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_cut_photograph_is_passed_over_by_name(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b", "c"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-300])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(pixels).save(tmp_path / ".ipynb_checkpoints/a.jpg")
    for collection in (Collection(images=str(tmp_path)), Collection(source=["images", f"folder={tmp_path}"])):
        found = list(collection.read())
        assert [image["image"].size for image in found] == [(30, 40), (30, 40)]
        assert set(collection.open_images({image["name"] for image in found})) == {image["name"] for image in found}
    assert "b.jpg" in caplog.text and "Passed over record 1" in caplog.text


def test_an_index_that_cannot_be_made_is_refused(tmp_path):
    check_index("Flat", 128)
    for factory in ("PQ60", "no such index"):
        with pytest.raises(ValueError, match=f"`--index` must be an index of 128 dimensions, got '{factory}'"):
            check_index(factory, 128)
