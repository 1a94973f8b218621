"""Records at the edge of the schema train; what a processor refuses all the same is named, and counted in a stream."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging

from pixclip_hf.data.collator import RegionCollator, RegionDataset, UnusableRecord
from pixclip_hf.data.streaming import RecordStream, StreamLoader, stream_records
from pixclip_hf.processing.processing_regions import encode_rle
from pixclip_hf.record import record_features, validate_record

FAMILIES = ("cloc", "pixclip")
BOXES = {
    "one pixel": ((20, 14), [0, 0, 1, 1]),
    "within a pixel": ((20, 14), [0.25, 0.25, 0.5, 0.75]),
    "a sliver": ((640, 480), [100, 0, 100.0001, 480]),
    "a sliver at the far edge": ((640, 480), [639.9999, 479.9999, 640, 480]),
    "in the tolerance": ((20, 14), [-5e-4, -5e-4, 20.0005, 14.0005]),
    "an image of one pixel": ((1, 1), [0, 0, 1, 1]),
    "an image of one pixel, in the tolerance": ((1, 1), [-5e-4, 0, 1.0005, 1]),
    "an image of one row": ((300, 1), [0, 0, 1, 1]),
}


def record_of(size, box, mask=None, captions=("an image",), image=None):
    region = {
        "id": 7,
        "box": box,
        "mask": mask,
        "category": "thing",
        "caption": "a thing",
        "long_caption": None,
        "score": 1.0,
        "source": None,
    }
    return {
        "image": Image.new("RGB", size, (9, 99, 199)) if image is None else image,
        "width": size[0],
        "height": size[1],
        "captions": list(captions),
        "alt_text": None,
        "regions": [region],
    }


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_small_boxes_train(family, name, request):
    model, processor = request.getfixturevalue(f"tiny_{family}")
    size, box = BOXES[name]
    validate_record(record_of(size, box))
    whole = encode_rle(np.ones(size[::-1], dtype=bool))
    dataset = RegionDataset([record_of(size, box), record_of(size, box, whole)])
    for mask_share in {"cloc": (0, 1), "pixclip": (1,)}[family]:
        collator = RegionCollator(processor, crops=processor.has_crops, mask_prompt_share=mask_share)
        batch = collator([dataset[0], dataset[1]])
        assert batch["region_attention_mask"].all()
        if "region_boxes" in batch:
            shares = batch["region_boxes"][:, 0]
            assert (shares[:, 2:] > shares[:, :2]).all() and shares.min() >= 0 and shares.max() <= 1
        else:
            assert batch["region_masks"].any(-1).any(-1).all()
        loss = model.train()(**batch).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert (dataset.corrupt, dataset.left_out) == (0, 0)


def test_a_box_in_the_tolerance_alone_is_left_out():
    record = record_of((20, 14), [20, 0, 20.0005, 5])
    with pytest.raises(ValueError, match="must have area on the image"):
        validate_record(record)
    dataset = RegionDataset([record])
    assert dataset[0]["regions"] == [] and dataset.left_out == 1


@pytest.mark.parametrize("captions", [[""], [" "], [None], [], None])
def test_empty_captions_train(captions, tiny_cloc):
    dataset = RegionDataset(
        [record_of((20, 14), [0, 0, 1, 1]) | {"captions": captions}, record_of((20, 14), [2, 2, 9, 9])]
    )
    batch = RegionCollator(tiny_cloc[1])([dataset[0], dataset[1]])
    assert batch["attention_mask"].any(-1).tolist() == [False, True]
    assert torch.isfinite(tiny_cloc[0](**batch).loss)


def image_of_mode(mode):
    kind = {"I": np.int32, "F": np.float32}[mode]
    return Image.fromarray(np.arange(280, dtype=kind).reshape(14, 20))


def encoded(image, name):
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF")
    return {"bytes": buffer.getvalue(), "path": name}


@pytest.fixture
def warnings(monkeypatch):
    found = []
    for module in ("pixclip_hf.data.skipping", "pixclip_hf.data.streaming"):
        monkeypatch.setattr(logging.get_logger(module), "warning", found.append)
    return found


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("form", ["PIL", "encoded"])
def test_images_of_unknown_range_are_skipped_counted_and_named(form, mode, warnings):
    image = image_of_mode(mode)
    image = image if form == "PIL" else encoded(image, "a.tif")
    records = [record_of((20, 14), [2, 2, 9, 9], image=image), record_of((20, 14), [2, 2, 9, 9])]
    dataset = RegionDataset(records)
    assert dataset[0]["image"].mode == "RGB" and dataset[0]["sample_key"] == (0, 1)
    assert dataset.corrupt >= 1 and "record 0" in warnings[0] and f"PIL mode '{mode}'" in warnings[0]


class Refusing:
    """A processor that refuses images of one color, as a fault that no check before it has seen."""

    prompts, has_crops = ("box", "mask"), False

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, images, **arguments):
        for i, image in enumerate(images):
            if image.getpixel((0, 0)) == (255, 0, 0):
                raise RuntimeError(f"images[{i}] cannot be used")
        return self.processor(images=images, **arguments)


class OneAtATime(Refusing):
    def __call__(self, images, **arguments):
        if len(images) > 1:
            raise ValueError("one at a time")
        return super().__call__(images, **arguments)


def test_what_fails_in_a_batch_is_named(tiny_cloc, tmp_path):
    Image.new("RGB", (20, 14), (255, 0, 0)).save(tmp_path / "red one.png")
    bad = record_of((20, 14), [2, 2, 9, 9], image=Image.open(tmp_path / "red one.png"))
    bad["regions"][0]["id"] = 41
    good = record_of((20, 14), [2, 2, 9, 9])
    dataset = RegionDataset([good, good, bad])
    collator = RegionCollator(Refusing(tiny_cloc[1]))
    with pytest.raises(
        UnusableRecord, match=r"red one.png', sample key \(0, 2\), region ids \[41\]: .*images\[0\]"
    ) as error:
        collator([dataset[0], dataset[1], dataset[2]])
    assert error.value.position == 2 and isinstance(error.value.__cause__, RuntimeError)
    # One that has no regions, and whose own image is fine, is not the one.
    empty = {**good, "regions": []}
    with pytest.raises(UnusableRecord) as error:
        collator([empty, bad])
    assert error.value.position == 1
    # A fault of the batch and of none of its records stays what it is.
    collator.processor = OneAtATime(tiny_cloc[1])
    with pytest.raises(ValueError, match="^one at a time"):
        collator([good, good])


def test_box_beyond_its_image_is_named_without_a_stream(tiny_cloc):
    record = record_of((20, 14), [30, 2, 39, 9])
    with pytest.raises(UnusableRecord, match=r"region ids \[7\]: .*boxes\[0\]\[0\] lies outside its image"):
        RegionCollator(tiny_cloc[1])([record_of((20, 14), [2, 2, 9, 9]), record])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_in_a_batch_counts_as_corrupt_in_a_stream(workers, tiny_cloc, warnings, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for number in range(12):
        color = (255, 0, 0) if number in (3, 8) else (0, 9, 9)
        row = record_of((20, 14), [2, 2, 9, 9])
        buffer = io.BytesIO()
        Image.new("RGB", (20, 14), color).save(buffer, format="PNG")
        row["image"] = {"bytes": buffer.getvalue(), "path": f"image{number}.png"}
        row["regions"][0]["id"] = number
        rows.append(row)
    (tmp_path / "data").mkdir()
    columns = {name: [row[name] for row in rows] for name in record_features()}
    data = datasets.Dataset.from_dict(columns, features=record_features())
    data.to_parquet(tmp_path / "data/train-00000.parquet")
    seen, inner = [], RegionCollator(Refusing(tiny_cloc[1]))

    def collator(records):
        batch = inner(records)
        batch["ids"] = [record["regions"][0]["id"] for record in records]
        return batch

    def loader():
        stream = RecordStream(stream_records(str(tmp_path / "data"), "train"), shuffle_buffer=4)
        return StreamLoader(stream, collator, 2, num_workers=workers)

    first = loader()
    batches = iter(first)
    states = []
    for _ in range(5):
        seen += next(batches)["ids"]
        states.append(first.state_dict())
    # A pass without the two, in whole batches.
    assert sorted(seen) == [number for number in range(12) if number not in (3, 8)]
    assert first.corrupt == 2
    if not workers:
        assert len(warnings) == 2 and all("Skipped a corrupt record" in warning for warning in warnings)
        assert any("image3.png" in warning and "region ids [3]" in warning for warning in warnings)
    for number, state in enumerate(states[:-1]):
        second = loader()
        second.load_state_dict(state)
        rest = iter(second)
        assert [i for _ in range(4 - number) for i in next(rest)["ids"]] == seen[2 * (number + 1) :]
        assert second.corrupt == 2


def test_too_many_of_them_end_the_run(tiny_cloc, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    buffer = io.BytesIO()
    Image.new("RGB", (20, 14), (255, 0, 0)).save(buffer, format="PNG")
    row = record_of((20, 14), [2, 2, 9, 9], image={"bytes": buffer.getvalue(), "path": "red.png"})
    (tmp_path / "data").mkdir()
    columns = {name: [row[name]] * 30 for name in record_features()}
    datasets.Dataset.from_dict(columns, features=record_features()).to_parquet(tmp_path / "data/train-00000.parquet")
    stream = RecordStream(stream_records(str(tmp_path / "data"), "train"))
    with pytest.raises(ValueError, match=r"11 of the \d+ records .* are corrupt, more than .*red.png"):
        next(iter(StreamLoader(stream, RegionCollator(Refusing(tiny_cloc[1])), 2)))
