"""What others wrote and nobody can read: it costs the item or the region alone, by name and counted."""

import io
import json
import os
import pickle
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pixclip_hf import load_records, make_scene, save_records
from pixclip_hf.annotation.sources import ReadRecords, cached_source, read_record
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.data.collator import RegionCollator, RegionDataset
from pixclip_hf.data.skipping import ReadableRecords
from pixclip_hf.data.sources import open_source
from pixclip_hf.data.streaming import RecordStream, stream_records
from pixclip_hf.images import check_image, inside, open_image, store_image, stored_bytes
from pixclip_hf.record import LeftOut, foreign, validate_record

SIZE = (40, 30)
FAULTS = Path(__file__).parents[3] / "shared/faults"
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def upright_bytes(data):
    return store_image(data)[0]


def tagged(orientation, **tags):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for tag, value in tags.items():
        exif[int(tag)] = value
    return exif


def read(source, **arguments):
    """Names of the items -> record, or the reason of its rejection; and what was left out."""
    cached_source.cache_clear()
    opened = open_source(source, **arguments)
    stage = ReadRecords((opened.kind, *(f"{name}={value}" for name, value in arguments.items() if value is not None)))
    batch = stage({name: [None] * len(opened) for name in pipeline_features([])} | {"position": range(len(opened))})
    found, left_out = {}, Counter(opened.left_out)
    for row, name in enumerate(batch["record_id"]):
        reason = batch["rejected_reason"][row]
        found[name] = reason
        if reason is None:
            found[name] = record = {
                field: batch[field][row] for field in ("image", "width", "height", "captions", "alt_text", "regions")
            }
            validate_record(record)
        for entry in batch["counts"][row] or ():
            left_out[entry["name"].removeprefix("source/")] += entry["count"]
    left_out.pop("regions", None)
    return found, dict(+left_out)


# Images.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_what_is_stored_is_upright_and_without_metadata(orientation, suffix, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    path = picture(tmp_path / f"a.{suffix}", exif=tagged(orientation, **{"271": "a camera"}), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    stored = upright_bytes(path.read_bytes())
    image = Image.open(io.BytesIO(stored))
    assert not dict(image.getexif()) and b"camera" not in stored
    assert np.array_equal(np.asarray(image.convert("RGB")), expected)
    assert np.array_equal(np.asarray(open_image({"bytes": stored})), expected)
    assert upright_bytes(stored) == stored


def test_what_is_upright_already_is_not_coded_anew(tmp_path):
    plain = picture(tmp_path / "a.jpg", icc_profile=b"a profile").read_bytes()
    told = picture(tmp_path / "b.jpg", icc_profile=b"a profile", exif=tagged(0), comment=b"by whom").read_bytes()
    assert upright_bytes(plain) == plain == upright_bytes(told)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"):
        broken = picture(tmp_path / "c.jpg", icc_profile=b"a profile", exif=exif).read_bytes()
        assert upright_bytes(broken) == plain


def test_a_cut_photograph_does_not_look_whole_without_its_metadata(tmp_path):
    data = picture(tmp_path / "a.jpg", size=(400, 300), exif=tagged(1, **{"271": "a camera"})).read_bytes()
    for length in (len(data) // 2, len(data) - 50):
        with pytest.raises(ValueError, match="corrupt image"):
            open_image({"bytes": upright_bytes(data[:length])})


def test_progressive_and_multi_picture_jpegs_lose_their_metadata_alone(tmp_path):
    for name, options in (("a.jpg", {"progressive": True}), ("b.mpo", {"save_all": True})):
        path = picture(tmp_path / name, exif=tagged(1, **{"271": "a camera"}), **options)
        stored = upright_bytes(path.read_bytes() + b"trailer: a camera")
        assert b"camera" not in stored
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(Image.open(path)))


@pytest.mark.parametrize("orientation", [6, 0, 9])
def test_annotated_phone_photographs_stream_into_training(orientation, tmp_path):
    """Size and boxes of the upright image; a stream takes every record."""
    from pixclip_hf.data.streaming import RecordStream, stream_records

    picture(tmp_path / "photos/a.jpg", exif=tagged(orientation))
    size = (30, 40) if orientation == 6 else SIZE
    region = {"id": 1, "category": "cup", "box": [0, 0, size[0], 10], "expressions": ["a cup"]}
    entry = {"image": "a.jpg", "width": size[0], "height": size[1], "captions": ["c"], "regions": [region]}
    write(tmp_path / "photos/regions.jsonl", entry)
    records = load_records("regions", folder=str(tmp_path / "photos"))
    save_records(records, tmp_path / "data")
    stream = RecordStream(stream_records(str(tmp_path / "data"), "train"), max_corrupt_share=0)
    record = next(iter(stream))
    assert record["image"].size == size and record["regions"][0]["box"] == [0, 0, size[0], 10]
    validate_record(records[0])


