"""Images that a dataset stores by their path alone: files of its own folder are read, others are not."""

import datasets
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from pixclip_hf import load_records, make_scene, save_records
from pixclip_hf.data.skipping import ReadableRecords
from pixclip_hf.images import encoded_images, open_image
from pixclip_hf.record import LeftOut, record_features


def picture(path):
    Image.new("RGB", (40, 30), "red").save(path)


def record_of(cell):
    return {**make_scene(0, size=32), "image": cell, "width": 40, "height": 30}


def by_paths(folder, form, paths):
    """A dataset in the record schema that stores images by paths alone, as others may have written it."""
    features = record_features()
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    rows = [record_of({"bytes": None, "path": path}) for path in paths]
    records = Dataset.from_list(rows, features=Features(features))
    folder.mkdir()
    if form == "parquet":
        records.to_parquet(folder / "train-00000.parquet")
    else:
        records.save_to_disk(str(folder))


@pytest.mark.parametrize("form", ("parquet", "saved"))
def test_a_cell_names_images_of_its_own_folder_alone(form, tmp_path, caplog, monkeypatch):
    """Map-style, as training and evaluation read it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    private = tmp_path / "private.png"
    picture(private)
    paths = [str(private), "../private.png", f"file://{private}", "http://127.0.0.1:1/x.png", "own.png"]
    by_paths(tmp_path / "data", form, paths)
    picture(tmp_path / "data" / "own.png")
    records = load_records(str(tmp_path / "data"))
    readable = ReadableRecords(records, 0.5)
    for index in range(5):
        record, at = readable.read(index)
        assert at == 4 and record["image"].size == (40, 30)
    assert "outside of its folder" in caplog.text and readable.corrupt >= 4
    for index in range(4):
        with pytest.raises((LeftOut, ValueError, OSError)):
            open_image(encoded_images(records)[index]["image"])
        with pytest.raises((ValueError, OSError)):
            records[index]["image"].load()  # by `datasets` itself
    with pytest.raises(ValueError, match=r"`records\[0\]` must have an image that can be read: .*outside"):
        save_records(records, tmp_path / "copy")
    monkeypatch.setenv("PIXCLIP_HF_LOCAL_ADDRESSES", "1")
    assert load_records(str(tmp_path / "data"))[0]["image"].size == (40, 30)


def test_a_dataset_that_a_user_made_of_paths_is_read(tmp_path):
    """Its paths are the user's own."""
    picture(tmp_path / "own.png")
    records = Dataset.from_list([record_of(str(tmp_path / "own.png"))], features=record_features())
    assert ReadableRecords(records)[0]["image"].size == (40, 30)
