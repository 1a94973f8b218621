"""Datasets in the record schema: saved to disk, as Parquet shards, and what is not in the schema."""

import datasets
import pytest

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.sources import load_records
from pixclip_hf.record import record_features
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def scenes():
    return scenes_dataset(3, size=32)


def same(records, scenes):
    assert records.features == record_features()
    assert len(records) == len(scenes)
    for record, scene in zip(records, scenes, strict=True):
        assert record["image"].tobytes() == scene["image"].tobytes()
        assert {**record, "image": None} == {**scene, "image": None}


def test_saved_dataset(scenes, tmp_path):
    scenes.save_to_disk(tmp_path / "scenes")
    same(load_records(str(tmp_path / "scenes"), "train"), scenes)


def test_saved_dataset_of_another_split(scenes, tmp_path):
    scenes.save_to_disk(tmp_path / "scenes")
    with pytest.raises(ValueError, match=r"`split` must be one of \['train'\] of .*scenes', got 'test'"):
        load_records(str(tmp_path / "scenes"), "test")


def test_saved_dataset_whose_split_has_no_name(scenes, tmp_path):
    datasets.Dataset.from_dict(scenes[:], features=scenes.features).save_to_disk(tmp_path / "scenes")
    same(load_records(str(tmp_path / "scenes"), "train"), scenes)
    with pytest.raises(ValueError, match="`split`"):
        load_records(str(tmp_path / "scenes"), "validation")


def test_saved_dataset_dict(scenes, tmp_path):
    test = scenes_dataset(2, split="test", size=32)
    datasets.DatasetDict(train=scenes, test=test).save_to_disk(tmp_path / "scenes")
    same(load_records(str(tmp_path / "scenes"), "test"), test)
    with pytest.raises(ValueError, match=r"`split` must be one of \['test', 'train'\] .* got 'validation'"):
        load_records(str(tmp_path / "scenes"), "validation")


def test_parquet_shards(scenes, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        part = scenes.shard(2, shard, contiguous=True)
        part.to_parquet(folder / f"train-0000{shard}-of-00002.parquet")
    records = load_records(str(folder), "train")
    same(records, scenes)
    with pytest.raises(ValueError, match="Unknown split"):
        load_records(str(folder), "test")


def test_records_read_from_disk_train(scenes, tmp_path, tiny_pixclip):
    scenes.to_parquet(tmp_path / "shards" / "train.parquet")
    records = load_records(str(tmp_path / "shards"), "train")
    _, processor = tiny_pixclip
    collator = RegionCollator(processor, crops=True)
    found, expected = collator([records[i] for i in range(3)]), collator([make_scene(i, size=32) for i in range(3)])
    for name, values in expected.items():
        assert found[name] == values if name == "return_loss" else found[name].equal(values), name


def test_extra_columns_are_left_out(scenes, tmp_path):
    scenes.add_column("url", ["a", "b", "c"]).save_to_disk(tmp_path / "scenes")
    same(load_records(str(tmp_path / "scenes"), "train"), scenes)


def test_other_numbers_are_converted(scenes, tmp_path):
    features = scenes.features.copy()
    features["width"] = datasets.Value("int64")
    scenes.cast(features).save_to_disk(tmp_path / "scenes")
    same(load_records(str(tmp_path / "scenes"), "train"), scenes)


def test_missing_columns(scenes, tmp_path):
    scenes.remove_columns(["regions", "captions"]).save_to_disk(tmp_path / "scenes")
    with pytest.raises(
        ValueError, match="scenes' is not in the record schema: it lacks the columns captions, regions"
    ):
        load_records(str(tmp_path / "scenes"), "train")


def test_fields_that_regions_lack_are_none(scenes, tmp_path):
    regions = [[{"id": 1, "box": [0.0, 0.0, 4.0, 4.0], "caption": "a thing"}]] * 3
    scenes.remove_columns(["regions"]).add_column("regions", regions).save_to_disk(tmp_path / "scenes")
    records = load_records(str(tmp_path / "scenes"), "train")
    assert records.features == record_features()
    assert records[0]["regions"] == [dict.fromkeys(scenes[0]["regions"][0]) | regions[0][0]]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("regions", ["none", "none", "none"]),
        ("regions", [[{**make_scene(0)["regions"][0], "box": [0.0, 0.0, 1.0]}]] * 3),
        ("captions", ["one", "two", "three"]),
        ("width", ["wide", "wide", "wide"]),
    ],
)
def test_wrong_types(column, values, scenes, tmp_path):
    scenes.remove_columns([column]).add_column(column, values).save_to_disk(tmp_path / "scenes")
    with pytest.raises(ValueError, match="scenes' is not in the record schema: "):
        load_records(str(tmp_path / "scenes"), "train")
