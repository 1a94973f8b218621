"""CSV, YOLO and Pascal VOC in their true layouts, and the sets of captions and classes as records."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from pixclip_hf import load_records, record_features, validate_record
from pixclip_hf.data.sources import open_source
from pixclip_hf.data.sources.records import read_regions
from pixclip_hf.processing.processing_regions import decode_rle

SIZE = (40, 30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def records_of(source, **arguments):
    """Every record, valid, and what was left out."""
    records = load_records(source, **arguments)
    assert records.features == record_features()
    for record in records:
        validate_record(record)
    opened = open_source(source, **arguments)
    left_out = Counter(opened.left_out)
    for position in range(len(opened)):
        left_out += read_regions(opened.read(position), SIZE, opened.kind)[1]
    del left_out["regions"]
    return list(records), dict(left_out)


def test_csv_of_regions(tmp_path):
    for name in ("a, b.png", "c.png"):
        picture(tmp_path / "images" / name)
    table = write(
        tmp_path / "t.csv",
        "\ufeffimage,x0,y0,x1,y1,category,region_caption,score,caption\n"
        '"a, b.png",1,2,11,7,cup,"a cup, red",0.5,first\n'
        "c.png,,,,,,,,alone\n"
        '"a, b.png",5,6,50,20,"big\nplate",,,second\n'
        '"a, b.png",5,6,five,20,bad,,,first\n'
        ",1,2,3,4,lost,,,\n",
    )
    (first, second), left_out = records_of("csv", table=table, images=str(tmp_path / "images"))
    assert first["captions"] == ["first", "second"] and second["captions"] == ["alone"]
    assert [(r["category"], r["caption"], r["box"], r["score"]) for r in first["regions"]] == [
        ("cup", "a cup, red", [1, 2, 11, 7], 0.5),
        ("big\nplate", None, [5, 6, 40, 20], 1),
    ]
    assert left_out == {"region left out: not readable": 1, "row left out: without an image": 1}


def test_csv_with_other_columns(tmp_path):
    picture(tmp_path / "a.png")
    table = write(
        tmp_path / "t.tsv", "filepath\ttitle\tLabelName\tXMin\tXMax\tYMin\tYMax\na.png\tT\tMug\t0.1\t0.5\t0\t1\n"
    )
    arguments = {"table": table, "images": str(tmp_path), "columns": "category:LabelName", "normalized": "true"}
    ((record,), _) = records_of("csv", **arguments)
    (region,) = record["regions"]
    assert record["captions"] == ["T"] and region["category"] == "Mug" and region["box"] == [4, 0, 20, 30]


@pytest.mark.parametrize(
    ("header", "arguments", "message"),
    [
        ("a,b", {}, "no column for `image` among a, b"),
        ("image,x0,y0", {}, "columns for some of x0, y0, x1, y1, and not for all"),
        ("image,b", {"columns": "caption:text"}, "has the columns image, b, not text"),
        ("image,b", {"columns": "sound:b"}, "`columns` must name image, .* got sound"),
        ("image,b", {"normalized": "maybe"}, "`normalized` must be true or false, got 'maybe'"),
        ("image,b", {}, "holds no image"),
    ],
)
def test_bad_tables(header, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_source("csv", table=write(tmp_path / "t.csv", header + "\n"), images=str(tmp_path), **arguments)


def write_yolo(folder, **more):
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        picture(folder / "images" / split / f"{name}.jpg")
    write(
        folder / "labels/train/a.txt",
        "1 0.5 0.5 0.5 0.2\n0 0.1 0.1 0.5 0.1 0.5 0.5\n7 0.5 0.5 0.1 0.1\n1 0.5 0.5\n0 0.25 0.5 0.5 1 0.75\n",
    )
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": {0: "cup", 1: "tea_pot"}, **more}
    return write(folder / "data.yaml", yaml.safe_dump(content))


def test_yolo(tmp_path):
    data = write_yolo(tmp_path)
    (first, second), left_out = records_of("yolo", data=data)
    assert [(r["category"], r["score"], r["mask"] is None) for r in first["regions"]] == [
        ("tea pot", 1, True), ("cup", 1, False), ("cup", 0.75, True),
    ]  # fmt: skip
    boxes = [[10, 12, 30, 18], [4, 3, 20, 15], [0, 0, 20, 30]]
    assert np.allclose([r["box"] for r in first["regions"]], boxes, atol=1e-4)
    assert second["regions"] == [] and len({r["id"] for r in first["regions"]}) == 3
    assert left_out == {"region left out: of an unknown category": 1, "region left out: not readable": 1}
    assert len(load_records("yolo", data=data, split="val")) == 1
    with pytest.raises(ValueError, match="`split` must be one of train, val of .*data.yaml', got 'test'"):
        load_records("yolo", data=data, split="test")
    write(tmp_path / "labels/val/c.txt", "0 0.5 0.5 0.5 0.5\n")
    assert len(load_records("yolo", data=data, split="val")[0]["regions"]) == 1


def test_yolo_polygons_are_masks(tmp_path):
    """A mask in shares of the sides covers the pixels that the same corners in pixels do."""
    data = write_yolo(tmp_path)
    region = load_records("yolo", data=data)[0]["regions"][1]
    mask = decode_rle(region["mask"])
    assert mask.shape == (30, 40) and mask[4:10, 14:19].all() and not mask[12:, :10].any() and not mask[:, 21:].any()


VOC = """<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height></size>
  <object><name>dog</name><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10.0</xmax><ymax>12</ymax></bndbox></object>
  <object><name>cat</name><difficult>1</difficult>
    <bndbox><xmin>20</xmin><ymin>3</ymin><xmax>30</xmax><ymax>12</ymax></bndbox></object></annotation>"""


def test_pascal_voc(tmp_path):
    for name in ("2007_1", "2007_2", "2007_3"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        write(tmp_path / "Annotations" / f"{name}.xml", VOC.format(name=name))
    write(tmp_path / "ImageSets/Main/val.txt", "2007_3  1\n2007_1 -1\n")
    labels = np.zeros((30, 40), np.uint8)
    labels[3:12, 20:30], labels[0] = 2, 255
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(labels).convert("P").save(tmp_path / "SegmentationObject/2007_3.png")
    records, left_out = records_of("voc", folder=str(tmp_path))
    assert len(records) == 3 and not left_out
    assert [(r["category"], r["box"]) for r in records[0]["regions"]] == [
        ("dog", [0, 2, 10, 12]), ("cat", [19, 2, 30, 12]),
    ]  # fmt: skip
    drawn, _ = load_records("voc", "val", folder=str(tmp_path))
    assert [region["mask"] is None for region in drawn["regions"]] == [True, False]
    assert decode_rle(drawn["regions"][1]["mask"]).sum() == 90
    with pytest.raises(FileNotFoundError, match="Main/test.txt', which does not exist"):
        load_records("voc", "test", folder=str(tmp_path))


def test_captions_by_split(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "val2014" / f"{name}.jpg")
    entries = [
        {"filename": f"{name}.jpg", "filepath": "val2014", "split": split, "sentences": [{"raw": f" of {name} "}]}
        for name, split in (("a", "train"), ("b", "test"))
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    records, _ = records_of("karpathy", annotations=path, images=str(tmp_path))
    assert [record["captions"] for record in records] == [["of a"], ["of b"]]
    (test,) = load_records("karpathy", "test", annotations=path, images=str(tmp_path))
    assert test["captions"] == ["of b"] and test["width"] == 40


def test_long_texts(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "image" / "a.jpg")
    write(tmp_path / "caption" / "a.txt", "Long.\n")
    line = {"example_id": "a", "split": "test", "image_file": "a.jpg", "description": "Described."}
    write(tmp_path / "docci_descriptions.jsonlines", json.dumps(line))
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Answered."}]
    answers = write(tmp_path / "answers.json", [{"image": "a.jpg", "conversations": turns}])
    for arguments, text in (
        ({"source": "urban1k", "folder": str(tmp_path)}, "Long."),
        ({"source": "docci", "folder": str(tmp_path), "split": "test"}, "Described."),
        ({"source": "sharegpt4v", "annotations": answers, "images": str(tmp_path / "images")}, "Answered."),
    ):
        (record,) = load_records(**arguments)
        validate_record(record)
        assert record["captions"] == [text] and record["regions"] == []


def test_class_folders(tmp_path, caplog):
    for name in ("n01/a.jpg", "n02/b.tif", ".ipynb_checkpoints/c.jpg"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "classes.json", {"n01": "tench", "n02": "gold_fish"})
    source = open_source("class_folders", folder=str(tmp_path))
    assert source.categories == ["tench", "gold_fish"] and [source.read(i).label for i in range(2)] == [0, 1]
    records, _ = records_of("class_folders", folder=str(tmp_path))
    assert [(r["category"], r["box"]) for record in records for r in record["regions"]] == [
        ("tench", [0, 0, 40, 30]), ("gold_fish", [0, 0, 40, 30]),
    ]  # fmt: skip


def test_expressions(tmp_path):
    picture(tmp_path / "COCO_train2014_000000000007.jpg")
    objects = [{"id": 1, "bbox": [0, 0, 10, 10]}, {"id": 2, "bbox": [20, 20, 10, 10]}]
    line = {"image_id": 7, "file_name": "COCO_train2014_000000000007_0.jpg", "anns": objects, "ann_id": 2}
    path = write(tmp_path / "refcoco_val.jsonl", json.dumps({**line, "sentences": [{"raw": "right"}, {"raw": "low"}]}))
    ((record,), _) = records_of("reclip", expressions=path, images=str(tmp_path))
    assert [(r["caption"], r["box"]) for r in record["regions"]] == [
        ("right", [20, 20, 30, 30]), ("low", [20, 20, 30, 30]),
    ]  # fmt: skip


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    picture(tmp_path / "a.png")
    entry = {"image": "a.png", "width": 40, "height": 30, "captions": ["a\u2028b"], "regions": []}
    (tmp_path / "regions.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8-sig")
    ((record,), _) = records_of("regions", folder=str(tmp_path))
    assert record["captions"] == ["a\u2028b"]


def test_names_that_are_no_text(tmp_path):
    with open(bytes(tmp_path) + b"/caf\xe9.png", "wb") as file:
        Image.new("RGB", SIZE).save(file, "PNG")
    assert open_source("images", folder=str(tmp_path)).read(0).name == "caf\\xe9.png"
    records = load_records("images", folder=str(tmp_path)).cast_column("image", datasets.Image(decode=False))
    assert records[0]["image"]["path"] == "caf\\xe9.png" and records[0]["image"]["bytes"]


def test_instances_with_faults_leave_the_others(tmp_path):
    picture(tmp_path / "a.png")
    good = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 5]}
    annotations = [
        {**good, "id": 1},
        {**good, "id": 2, "category_id": 9},
        {**good, "id": 3, "bbox": "all"},
        {**good, "id": 4, "bbox": [1, 2, 3]},
        {**good, "id": 5, "bbox": [1, 2, 10, 0]},
        {"image_id": 1, "id": 6, "category_id": 3, "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8]]},
        {**good, "id": 7, "caption": "a cup", "long_caption": "a cup of tea", "bbox": ["1", 2, 10, 5]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30, "captions": ["a table"]}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cup"}],
    }
    path = write(tmp_path / "i.json", content)
    ((record,), left_out) = records_of("coco", annotations=path, images=str(tmp_path))
    assert record["captions"] == ["a table"]
    assert [(r["id"], r["box"], r["caption"], r["long_caption"]) for r in record["regions"]] == [
        (1, [1, 2, 11, 7], None, None),
        (6, [2, 2, 8, 8], None, None),
        (7, [1, 2, 11, 7], "a cup", "a cup of tea"),
    ]
    assert left_out == {
        "region left out: of an unknown category": 1,
        "region left out: not readable": 2,
        "region left out: no area on the image": 1,
    }