@pytest.mark.skipif(not FAULTS.is_dir(), reason="the faulty photograph of ../shared is not here")
def test_a_photograph_with_a_broken_tag_among_others(tmp_path):
    (tmp_path / "b.jpg").write_bytes((FAULTS / "turned_with_broken_tag.jpg").read_bytes())
    picture(tmp_path / "a.jpg"), picture(tmp_path / "c.jpg")
    entries = [
        {"image": name, "width": width, "height": height, "captions": ["x"], "regions": []}
        for name, width, height in (("a.jpg", 40, 30), ("b.jpg", 48, 64), ("c.jpg", 40, 30))
    ]
    write(tmp_path / "regions.jsonl", "\n".join(map(json.dumps, entries)))
    found, _ = read("regions", folder=str(tmp_path))
    assert [record["width"] for record in found.values()] == [40, 48, 40]
    # Annotations of the pixels as they lie speak of another image.
    entries[1] |= {"width": 64, "height": 48}
    write(tmp_path / "regions.jsonl", "\n".join(map(json.dumps, entries)))
    found, _ = read("regions", folder=str(tmp_path))
    assert found["b.jpg"] == "image of another size than its annotations" and len(found) == 3


def test_files_that_are_no_images_are_rejected_by_name(tmp_path):
    good = picture(tmp_path / "good.png")
    for name, content in (
        ("empty.jpg", b""),
        ("text.jpg", b"<html>not found</html>"),
        ("cut.png", good.read_bytes()[:200]),
        ("cut.jpg", picture(tmp_path / "x.jpg").read_bytes()[:-200]),
        ("head.tif", b"II*\0\x08\0\0\0\xff\xff"),
        ("noise.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff"),
        ("gif.gif", b"GIF89a\xff\xff\xff\xff"),
    ):
        (tmp_path / name).write_bytes(content)
    found, _ = read("images", folder=str(tmp_path))
    assert len(found) == 9 and {name for name, record in found.items() if isinstance(record, dict)} == {
        "good.png", "x.jpg",
    }  # fmt: skip
    assert {record for record in found.values() if isinstance(record, str)} == {"image not readable"}
    for name, record in found.items():
        if isinstance(record, str):
            with pytest.raises(LeftOut, match="not readable"):
                check_image(str(tmp_path / name))


@pytest.mark.parametrize("address", ["http://example.org/x.png", "HTTPS://example.org/x.png", "file:///x.png"])
def test_addresses_in_datasets_are_not_followed(address):
    with pytest.raises(ValueError, match="stored by an address alone"):
        open_image({"bytes": None, "path": address})


def test_faults_of_the_machine_end_the_run():
    for error in (OSError(24, "Too many open files"), ModuleNotFoundError("faiss")):
        with pytest.raises(type(error)), foreign("image not readable"):
            raise error
    with pytest.raises(ValueError, match="not written"), foreign("image not readable"):
        raise ValueError("not written") from OSError(28, "No space left")
    for error in (RecursionError(), MemoryError(), KeyError("x"), SyntaxError(), EOFError(), OverflowError()):
        with pytest.raises(LeftOut, match="image not readable"), foreign("image not readable"):
            raise error


# Names.


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "a\0.png", "//host/x.png"])
def test_names_never_leave_their_folder(name, tmp_path):
    with pytest.raises(LeftOut, match="outside of its folder"):
        inside(tmp_path / "images", name)
    with pytest.raises(LeftOut, match="outside of its folder"):
        stored_bytes({"bytes": None, "path": name}, tmp_path / "images")
    assert inside(tmp_path, "a/../b.png").name == "b.png" and inside(tmp_path, str(tmp_path / "b.png")).name == "b.png"


def coco(folder, images, annotations=(), categories=({"id": 3, "name": "cup"},)):
    content = {"images": images, "annotations": list(annotations), "categories": list(categories)}
    return {"annotations": write(folder / "i.json", content), "images": str(folder / "images")}


