import copy
import io

import numpy as np
import pytest
from coco_codes import compressed
from PIL import ExifTags, Image

from pixclip_hf.processing.processing_regions import encode_rle
from pixclip_hf.record import record_features, validate_record


@pytest.fixture
def record():
    mask = np.zeros((12, 20), dtype=bool)
    mask[2:5, 3:9] = True
    region = {
        "id": 5,
        "box": [3.0, 2.0, 9.0, 5.0],
        "mask": encode_rle(mask),
        "category": "mug",
        "caption": "a red mug",
        "long_caption": "A red mug on a table.",
        "score": 0.5,
        "source": "hand",
    }
    bare = dict.fromkeys(region) | {"id": 6, "box": region["box"]}
    return {
        "image": Image.new("RGB", (20, 12)),
        "width": 20,
        "height": 12,
        "captions": ["A mug.", "A table."],
        "alt_text": "mug.jpg",
        "regions": [region, bare],
    }


def test_good_records_pass(record):
    validate_record(record)
    validate_record({**record, "captions": [], "alt_text": None, "regions": []})
    validate_record({**record, "width": np.int64(20), "regions": [{**record["regions"][0], "score": np.float32(1)}]})


def test_a_record_survives_datasets(record, tmp_path):
    datasets = pytest.importorskip("datasets")
    written = datasets.Dataset.from_list([record, record], features=record_features())
    written.to_parquet(tmp_path / "shard.parquet")
    read = datasets.Dataset.from_parquet(str(tmp_path / "shard.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features == record_features()
    row = read[1]
    validate_record(row)
    assert row["image"].tobytes() == record["image"].tobytes()
    assert {name: value for name, value in row.items() if name != "image"} == {
        name: value for name, value in record.items() if name != "image"
    }


def test_images_must_be_upright(record):
    """`datasets` turns by the EXIF orientation what a record's boxes do not follow."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    record["image"].save(buffer, "JPEG", exif=exif)
    with pytest.raises(ValueError, match="`image` must be upright, got EXIF orientation 3: .*exif_transpose"):
        validate_record({**record, "image": Image.open(buffer)})


def test_encoded_images_pass(record):
    buffer = io.BytesIO()
    record["image"].save(buffer, format="PNG")
    validate_record({**record, "image": {"bytes": buffer.getvalue(), "path": None}})
    validate_record({**record, "image": {"bytes": None, "path": "mug.png"}})


def replaced(record, path, value):
    record = copy.deepcopy(record)
    target = record
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return record


OTHER_SIZE = encode_rle(np.ones((12, 21), dtype=bool))
EMPTY = encode_rle(np.zeros((12, 20), dtype=bool))
REGION = ("regions", 0)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (("width",), 20.0, TypeError, "`width` must be an integer, got 20.0"),
        (("width",), True, TypeError, "`width` must be an integer, got True"),
        (("height",), 0, ValueError, "`height` must be at least 1, got 0"),
        (("width",), 21, ValueError, r"`image` is \(20, 12\) \(width, height\) but the record says \(21, 12\)"),
        (("image",), "mug.png", TypeError, "`image` must be a PIL image or a dict .* got str"),
        (("image",), {"bytes": None, "path": None}, TypeError, "`image` must be a PIL image or a dict .* got dict"),
        (("captions",), "A mug.", TypeError, "`captions` must be a list, got str"),
        (("captions", 1), 7, TypeError, r"`captions\[1\]` must be a str, got 7"),
        (("captions", 1), " ", ValueError, r"`captions\[1\]` must not be empty, got ' '"),
        (("alt_text",), "", ValueError, "`alt_text` must not be empty"),
        (("regions",), {"box": []}, TypeError, "`regions` must be a list, got dict"),
        (("regions", 1), [1, 2], TypeError, r"`regions\[1\]` must be a dict, got list"),
        ((*REGION, "id"), "5", TypeError, r"`regions\[0\]\['id'\]` must be an integer, got '5'"),
        ((*REGION, "id"), 6, ValueError, r"`regions\[1\]\['id'\]` must be unique in its image, got 6 again"),
        ((*REGION, "box"), [0, 0, 5], ValueError, r"`regions\[0\]\['box'\]` must have 4 numbers .* got 3"),
        ((*REGION, "box"), None, TypeError, r"`regions\[0\]\['box'\]` must be a list, got NoneType"),
        ((*REGION, "box", 2), float("nan"), ValueError, r"`regions\[0\]\['box'\]\[2\]` must be finite, got nan"),
        ((*REGION, "box", 1), "2", TypeError, r"`regions\[0\]\['box'\]\[1\]` must be a number, got '2'"),
        ((*REGION, "box", 2), 3.0, ValueError, r"x1 > x0 and y1 > y0, got \[3.0, 2.0, 3.0, 5.0\]"),
        ((*REGION, "box", 3), 12.5, ValueError, r"must lie in the image of 20 x 12 pixels, got .*12.5"),
        ((*REGION, "box", 2), 20.5, ValueError, r"must lie in the image of 20 x 12 pixels, got .*20.5"),
        ((*REGION, "box", 0), -1.0, ValueError, r"must lie in the image of 20 x 12 pixels, got \[-1.0"),
        ((*REGION, "mask"), OTHER_SIZE, ValueError, r"must be \[height, width\] = \[12, 20\], got \[12, 21\]"),
        ((*REGION, "mask"), EMPTY, ValueError, r"`regions\[0\]\['mask'\]` must hold at least one pixel"),
        ((*REGION, "mask", "counts"), "1", ValueError, r"`regions\[0\]\['mask'\]` is not a valid run-length code"),
        ((*REGION, "mask", "counts"), [240], TypeError, r"\['counts'\]` must be a compressed str, got list"),
        ((*REGION, "mask"), {"size": [12, 20]}, ValueError, r"exactly the fields .* missing \['counts'\]"),
        ((*REGION, "caption"), "", ValueError, r"`regions\[0\]\['caption'\]` must not be empty"),
        ((*REGION, "long_caption"), 1.5, TypeError, r"`regions\[0\]\['long_caption'\]` must be a str, got 1.5"),
        ((*REGION, "score"), "1", TypeError, r"`regions\[0\]\['score'\]` must be a number, got '1'"),
        ((*REGION, "score"), float("inf"), ValueError, r"`regions\[0\]\['score'\]` must be finite, got inf"),
        ((*REGION, "source"), 3, TypeError, r"`regions\[0\]\['source'\]` must be a str, got 3"),
    ],
)
def test_bad_records_say_what_is_wrong(record, path, value, error, message):
    with pytest.raises(error, match=message):
        validate_record(replaced(record, path, value))


def test_fields_must_match(record):
    extra = {**record, "url": "x"}
    with pytest.raises(ValueError, match=r"`record` must have exactly the fields .* unknown \['url'\]"):
        validate_record(extra)
    del record["alt_text"]
    with pytest.raises(ValueError, match=r"missing \['alt_text'\]"):
        validate_record(record)
    with pytest.raises(TypeError, match="`record` must be a dict, got list"):
        validate_record([record])


@pytest.mark.parametrize("seed", range(20))
def test_every_code_of_a_mask_is_read(seed, record):
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 20)) < rng.random()
    mask[0, 0] = True
    region = {**record["regions"][0], "mask": encode_rle(mask)}
    validate_record({**record, "regions": [region]})


def test_runs_beyond_64_bits_do_not_add_up(record):
    """2**64 pixels too many: in arithmetic that wraps, the sum would be right."""
    counts = compressed([0, 2**62, 2**62, 2**62, 2**62, 240])
    region = {**record["regions"][0], "mask": {"size": [12, 20], "counts": counts}}
    with pytest.raises(ValueError, match="add up to 12 x 20, got a sum of 18446744073709551856"):
        validate_record({**record, "regions": [region]})
