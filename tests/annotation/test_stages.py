"""The contract of stages: columns, rejection, counts, random numbers; and that every stage of VESL keeps to it."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from datasets import Value
from PIL import Image

from pixclip_hf.annotation import stages
from pixclip_hf.annotation.chat import LocalChat
from pixclip_hf.annotation.passes import run_stages
from pixclip_hf.annotation.sources import ReadRecords
from pixclip_hf.annotation.vesl import VeslRegions
from pixclip_hf.annotation.vesl.captioning import CaptionColumn, ImageCaptions
from pixclip_hf.annotation.vesl.detection import OpenVocabularyDetector, SimulatedDetector
from pixclip_hf.annotation.vesl.phrases import NgramCandidates, PhraseCandidates
from pixclip_hf.images import open_image

STAGES = [
    ReadRecords("scenes:5"),
    CaptionColumn(),
    ImageCaptions(LocalChat("org/model")),
    PhraseCandidates(),
    NgramCandidates(),
    OpenVocabularyDetector("org/model"),
    SimulatedDetector(),
    VeslRegions(),
]


def batch_of(count):
    features = stages.pipeline_features([])
    batch = {name: [None] * count for name in features}
    batch["record_id"] = [f"r{i}" for i in range(count)]
    batch["regions"] = [[{"id": 1}, {"id": 2}] for _ in range(count)]
    return batch


def test_rejected_records_are_left_alone():
    batch = batch_of(3)
    stages.reject(batch, 1, "caption", "empty", "raw")
    assert stages.active_rows(batch) == [0, 2]
    assert [batch[name][1] for name in ("rejected_stage", "rejected_reason", "raw_answer")] == [
        "caption", "empty", "raw",
    ]  # fmt: skip


def test_rejected_regions_leave_their_record():
    batch = batch_of(2)
    stages.reject_region(batch, 0, 2, "check", "no", "{}")
    stages.reject_region(batch, 0, 1, "check", "never", None)
    assert batch["regions"] == [[], [{"id": 1}, {"id": 2}]]
    assert [(entry["region"]["id"], entry["rejected_reason"]) for entry in batch["rejected_regions"][0]] == [
        (2, "no"), (1, "never"),
    ]  # fmt: skip
    assert stages.active_rows(batch) == [0, 1]
    with pytest.raises(ValueError, match="`region_id` must be that of a region of 'r1', got 7"):
        stages.reject_region(batch, 1, 7, "check", "no")


def test_opened_batch_is_a_copy():
    given = {"a": (1, 2)}
    opened = stages.open_batch(given)
    opened["a"][0] = 5
    assert given["a"] == (1, 2) and opened["a"] == [5, 2]


def test_counts_and_steps_add_up():
    batch = batch_of(1)
    stages.add_counts(batch, 0, "boxes", {"kept": 2, "dropped": 0})
    stages.add_counts(batch, 0, "boxes", {"kept": 1})
    stages.add_step(batch, 0, "boxes", "org/model", "v1")
    assert batch["counts"][0] == [{"name": "boxes/kept", "count": 2}, {"name": "boxes/kept", "count": 1}]
    assert batch["steps"][0] == [{"stage": "boxes", "model": "org/model", "version": "v1"}]


def test_random_numbers_depend_on_seed_and_keys_alone():
    draws = {key: stages.row_generator(*key).integers(2**62) for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]}
    assert len(set(draws.values())) == 4
    assert stages.row_generator(0, "a").integers(2**62) == draws[0, "a"]


def test_images_are_upright():
    image = Image.fromarray(np.zeros((4, 8, 4), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    opened = open_image({"bytes": buffer.getvalue(), "path": None})
    assert opened.size == (4, 8) and opened.mode == "RGB"


def opened(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return np.asarray(open_image({"bytes": buffer.getvalue(), "path": None}))


def test_images_are_as_the_processor_reads_them():
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    expected = np.round(ramp / 257).astype(np.uint8)
    assert (opened(ramp) == expected[..., None]).all() and len(np.unique(expected)) == 12
    hidden = np.array([[[250, 20, 20, 0], [250, 20, 20, 255]]], np.uint8)
    assert opened(hidden).tolist() == [[[255, 255, 255], [250, 20, 20]]]


def test_columns_must_be_new():
    @dataclasses.dataclass
    class Bad:
        name = "bad"
        columns = {"captions": Value("string")}

    with pytest.raises(ValueError, match="Stage 'bad' adds columns that exist already: captions"):
        stages.pipeline_features([Bad()])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_stages_pickle_and_keep_batch_sizes_out_of_their_repr(stage):
    assert repr(pickle.loads(pickle.dumps(stage))) == repr(stage)
    assert repr(dataclasses.replace(stage, batch_size=stage.batch_size + 1)) == repr(stage)
    assert stages.pipeline_features([stage])


def rows_of(engine_stages, shards):
    return [row for positions in shards.values() for row in run_stages(engine_stages, positions)]


@pytest.mark.parametrize("ngrams", [False, True], ids=["phrases", "ngrams"])
def test_output_does_not_depend_on_the_batch(ngrams):
    texts = [NgramCandidates()] if ngrams else [CaptionColumn(), PhraseCandidates()]
    pipeline = [ReadRecords("scenes:9"), *texts, SimulatedDetector(), VeslRegions()]
    expected = rows_of(pipeline, {0: range(9)})
    assert sum(len(row["regions"]) for row in expected) > 9
    for size in (1, 4):
        resized = [dataclasses.replace(stage, batch_size=size) for stage in pipeline]
        assert rows_of(resized, {0: range(5), 1: range(5, 9)}) == expected
