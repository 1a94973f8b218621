"""Sources: what each format becomes in the record schema, and what is left out with its reason."""

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from pixclip_hf.annotation.sources import LeftOut, ReadRecords, read_record
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.data.collator import content_key
from pixclip_hf.data.sources import open_source
from pixclip_hf.modeling.modeling_regions import box_iou
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle, mask_box
from pixclip_hf.record import validate_record
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


REGIONS_TRAIN = Path(__file__).parents[3] / "shared/data/regions-train"
SIZE = (40, 30)  # width, height


def encoded(size=SIZE, format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, format=format)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def records_of(name):
    """Records by their id, and the sum of what was left out of them."""
    source, records, left_out = open_source(name), {}, Counter()
    for position in range(len(source)):
        built = source.read(position)
        record, counts = read_record(built, source.kind)
        validate_record(record)
        records[built.name] = record
        left_out += counts
    left_out += source.left_out
    del left_out["regions"]
    return records, dict(left_out)


def texts_and_boxes(record, text="caption"):
    return [(region[text], region["box"]) for region in record["regions"]]


@pytest.mark.skipif(not REGIONS_TRAIN.is_dir(), reason="the photographs of ../shared are not here")
def test_regions_train_loads_completely():
    records, left_out = records_of(f"regions:{REGIONS_TRAIN}")
    assert len(records) == 70 and sum(len(record["regions"]) for record in records.values()) == 846
    assert left_out.pop("region left out: a crowd") == 6
    assert not any("region" in reason or "mask" in reason for reason in left_out), left_out
    entries = [json.loads(line) for line in (REGIONS_TRAIN / "regions.jsonl").read_text().splitlines()]
    for entry in entries:
        entry["regions"] = [region for region in entry["regions"] if not region["iscrowd"]]
    for entry in entries:
        record = records[entry["image"]]
        assert [region["id"] for region in record["regions"]] == [region["id"] for region in entry["regions"]]
        assert [region["mask"] is None for region in record["regions"]] == [
            region["segmentation"] is None for region in entry["regions"]
        ]
        for region, given in zip(record["regions"], entry["regions"], strict=True):
            assert np.abs(np.subtract(region["box"], given["box"])).max() < 0.02
            if region["mask"] is not None and given["area"] > 200:
                tight = torch.tensor(mask_box(decode_rle(region["mask"])))
                assert box_iou(tight, torch.tensor(given["box"])) > 0.7


def test_regions_folder(tmp_path):
    write(tmp_path / "images/a.png", encoded())
    ring = [2, 2, 12, 2, 12, 12, 2, 12]
    regions = [
        {"id": 1, "category": "cat", "box": [2, 2, 12, 12], "segmentation": [ring], "expressions": ["left", "a cat"]},
        {"id": 2, "category": "dog", "box": [30, 20, 50, 29], "segmentation": None},
        {"id": 3, "category": "far", "box": [45, 2, 50, 8], "segmentation": None},
        {"id": 2, "category": "again", "box": [1, 2, 5, 8], "segmentation": None},
        {"id": 4, "category": "odd", "box": [1, 2, 5, 8], "segmentation": {"size": [3, 3], "counts": "0"}},
        {"id": 5, "category": "thin", "box": [3, 3, 3, 3], "segmentation": [ring]},
    ]
    entry = {"image": "images/a.png", "width": 40, "height": 30, "captions": ["two", " "], "regions": regions}
    write(tmp_path / "regions.jsonl", json.dumps(entry) + "\n")
    records, left_out = records_of(f"regions:{tmp_path}")
    record = records["images/a.png"]
    assert record["captions"] == ["two"] and record["alt_text"] is None
    assert [(r["id"], r["category"], r["caption"]) for r in record["regions"]] == [
        (1, "cat", "left"), (2, "dog", None), (4, "odd", None), (5, "thin", None),
    ]  # fmt: skip
    assert record["regions"][1]["box"] == [30, 20, 40, 29] and record["regions"][3]["box"] == [2, 2, 12, 12]
    mask = np.zeros((30, 40), bool)
    mask[2:12, 2:12] = True
    assert record["regions"][0]["mask"] == encode_rle(mask)
    assert left_out == {
        "expression left out: beyond the first of its region": 1,
        "region left out: no area on the image": 1,
        "region left out: id twice": 1,
        "mask left out: empty or not readable": 1,
    }


