"""Every dataset in its true layout on disk, a few images each."""

import json

import datasets
import pytest
from PIL import Image

from pixclip_hf.evaluation.image_sets import LAYOUTS, parse_scenes, read_images
from pixclip_hf.images import open_image
from pixclip_hf.scenes.dataset import scenes_dataset

SIZE = (64, 48)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (10, 20, 30)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix in (".jsonl", ".jsonlines")
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))


def annotation(number, bbox, category=3, **more):
    return {"id": number, "image_id": 7, "bbox": bbox, "category_id": category, **more}


def coco(folder, lvis=False):
    """One image: a polygon, a crowd as uncompressed RLE, a box beyond the border, and two that cannot be used."""
    ring = [4.0, 4.0, 20.0, 4.0, 20.0, 20.0]
    crowd = {"size": [48, 64], "counts": [10, 5, 48 * 64 - 15]}
    annotations = [
        annotation(1, [4, 4, 16, 16], segmentation=[ring, [1, 2, 3, 4]], iscrowd=0),
        annotation(2, [0, 10, 1, 5], category=5, segmentation=crowd, iscrowd=1),
        annotation(3, [50, 40, 30, 30]),
        annotation(4, [10, 10, 0, 5], segmentation=[ring]),
        annotation(5, [10, 10, 5, 5], segmentation={"size": [48, 64], "counts": [48 * 64]}),
    ]
    found = {"id": 7, "width": 64, "height": 48}
    if lvis:
        found["coco_url"] = "http://images.cocodataset.org/train2017/000000000007.jpg"
    else:
        found["file_name"] = "000000000007.jpg"
    content = {
        "images": [found, {**found, "id": 8}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "bow_(ribbon)"}],
    }
    name = "lvis_v1_val.json" if lvis else "instances_val2017.json"
    write(folder / "annotations" / name, content)
    image(folder / ("train2017" if lvis else "val2017") / "000000000007.jpg")


@pytest.mark.parametrize("lvis", (False, True))
def test_coco_and_lvis(lvis, tmp_path):
    coco(tmp_path, lvis)
    found = read_images("region-classification", str(tmp_path))
    assert (found.name, found.split) == (("LVIS", "val") if lvis else ("COCO", "val2017"))
    assert found.categories == ["cat", "bow_(ribbon)"]
    assert found.left_out == {"boxes without area on their image": 1, "masks without a pixel on their image": 1}
    (record,) = found.records
    assert open_image(record["image"]).size == SIZE
    assert [region["id"] for region in record["regions"]] == [1, 2, 3]
    assert [region["iscrowd"] for region in record["regions"]] == [False, True, False]
    assert record["regions"][0]["box"] == [4, 4, 20, 20] and len(record["regions"][0]["mask"]) == 1
    assert record["regions"][2]["box"] == [50, 40, 64, 48] and record["regions"][2]["mask"] is None


def test_json_lines_of_regions(tmp_path):
    region = {"id": 1, "category": "dog", "box": [1, 2, 30, 40], "segmentation": None, "iscrowd": False}
    line = {"image": "images/a.jpg", "width": 64, "height": 48, "captions": [], "regions": [region]}
    write(tmp_path / "regions.jsonl", [line])
    image(tmp_path / "images" / "a.jpg")
    found = read_images("region-classification", str(tmp_path))
    with pytest.raises(ValueError, match="`split` must not be given for .*regions.jsonl"):
        read_images("region-classification", str(tmp_path), split="val")
    assert found.categories == ["dog"] and found.records[0]["regions"][0]["mask"] is None


def test_coco_captions(tmp_path):
    captions = [{"image_id": 7, "id": i, "caption": f" caption {i} "} for i in range(6)]
    write(
        tmp_path / "annotations" / "captions_val2017.json",
        {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": captions},
    )
    image(tmp_path / "val2017" / "a.jpg")
    found = read_images("image-text-retrieval", str(tmp_path))
    assert found.name == "COCO captions" and found.records[0]["captions"] == [f"caption {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("file", "path", "name"),
    (
        ("dataset_coco.json", "val2014/a.jpg", "COCO captions"),
        ("dataset_flickr30k.json", "flickr30k-images/a.jpg", "Flickr30k"),
    ),
)
def test_karpathy_splits(file, path, name, tmp_path):
    entry = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]}
    if "coco" in file:
        entry["filepath"] = "val2014"
    write(tmp_path / file, {"images": [entry, {**entry, "split": "train", "filename": "none.jpg"}]})
    image(tmp_path / path)
    found = read_images("image-text-retrieval", str(tmp_path))
    assert found.name == name and found.split == "test"
    assert [record["captions"] for record in found.records] == [["one", "two"]]
    with pytest.raises(ValueError, match="1 of 2 images of .* are missing, the first is .*none.jpg"):
        read_images("image-text-retrieval", str(tmp_path), split="all")