@pytest.mark.parametrize("kind", ["coco", "regions", "karpathy", "csv", "docci", "sharegpt4v", "voc", "dci"])
def test_no_annotation_file_reads_what_lies_elsewhere(kind, tmp_path):
    folder = tmp_path / "data"
    picture(tmp_path / "private.jpg")
    for name in ("", "images", "JPEGImages", "photos"):
        picture(folder / name / "own.jpg")
    names = ["own.jpg", "../private.jpg", "../../private.jpg", str(tmp_path / "private.jpg")]
    if kind == "coco":
        images = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)]
        arguments = coco(folder, images)
    elif kind == "regions":
        lines = [{"image": name, "width": 40, "height": 30, "captions": [], "regions": []} for name in names]
        write(folder / "regions.jsonl", "\n".join(map(json.dumps, lines)))
        arguments = {"folder": str(folder)}
    elif kind == "karpathy":
        content = {"images": [{"filename": name, "sentences": [{"raw": "x"}]} for name in names]}
        arguments = {"annotations": write(folder / "d.json", content), "images": str(folder / "images")}
    elif kind == "csv":
        table = write(folder / "t.csv", "image,caption\n" + "".join(f"{name},x\n" for name in names))
        arguments = {"table": table, "images": str(folder / "images")}
    elif kind == "docci":
        lines = [{"split": "test", "image_file": name, "description": "x"} for name in names]
        write(folder / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, lines)))
        arguments = {"folder": str(folder)}
    elif kind == "sharegpt4v":
        turns = [{"from": "gpt", "value": "x"}]
        path = write(folder / "s.json", [{"image": name, "conversations": turns} for name in names])
        arguments = {"annotations": path, "images": str(folder / "images")}
    elif kind == "voc":
        for number, name in enumerate(names):
            write(folder / f"Annotations/{number}.xml", f"<annotation><filename>{name}</filename></annotation>")
        write(folder / "ImageSets/Main/val.txt", "own\n../../private\n")
        write(folder / "Annotations/own.xml", "<annotation/>")
        found, _ = read("voc", folder=str(folder), split="val")
        assert list(found.values())[1:] == ["image outside of its folder"]
        arguments = {"folder": str(folder)}
    else:
        for number, name in enumerate(names):
            write(folder / f"annotations/{number}.json", {"image": name, "short_caption": "x", "extra_caption": "y"})
        arguments = {"folder": str(folder)}
    found, _ = read(kind, **arguments)
    reasons = Counter(record for record in found.values() if isinstance(record, str))
    if kind == "voc":  # names without their folder, as its tools write them
        assert set(reasons) == {"image missing"} and len(reasons) == 1
    else:
        assert len(found) == 4 and set(reasons) == {"image outside of its folder"}
    # Planning a run asks for the sizes of files, and leaves these alone too.
    source = open_source(kind, **arguments)
    assert sum(count for count, _ in source.units()) == len(source) and source.fingerprint()


def test_hidden_files_are_passed_over_and_other_names_are_names(tmp_path):
    for name in ("a b.png", "c,d:e.png", "f.g.h.png", ".hidden.png", "._a b.png", ".ipynb_checkpoints/a b.png"):
        picture(tmp_path / "x" / name)
    picture(tmp_path / "x/é/ü.tif")
    with open(os.fsencode(tmp_path) + b"/x/caf\xe9.png", "wb") as file:
        file.write((tmp_path / "x/a b.png").read_bytes())
    found, _ = read("images", folder=str(tmp_path / "x"))
    assert set(found) == {"a b.png", "c,d:e.png", "f.g.h.png", "é/ü.tif", "caf\\xe9.png"}
    assert all(isinstance(record, dict) for record in found.values())
    found, _ = read("class_folders", folder=str(tmp_path))
    assert len(found) == 4  # of one folder deep


# Annotations.

GOOD = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 5]}
BAD_REGIONS = {
    "region left out: not readable": [
        {"bbox": "all"}, {"bbox": [1, 2, 3]}, {"bbox": [None] * 4}, {"bbox": {"x": 1}}, {"bbox": ["a", 2, 3, 4]},
        {"bbox": [[1, 2], [3, 4]]}, {"id": None}, {"id": "seven"}, {"id": 2**70}, {"score": "high"},
        {"caption": "\ud800"}, {"category_id": [3]}, {"bbox": [10**400, 1, 2, 3]},
    ],
    "region left out: no area on the image": [
        {"bbox": [1, 2, 0, 5]}, {"bbox": [1, 2, 10, 0]}, {"bbox": [1, 2, -5, 5]}, {"bbox": []}, {"bbox": None},
        {"bbox": [90, 2, 10, 5]}, {"bbox": [float("nan")] * 4},
    ],
    "region left out: of an unknown category": [{"category_id": 9}, {"category_id": "cup"}],
    "region left out: a crowd": [{"iscrowd": 1}, {"iscrowd": True}],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_REGIONS)