def test_regions_that_cannot_be_read_leave_the_others(tmp_path):
    write(tmp_path / "a.png", encoded())
    good = {"category": "cat", "box": [2, 2, 12, 12]}
    regions = [
        {**good, "id": None},
        {**good, "id": 2**70},
        {**good, "id": 1, "box": [1, 2, 3]},
        {**good, "id": 2, "box": [[1, 2, 5, 9]] * 4},
        {**good, "id": 3, "box": "all"},
        {**good, "id": 4, "segmentation": {"size": [30, 40]}},
        {**good, "id": "4"},
    ]
    entry = {"image": "a.png", "width": 40, "height": 30, "captions": [], "regions": regions}
    write(tmp_path / "regions.jsonl", json.dumps(entry))
    records, left_out = records_of(f"regions:{tmp_path}")
    assert [region["id"] for region in records["a.png"]["regions"]] == [4]
    assert left_out == {
        "region left out: not readable": 5,
        "region left out: id twice": 1,
        "mask left out: empty or not readable": 1,
    }


@pytest.mark.parametrize("field", ["score", "source"])
def test_datasets_whose_regions_lack_a_field(field, tmp_path):
    scenes = [make_scene(i, "train") for i in range(2)]
    regions = [[{k: v for k, v in region.items() if k != field} for region in scene["regions"]] for scene in scenes]
    columns = {name: [scene[name] for scene in scenes] for name in scenes[0]}
    Dataset.from_dict(columns | {"regions": regions}).save_to_disk(tmp_path / "scenes")
    records, left_out = records_of(f"dataset:{tmp_path / 'scenes'}")
    found = {region[field] for record in records.values() for region in record["regions"]}
    assert found == {{"score": 1.0, "source": "dataset"}[field]} and not left_out


def test_scenes_and_datasets(tmp_path):
    records, left_out = records_of("scenes:3:7")
    assert not left_out
    for i, record in enumerate(records.values()):
        scene = make_scene(i, "train", 7)
        assert Image.open(io.BytesIO(record["image"]["bytes"])).tobytes() == scene["image"].tobytes()
        assert {**record, "image": None} == {**scene, "image": None}
    scenes_dataset(2, split="test").save_to_disk(tmp_path / "scenes")
    copied, _ = records_of(f"dataset:{tmp_path / 'scenes'}:test")
    assert [record["regions"] for record in copied.values()] == [make_scene(i, "test")["regions"] for i in range(2)]


def test_image_folder(tmp_path):
    write(tmp_path / "b/two.jpg", encoded(format="JPEG"))
    write(tmp_path / "b/two.txt", " a thing \n")
    write(tmp_path / "one.PNG", encoded())
    write(tmp_path / "notes.md", "no image")
    records, _ = records_of(f"images:{tmp_path}")
    assert [(name, record["alt_text"]) for name, record in records.items()] == [
        ("b/two.jpg", "a thing"), ("one.PNG", None),
    ]  # fmt: skip
    assert all(record["regions"] == [] and record["width"] == 40 for record in records.values())


def coco_content(image):
    return {
        "images": [{"id": 9, "width": 40, "height": 30, **image}],
        "categories": [{"id": 3, "name": "alarm_clock"}],
        "annotations": [
            {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 2, 10, 5], "iscrowd": 0,
             "segmentation": {"size": [30, 40], "counts": [30 * 40 - 5, 5]}},
            {"id": 8, "image_id": 9, "category_id": 3, "bbox": [1, 2, 20, 20], "iscrowd": 1,
             "segmentation": {"size": [30, 40], "counts": [30 * 40 - 9, 9]}},
            {"id": 6, "image_id": 9, "category_id": 3, "bbox": [1, 2, 0, 5], "segmentation": []},
            {"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 5], "segmentation": []},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ({"file_name": "000.jpg"}, "000.jpg"),
        ({"coco_url": "http://images.cocodataset.org/train2017/000.jpg"}, "train2017/000.jpg"),
        ({"coco_url": "http://images.cocodataset.org/train2017/000.jpg"}, "000.jpg"),
    ],
    ids=["coco", "lvis", "lvis in one folder"],
)
def test_coco(image, file, tmp_path):
    write(tmp_path / "images" / file, encoded())
    captions = {"images": [], "annotations": [{"id": 1, "image_id": 9, "caption": "a clock"}]}
    paths = write(tmp_path / "i.json", coco_content(image)), write(tmp_path / "c.json", captions)
    records, left_out = records_of(f"coco:{paths[0]},{paths[1]}:{tmp_path / 'images'}")
    (record,) = records.values()
    assert record["captions"] == ["a clock"]
    assert texts_and_boxes(record, "category") == [("alarm clock", [1, 2, 11, 7])]
    assert decode_rle(record["regions"][0]["mask"]).sum() == 5
    assert left_out == {
        "region left out: no area on the image": 1,
        "region left out: a crowd": 1,
        "annotation left out: of an unknown image": 1,
    }