def test_flickr_test_captions(tmp_path):
    write(tmp_path / "test_caption.json", [{"filename": "1.jpg", "captions": ["a", "b", "c", "d", "e"]}])
    image(tmp_path / "flickr30k-images" / "1.jpg")
    assert len(read_images("image-text-retrieval", str(tmp_path), split="test").records[0]["captions"]) == 5
    with pytest.raises(ValueError, match="`split` must not be given for .*: it has no split but 'test', got 'val'"):
        read_images("image-text-retrieval", str(tmp_path), split="val")


def test_urban1k(tmp_path):
    for name in ("2", "10"):
        image(tmp_path / "image" / f"{name}.jpg")
        (tmp_path / "caption").mkdir(exist_ok=True)
        (tmp_path / "caption" / f"{name}.txt").write_text(f"A long text.\nOf image {name}.\n")
    found = read_images("long-text-retrieval", str(tmp_path))
    assert [record["captions"] for record in found.records] == [
        ["A long text.\nOf image 10."],
        ["A long text.\nOf image 2."],
    ]
    with pytest.raises(ValueError, match="`split` must not be given for texts in .*: it has no splits, got 'test'"):
        read_images("long-text-retrieval", str(tmp_path), split="test")
    (tmp_path / "caption" / "2.txt").unlink()
    with pytest.raises(ValueError, match="The text of an image is missing: .*2.txt"):
        read_images("long-text-retrieval", str(tmp_path))


def test_docci(tmp_path):
    lines = [
        {"example_id": f"{split}_0", "split": split, "image_file": f"{split}.jpg", "description": f"of {split}"}
        for split in ("train", "test")
    ]
    write(tmp_path / "docci_descriptions.jsonlines", lines)
    for split in ("train", "test"):
        image(tmp_path / "images" / f"{split}.jpg")
    found = read_images("long-text-retrieval", str(tmp_path))
    assert found.name == "DOCCI" and [record["captions"] for record in found.records] == [["of test"]]
    assert len(read_images("long-text-retrieval", str(tmp_path), split="all").records) == 2


def test_dci(tmp_path):
    for name in ("a", "b"):
        entry = {"image": f"{name}.jpg", "short_caption": f"Short {name}.", "extra_caption": "And more.\n"}
        write(tmp_path / "annotations" / f"{name}.json", entry)
        image(tmp_path / "photos" / f"{name}.jpg")
    write(tmp_path / "splits.json", {"train": ["a.json"], "test": ["b.json"]})
    found = read_images("long-text-retrieval", str(tmp_path))
    assert found.split == "test" and [record["captions"] for record in found.records] == [["Short b.\nAnd more."]]
    assert len(read_images("long-text-retrieval", str(tmp_path), split="all").records) == 2
    (tmp_path / "splits.json").unlink()
    assert len(read_images("long-text-retrieval", str(tmp_path)).records) == 2
    with pytest.raises(ValueError, match="annotations without .*splits.json"):
        read_images("long-text-retrieval", str(tmp_path), split="test")


def test_sharegpt4v(tmp_path):
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A long answer."}]
    write(tmp_path / "share_captioner.json", [{"id": "1", "image": "sam/images/1.jpg", "conversations": turns}])
    image(tmp_path / "sam" / "images" / "1.jpg")
    found = read_images("long-text-retrieval", str(tmp_path))
    write(tmp_path / "another.json", [{"id": "1", "image": "sam/images/1.jpg", "conversations": turns}] * 2)
    write(tmp_path / "settings.json", {"conversations": 1})
    with pytest.raises(ValueError, match="`split` must be one of another, share_captioner of .*, got None"):
        read_images("long-text-retrieval", str(tmp_path))
    assert len(read_images("long-text-retrieval", str(tmp_path), split="another").records) == 2
    assert found.name == "share_captioner" and found.records[0]["captions"] == ["A long answer."]


def expressions(folder):
    objects = [{"id": 1, "bbox": [0, 0, 10, 10]}, {"id": 2, "bbox": [20, 20, 30, 20]}]
    line = {
        "image_id": 7,
        "file_name": "COCO_train2014_000000000007_0.jpg",
        "anns": objects,
        "ann_id": 2,
        "sentences": [{"raw": "The Right one"}, {"raw": "lower box"}],
    }
    other = {**line, "file_name": "COCO_train2014_000000000007_1.jpg", "ann_id": 1, "sentences": [{"raw": "left"}]}
    write(folder / "refcoco_val.jsonl", [line, other])
    image(folder / "train2014" / "COCO_train2014_000000000007.jpg")