def test_a_region_with_a_fault_costs_itself_alone(reason, tmp_path):
    picture(tmp_path / "images/a.png")
    bad = [{**GOOD, "id": 10 + number, **fault} for number, fault in enumerate(BAD_REGIONS[reason])]
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    arguments = coco(tmp_path, images, [{**GOOD, "id": 1}, *bad, {**GOOD, "id": 2}])
    found, left_out = read("coco", **arguments)
    assert [region["id"] for region in found["a.png"]["regions"]] == [1, 2]
    assert left_out == {reason: len(bad)}


def test_entries_that_belong_to_nothing_cost_themselves_alone(tmp_path):
    picture(tmp_path / "images/a.png")
    images = [
        {"id": 1, "file_name": "a.png", "width": None, "height": 30},
        "no entry", {"file_name": "b.png"}, {"id": 2}, {"id": 3, "file_name": 7}, {"id": 4, "file_name": None},
    ]  # fmt: skip
    annotations = [{**GOOD, "id": 1}, "no annotation", None, [], {"id": 4}, {"id": 5, "image_id": 1, "caption": None}]
    arguments = coco(tmp_path, images, annotations, ({"id": 3, "name": "cup"}, {"name": "no id"}, None))
    found, left_out = read("coco", **arguments)
    assert found.pop("a.png")["regions"][0]["category"] == "cup"
    assert len(found) == 5 and all("not readable" in reason or "without a name" in reason for reason in found.values())
    assert left_out == {"category left out: not readable": 2, "annotation left out: not readable": 4}


def test_lines_of_every_fault_are_rejected_by_number(tmp_path):
    picture(tmp_path / "a.png")
    good = {"image": "a.png", "width": 40, "height": 30, "captions": ["c"], "regions": []}
    region = {"id": 1, "box": [1, 2, 11, 7]}
    lines = [
        good, {**good, "captions": None}, {"image": "a.png"}, {**good, "regions": [region, None, "x", 7, []]},
        {**good, "regions": "all"}, {**good, "captions": ["\ud800", " ", 7, "fine"]}, {**good, "captions": "one"},
    ]  # fmt: skip
    broken = [
        "{", "[]", "7", DEEP, json.dumps({**good, "image": None}), json.dumps({**good, "image": "a\ud800.png"}),
        json.dumps({**good, "width": "wide"}), '{"image": "a.png", "width": ' + "1" * 5000 + "}",
    ]  # fmt: skip
    write(tmp_path / "regions.jsonl", "\n".join([*map(json.dumps, lines), *broken]))
    source = open_source("regions", folder=str(tmp_path))
    assert len(source) == len(lines) + len(broken)
    records = [read_record(source.read(position), "regions") for position in range(len(lines))]
    assert [record["captions"] for record, _ in records] == [["c"], [], [], ["c"], ["c"], ["fine"], ["one"]]
    assert [len(record["regions"]) for record, _ in records] == [0, 0, 0, 1, 0, 0, 0]
    assert records[3][1]["region left out: not readable"] == 4 and records[4][1]["region left out: not readable"] == 1
    assert records[5][1]["caption left out: not readable"] == 1
    for position in range(len(lines), len(source)):
        with pytest.raises(LeftOut):
            read_record(source.read(position), "regions")