def test_refcoco(tmp_path):
    write(tmp_path / "images/000.jpg", encoded())
    instances = write(tmp_path / "instances.json", coco_content({"file_name": "000.jpg"}))
    sentences = [{"sent_id": 10, "sent": "left clock"}, {"sent_id": 11, "sent": "the clock"}]
    refs = [
        {"ann_id": 5, "image_id": 9, "sentences": sentences},
        {"ann_id": 99, "image_id": 9, "sentences": sentences},
    ]
    path = write(tmp_path / "refs(unc).p", pickle.dumps(refs, protocol=2))
    records, left_out = records_of(f"refcoco:{path}:{instances}:{tmp_path / 'images'}")
    assert texts_and_boxes(records["000.jpg"]) == [("left clock", [1, 2, 11, 7]), ("the clock", [1, 2, 11, 7])]
    assert left_out == {"expression left out: of an unknown annotation": 2}


def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    write(tmp_path / "images/000.jpg", encoded())
    instances = write(tmp_path / "instances.json", coco_content({"file_name": "000.jpg"}))
    path = write(tmp_path / "refs.p", pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="plain values, not builtins.print"):
        open_source(f"refcoco:{path}:{instances}:{tmp_path / 'images'}")


@pytest.mark.parametrize("folder", ["", "VG_100K", "VG_100K_2"])
def test_visual_genome(folder, tmp_path):
    write(tmp_path / "images" / folder / "4.jpg", encoded())
    write(tmp_path / "image_data.json", [{"image_id": 4, "width": 40, "height": 30}])
    phrases = [{"region_id": 7, "image_id": 4, "phrase": "a red cup ", "x": 2, "y": 3, "width": 10, "height": 8}]
    objects = [{"object_id": 8, "names": ["cup", "mug"], "x": 2, "y": 3, "w": 10, "h": 8}]
    path = write(tmp_path / "region_descriptions.json", [{"id": 4, "regions": phrases}, {"id": 5, "regions": phrases}])
    records, left_out = records_of(f"vg:{path}:{tmp_path / 'images'}")
    assert texts_and_boxes(records["4.jpg"]) == [("a red cup", [2, 3, 12, 11])]
    assert left_out == {"region left out: of an unknown image": 1}
    path = write(tmp_path / "objects.json", [{"image_id": 4, "objects": objects}])
    records, _ = records_of(f"vg:{path}:{tmp_path / 'images'}")
    assert texts_and_boxes(records["4.jpg"], "category") == [("cup", [2, 3, 12, 11])]


def test_flickr30k_entities(tmp_path):
    xml = """<annotation><filename>36.jpg</filename><size><width>40</width><height>30</height></size>
      <object><name>100</name><name>101</name>
        <bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10</xmax><ymax>12</ymax></bndbox></object>
      <object><name>102</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"""
    sentences = (
        "[/EN#100/people Two men] stand in [/EN#102/scene a yard] .\n"
        "[/EN#100/people Two guys] and [/EN#101/animals a dog] .\n[/EN#100/people Two men] .\n"
    )
    for name in ("36", "37"):
        write(tmp_path / f"images/{name}.jpg", encoded())
        write(tmp_path / f"Annotations/{name}.xml", xml)
        write(tmp_path / f"Sentences/{name}.txt", sentences)
    records, left_out = records_of(f"flickr30k:{tmp_path}:{tmp_path / 'images'}")
    assert len({region["id"] for record in records.values() for region in record["regions"]}) == 6
    record = records["36"]
    assert record["captions"] == ["Two men stand in a yard .", "Two guys and a dog .", "Two men ."]
    box = [0, 2, 10, 12]
    assert texts_and_boxes(record) == [("Two men", box), ("Two guys", box), ("a dog", box)]
    assert left_out == {"phrase left out: without a box": 2}