def test_referring(tmp_path):
    expressions(tmp_path)
    found = read_images("referring", str(tmp_path))
    assert (found.name, found.split) == ("refcoco", "val, objects")
    (record,) = found.records
    assert [region["box"] for region in record["regions"]] == [[0, 0, 10, 10], [20, 20, 50, 40]]
    assert record["expressions"] == [
        {"text": "The Right one", "boxes": [[20, 20, 50, 40]]},
        {"text": "lower box", "boxes": [[20, 20, 50, 40]]},
        {"text": "left", "boxes": [[0, 0, 10, 10]]},
    ]


@pytest.mark.parametrize("content", ({"7": [[1, 2, 3, 4]]}, [{"image_id": 7, "box": [1, 2, 3, 4]}]))
def test_referring_among_detections(content, tmp_path):
    expressions(tmp_path)
    with pytest.raises(FileNotFoundError, match="detections.json is missing"):
        read_images("referring", str(tmp_path), candidates="detections")
    write(tmp_path / "detections.json", content)
    (record,) = read_images("referring", str(tmp_path), candidates="detections").records
    assert [region["box"] for region in record["regions"]] == [[1, 2, 4, 6]]
    assert record["expressions"][2]["boxes"] == [[0, 0, 10, 10]]


def test_class_folders(tmp_path):
    for name in ("n01", "n02"):
        image(tmp_path / name / "x.JPEG")
    found = read_images("zero-shot-classification", str(tmp_path))
    assert found.categories == ["n01", "n02"] and [record["label"] for record in found.records] == [0, 1]
    write(tmp_path / "classes.json", {"n01": "tench", "n02": "goldfish", "n03": "shark"})
    assert read_images("zero-shot-classification", str(tmp_path)).categories == ["tench", "goldfish"]
    with pytest.raises(ValueError, match="`split` must not be given for class folders"):
        read_images("zero-shot-classification", str(tmp_path), split="val")
    # As ImageNet's two cranes: two classes.
    write(tmp_path / "classes.json", {"n01": "crane", "n02": "crane"})
    found = read_images("zero-shot-classification", str(tmp_path))
    assert found.categories == ["crane", "crane"] and [record["label"] for record in found.records] == [0, 1]
    write(tmp_path / "classes.json", {"n01": "tench"})
    with pytest.raises(ValueError, match="must name every class folder; it lacks n02"):
        read_images("zero-shot-classification", str(tmp_path))


def test_record_datasets(tmp_path):
    scenes = scenes_dataset(3, split="test", size=32)
    datasets.DatasetDict({"test": scenes}).save_to_disk(tmp_path / "saved")
    found = read_images("region-retrieval", str(tmp_path / "saved"))
    assert found.split == "test" and len(found.records) == 3
    assert found.categories == sorted({r["category"] for regions in scenes["regions"] for r in regions})
    assert open_image(found.records[1]["image"]).tobytes() == scenes[1]["image"].tobytes()


def test_scenes():
    found = read_images("region-classification", "scenes:4:1")
    assert found.name == "scenes" and len(found.records) == 4 and found.split == "test"
    with pytest.raises(ValueError, match="`split` must not be given for scenes:4:1"):
        read_images("region-classification", "scenes:4:1", split="val")
    assert parse_scenes("scenes:10:3") == (10, 3)
    for wrong in ("scenes:10", "scenes:0:1", "scenes:a:1", "scenes:1:2:3"):
        with pytest.raises(ValueError, match="`data_dir` must be scenes:N:SEED"):
            parse_scenes(wrong)


@pytest.mark.parametrize("task", LAYOUTS)
def test_an_empty_folder_says_what_belongs_there(task, tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)Expected.*DATA_DIR"):
        read_images(task, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="(?s)must be a folder for .*, got '/no/such'. Expected.*DATA_DIR"):
        read_images(task, "/no/such")


def test_missing_images_are_counted_before_work(tmp_path):
    coco(tmp_path)
    (tmp_path / "val2017" / "000000000007.jpg").unlink()
    with pytest.raises(ValueError, match="(?s)1 of 1 images of COCO are missing, the first is .*000000000007.jpg"):
        read_images("region-classification", str(tmp_path))
    with pytest.raises(ValueError, match="`split` must be one of val2017 of .*, got 'train2017'"):
        read_images("region-classification", str(tmp_path), split="train2017")
    with pytest.raises(ValueError, match="`task` must be one of"):
        read_images("detection", str(tmp_path))
