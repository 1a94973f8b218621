"""Evaluation goes past what cannot be read, and says so; data that are not all there are refused before work."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from pixclip_hf import load_records, save_records
from pixclip_hf.evaluation.image_sets import read_images
from pixclip_hf.images import StoredImage, open_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def regions_folder(folder):
    """Four images: a good one, a cut one, one whose line is broken, and one with faulty regions."""
    good = {"id": 1, "category": "cup", "box": [1, 2, 11, 7]}
    lines = []
    for number, name in enumerate(("good", "cut", "odd")):
        picture(folder / f"{name}.png")
        regions = [{**good, "id": number}]
        if name == "odd":
            regions += [{**good, "id": 7, "box": ["a", 2, 3, 4]}, {**good, "id": 8, "box": None}, "x", None]
            regions += [{**good, "id": 9, "box": None, "segmentation": {"size": [30, 40], "counts": [2**62] * 4}}]
        lines.append({"image": f"{name}.png", "width": 40, "height": 30, "captions": ["c"], "regions": regions})
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:500])
    (folder / "regions.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"image": "good.png"', "[]"]))
    return folder


def test_faulty_images_annotations_and_regions_are_counted(tmp_path, caplog):
    found = read_images("region-classification", str(regions_folder(tmp_path)))
    assert [open_image(record["image"]).size for record in found.records] == [(40, 30), (40, 30)]
    assert [len(record["regions"]) for record in found.records] == [1, 1]
    assert found.left_out == {
        "images whose annotations cannot be read": 2,
        "images that cannot be read": 1,
        "region left out: not readable": 2,
        "regions that cannot be read": 1,
        "boxes without area on their image": 1,
        "masks without a pixel on their image": 1,
    }
    assert "cut.png" in caplog.text and "'good.png'" not in caplog.text


def test_images_of_a_dataset_are_read_as_all_others(tmp_path):
    """A corrupt cell is counted; a 16-bit image is read as the processor reads it."""
    deep = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    picture(tmp_path / "photo.jpg")
    save_records(load_records("images", folder=str(tmp_path)), tmp_path / "data", "test")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "data/*.parquet"), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    whole = [row["image"]["bytes"] for row in rows]
    rows = rows.map(
        lambda _, i: {"captions": ["c"], "image": {"bytes": whole[i][: 150 if i else None], "path": None}},
        with_indices=True,
    )
    rows.to_parquet(tmp_path / "data" / "test-00000.parquet")
    found = read_images("image-text-retrieval", str(tmp_path / "data"))
    (record,) = found.records
    assert isinstance(record["image"], StoredImage) and found.left_out == {"images that cannot be read": 1}
    expected = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(open_image(record["image"]))[..., 0], expected)


def test_turned_photographs_are_upright_for_every_task(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", exif=exif)
    region = {"id": 1, "category": "cup", "box": [0, 30, 30, 40]}
    (tmp_path / "regions.jsonl").write_text(json.dumps({"image": "a.jpg", "captions": ["c"], "regions": [region]}))
    (record,) = read_images("region-classification", str(tmp_path)).records
    assert (record["width"], record["height"]) == open_image(record["image"]).size == (30, 40)
    assert record["regions"][0]["box"] == [0, 30, 30, 40]


@pytest.mark.parametrize("task", ("region-classification", "region-retrieval", "phrase-grounding"))
def test_an_image_without_a_size_and_texts_that_are_none(task, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    region = {"id": 1, "box": [1, 2, 11, 7], "category": "cup", "expressions": ["a cup"]}
    odd = [{**region, "id": i, "category": value} for i, value in enumerate(({"a": 1}, ["x"], 7, "\ud800"), 2)]
    lines = [{"image": name, "regions": [region, *odd]} for name in ("a.png", "b.png")]
    (tmp_path / "regions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_images(task, str(tmp_path))
    assert [region["category"] for region in found.records[0]["regions"]] == ["cup", None, None, None]
    assert found.categories == ["cup"] and len(found.records) == 1
    assert found.left_out == {"images that cannot be read": 1, "regions that cannot be read": 1}


@pytest.mark.parametrize("captions", (1, True, "one", {"a": 1}, [3, None, "\ud800", "one"], [["one"]], None))
@pytest.mark.parametrize("task", ("region-classification", "region-retrieval"))
def test_captions_that_are_no_list_of_texts(task, captions, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    region = {"id": 1, "box": [1, 2, 11, 7], "category": "cup", "expressions": ["a cup"]}
    (tmp_path / "regions.jsonl").write_text(json.dumps({"image": "a.png", "captions": captions, "regions": [region]}))
    (record,) = read_images(task, str(tmp_path)).records
    expected = ["one"] if captions == "one" or isinstance(captions, list) and "one" in captions else []
    assert record["captions"] == expected