@pytest.mark.parametrize("tar", [False, True], ids=["folder", "tar"])
def test_grit(tar, tmp_path):
    chunks = [[0, 5, 0.1, 0.2, 0.5, 0.9, 0.8], [9, 14, 0.5, 0.5, 1.0, 1.0, 0.7]]
    content = {
        "caption": "a dog on grass in the sun",
        "noun_chunks": chunks,
        "ref_exps": json.dumps([[0, 14, 0.1, 0.2, 0.5, 0.9, 0.9]]),
    }
    files = {"0001.jpg": encoded(format="JPEG"), "0001.json": json.dumps(content).encode(), "0002.json": b"{}"}
    if tar:
        with tarfile.open(tmp_path / "00000.tar", "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            write(tmp_path / "00000" / name, data)
    records, left_out = records_of(f"grit:{tmp_path}")
    assert list(records) == ["00000/0001"]
    record = records["00000/0001"]
    assert record["alt_text"] == content["caption"]
    assert texts_and_boxes(record) == [("a dog on grass", [4, 6, 20, 27]), ("grass", [20, 15, 40, 30])]
    assert [region["score"] for region in record["regions"]] == pytest.approx([0.9, 0.7])
    assert left_out == {"noun chunk left out: part of a referring expression": 1}


def test_images_of_grit_have_keys_of_their_own(tmp_path):
    for name in ("a", "b"):
        expressions = [[0, 5, 0.1, 0.2, 0.5, 0.9, 0.9], [2, 5, 0.1, 0.2, 0.5, 1, 1]]
        content = {"caption": f"{name} dog", "ref_exps": expressions}
        write(tmp_path / f"{name}.json", content)
        write(tmp_path / f"{name}.jpg", encoded(format="JPEG"))
    records, _ = records_of(f"grit:{tmp_path}")
    assert len({region["id"] for record in records.values() for region in record["regions"]}) == 4
    assert content_key(records["a"]) != content_key(records["b"])


def test_bad_images_are_left_out_with_their_reason(tmp_path):
    write(tmp_path / "a.png", encoded()[:60])
    write(tmp_path / "b.png", b"")
    write(tmp_path / "c.png", encoded())
    for mode in ("F", "I"):  # without a known range of values
        Image.new(mode, SIZE).save(tmp_path / f"{mode}.tif")
    stage = ReadRecords(f"images:{tmp_path}")
    empty = {name: [None] * 5 for name in pipeline_features([])} | {"position": range(5)}
    batch = stage(empty)
    assert batch["record_id"] == ["F.tif", "I.tif", "a.png", "b.png", "c.png"]
    assert batch["rejected_reason"] == ["image not readable"] * 4 + [None]
    assert batch["rejected_stage"] == ["source"] * 4 + [None]
    entry = {"image": "gone.png", "width": 1, "height": 1, "captions": [], "regions": []}
    whole = {"image": "c.png", "width": 40, "height": 30, "captions": [], "regions": []}
    broken = [{}, {**whole, "width": [40]}, {**whole, "width": "wide"}]
    lines = [json.dumps(entry), json.dumps({**entry, "image": "c.png"}), *map(json.dumps, broken)]
    write(tmp_path / "regions.jsonl", "\n".join(lines))
    batch = ReadRecords(f"regions:{tmp_path}")(empty)
    assert batch["rejected_reason"][:2] == ["image missing", "image of another size than its annotations"]
    for reason, error in zip(batch["rejected_reason"][2:], ("KeyError", "TypeError", "ValueError"), strict=True):
        assert reason.startswith(f"annotation not readable: {error}")
    source = open_source(f"images:{tmp_path}")
    with pytest.raises(LeftOut, match="not readable"):
        read_record(source.read(0), source.kind)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("photos", ValueError, "`source` must be one of scenes:NUMBER"),
        ("scenes:", ValueError, r"`source` must have the form scenes:NUMBER\[:SEED\], got 'scenes:'"),
        ("scenes:many", ValueError, "in whole numbers"),
        ("scenes:0", ValueError, "at least one scene, got 0"),
        ("scenes:1:2:3", ValueError, "must have the form"),
        ("coco:a.json", ValueError, "must have the form coco:"),
        ("images:/no/such/folder", FileNotFoundError, "names '/no/such/folder', which does not exist"),
    ],
)
def test_bad_names(name, error, message):
    with pytest.raises(error, match=message):
        open_source(name)


def test_empty_sources(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        open_source(f"images:{tmp_path}")