def test_xml_tables_and_pickles(tmp_path):
    voc = tmp_path / "voc"
    whole = "<annotation><object><name>a</name><bndbox>{}</bndbox></object></annotation>"
    box = "<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax>"
    for name, text in (
        ("a", whole.format(box)),
        ("b", "<annotation>"),
        ("c", ""),
        ("d", whole.format("<xmin>x</xmin>")),
    ):
        picture(voc / f"JPEGImages/{name}.jpg")
        write(voc / f"Annotations/{name}.xml", text)
    found, left_out = read("voc", folder=str(voc))
    assert len(found["a"]["regions"]) == 1 and found["d"]["regions"] == []
    assert left_out == {"region left out: not readable": 1}
    assert found["b"].startswith(found["c"][:37]) and "annotation not readable: ParseError" in found["b"]

    picture(tmp_path / "images/a.png")
    table = write(tmp_path / "t.csv", '\ufeffimage,caption\r\na.png,"two\nlines"\r\na.png,a\rb\na.png,\u2028end\r\n')
    found, left_out = read("csv", table=table, images=str(tmp_path / "images"))
    assert found["a.png"]["captions"] == ["two\nlines", "end"] and left_out == {"row left out: not readable": 1}

    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    instances = coco(tmp_path, images, [{**GOOD, "id": 5}, {"image_id": 1, "id": 6, "category_id": 3}])["annotations"]
    sentence = {"sent_id": 1, "sent": "a cup"}
    refs = [
        {"ann_id": 5, "image_id": 1, "sentences": [sentence, {"sent": "no id"}, None]},
        {"ann_id": 6, "image_id": 1, "sentences": [{"sent_id": 2, "sent": "no box"}]},
        {"image_id": 1}, None, {"ann_id": 5, "image_id": 1, "sentences": None},
    ]  # fmt: skip
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=2))
    found, left_out = read(
        "refcoco", refs=str(tmp_path / "refs.p"), instances=instances, images=str(tmp_path / "images")
    )
    assert [region["caption"] for region in found["a.png"]["regions"]] == ["a cup"]
    assert left_out["region left out: not readable"] == 3 and left_out["region left out: no area on the image"] == 1
    assert left_out["expression left out: not readable"] == 2


def add_to(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_broken_tars_among_others(tmp_path):
    image = picture(tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").unlink()
    good = {
        "caption": "a dog on grass",
        "ref_exps": [[0, 5, 0.1, 0.2, 0.5, 0.9, 0.9], [0, 5], None, [0, "x", *[0] * 5]],
    }
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for key, content in (("1", json.dumps(good)), ("2", "{"), ("3", json.dumps({**good, "noun_chunks": "["}))):
            add_to(archive, f"{key}.jpg", image)
            add_to(archive, f"{key}.json", content.encode())
        add_to(archive, "4.jpg", b"no image")
        add_to(archive, "4.json", json.dumps(good).encode())
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1500])
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    found, left_out = read("grit", folder=str(tmp_path))
    assert [len(found[f"b/{key}"]["regions"]) for key in "13"] == [1, 1]
    assert found["b/2"].startswith("annotation not readable: JSONDecodeError") and found["b/4"] == "image not readable"
    assert left_out["tar left out: not readable"] >= 2 and left_out["region left out: not readable"] == 7


# Training.


def tiny_records(folder, count=6):
    for number in range(count):
        picture(folder / f"{number}.png")
    lines = [
        {"image": f"{number}.png", "width": 40, "height": 30, "captions": [f"image {number}"],
         "regions": [{"id": number, "box": [1, 2, 11, 7], "category": "cup", "expressions": [f"cup {number}"]}]}
        for number in range(count)
    ]  # fmt: skip
    write(folder / "regions.jsonl", "\n".join(map(json.dumps, lines)))
    return load_records("regions", folder=str(folder))


def test_training_goes_past_records_that_cannot_be_read(tmp_path, tiny_pixclip, caplog):
    records = tiny_records(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:300])
    (tmp_path / "4.png").unlink()
    dataset = RegionDataset(records)
    found = [dataset[index] for index in range(6)]
    assert [record["regions"][0]["id"] for record in found if record["sample_key"][1] in (0, 1, 3, 5)]
    for index, record in enumerate(found):
        assert (record["sample_key"] == (0, index)) == (index not in (2, 4))
        assert record["regions"][0]["id"] == record["sample_key"][1] and record["image"].size == SIZE
    again = [RegionDataset(records)[index]["sample_key"] for index in range(6)]
    assert again == [record["sample_key"] for record in found]
    assert dataset.corrupt >= 2 and {"record 2", "record 4"} <= {
        message.split(", ")[1].split(":")[0] for message in caplog.messages if "corrupt record" in message
    }
    batch = RegionCollator(tiny_pixclip[1])(found)
    assert batch["pixel_values"].shape[0] == 6
    with pytest.raises(IndexError):
        dataset[6]
    assert len(list(ReadableRecords(records))) == 6


def stored_with(change, tmp_path):
    """Records in Parquet, the second of which was changed by others."""
    (shard,) = save_records(tiny_records(tmp_path, 3), tmp_path / "data")
    table = pq.read_table(shard)
    rows = table.to_pylist()
    change(rows[1])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    return load_records(str(tmp_path / "data"), "train")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("box", [1, 1, 1, 9], "region left out: no area on the image"),
        ("box", [90, 1, 99, 9], "region left out: no area on the image"),
        ("box", [float("nan"), 1, 9, 9], "region left out: no box"),
        ("box", None, "region left out: no box"),
        ("id", None, "region left out: not readable"),
        ("id", 7, "region left out: id twice"),
        ("mask", {"size": [30, 40], "counts": "zz"}, "mask left out: empty or not readable"),
        ("mask", {"size": [3, 4], "counts": "0<"}, "mask left out: empty or not readable"),
        ("caption", " ", "text left out: empty or no text"),
    ],
)
@pytest.mark.parametrize("reader", ["dataset", "stream"])
def test_a_faulty_region_of_a_record_costs_itself_alone_in_training(
    reader, field, value, reason, tmp_path, tiny_pixclip, caplog
):
    def change(row):
        good = {**row["regions"][0], "id": 7}
        row["regions"] = [good, {**good, "id": 8, field: value}]

    records = stored_with(change, tmp_path)
    if reader == "dataset":
        dataset = RegionDataset(records)
        found, left_out, corrupt = [dataset[index] for index in range(3)], dataset.left_out, dataset.corrupt
    else:
        stream = RecordStream(stream_records(str(tmp_path / "data"), "train"))
        read = list(islice(stream.read(), 3))
        found, (left_out, corrupt) = [row for row, _ in read], (read[-1][1]["left_out"], read[-1][1]["corrupt"])
        found.sort(key=lambda row: row["captions"])
    assert (left_out, corrupt) == (1, 0) and any(f"{reason} (1)" in message for message in caplog.messages)
    kept = [region["id"] for region in found[1]["regions"]]
    assert kept == ([7] if reason.startswith("region") else [7, 8])
    batch = RegionCollator(tiny_pixclip[1], regions_per_image=2)(found)
    assert batch["region_attention_mask"].sum() == 3 + (field == "mask")


def test_a_record_of_a_dataset_without_its_image_or_of_another_size_is_skipped(tmp_path, caplog):
    dataset = RegionDataset(stored_with(lambda row: row.update(image=None), tmp_path))
    assert [dataset[index]["image"].size for index in range(3)] == [SIZE] * 3 and dataset.corrupt
    assert any("record 1: image missing" in message for message in caplog.messages)
    dataset = RegionDataset(stored_with(lambda row: row.update(width=99), tmp_path / "other"))
    assert dataset[1]["width"] == 40 and any("its record says (99, 30)" in message for message in caplog.messages)


def test_too_many_of_them_end_the_training(tmp_path):
    records = tiny_records(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="11 of the 11 records .* are corrupt, more than `max_corrupt_share` = 0.01"):
        RegionDataset(records)[0]


def test_texts_of_records_that_cannot_be_read(tmp_path, tiny_pixclip):
    records = tiny_records(tmp_path, 3)
    lines = (tmp_path / "regions.jsonl").read_text().splitlines()
    write(tmp_path / "regions.jsonl", "\n".join([lines[0], "{", lines[2]]))
    records = load_records("regions", folder=str(tmp_path))
    collator = RegionCollator(tiny_pixclip[1])
    assert list(collator.texts(records)) == ["cup 0", "image 0", "cup 2", "image 2"]
    assert collator.text_lengths(records) == [5, 0, 5]


def test_images_of_records_are_read_as_everywhere(tmp_path):
    """A map-style dataset reads what a processor reads: here a 16-bit image and broken EXIF."""
    deep = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    scene = make_scene(0, size=32)
    region = {**scene["regions"][0], "box": [0, 0, 5, 5], "mask": None}
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    record = {
        **scene,
        "image": {"bytes": buffer.getvalue(), "path": None},
        "width": 40,
        "height": 30,
        "regions": [region],
    }
    save_records([record], tmp_path / "data")
    (image,) = (record["image"] for record in ReadableRecords(load_records(str(tmp_path / "data"), "train")))
    assert np.array_equal(np.asarray(image)[..., 0], np.round(deep / 257).astype(np.uint8))
