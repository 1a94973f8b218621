"""Embedding a collection: what is in the folder, whatever the regions come from and whoever is killed on the way."""

import errno
import io
import json
import multiprocessing
import os
import random
import signal
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset
from filelock import FileLock
from huggingface_hub import DatasetCard
from PIL import Image
from stand_ins import tiny_naflex
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from pixclip_hf import cli, hub
from pixclip_hf.data import whole_files
from pixclip_hf.data.sources import load_records, open_source
from pixclip_hf.embedding import command
from pixclip_hf.embedding import regions as region_sources
from pixclip_hf.embedding.encoder_choice import EncoderChoice
from pixclip_hf.embedding.folder import SETTINGS, EmbeddingFolder, embedding_counts, embedding_features
from pixclip_hf.embedding.reading import reduced_regions
from pixclip_hf.embedding.regions import Grid
from pixclip_hf.embedding.run import embed
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.view_encoder import ViewEncoder
from pixclip_hf.images import open_image
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset

SOURCE, NUMBER, SHARD = "scenes:9", 9, 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def cloc(tmp_path, tiny_cloc):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "cloc")
    return str(tmp_path / "cloc")


@pytest.fixture
def pixclip(tmp_path, tiny_pixclip):
    for part in tiny_pixclip:
        part.save_pretrained(tmp_path / "pixclip")
    return str(tmp_path / "pixclip")


@pytest.fixture
def photos(tmp_path):
    """Three photographs, one of them turned by EXIF, one that cannot be read, and a text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    make_scene(0, size=48)["image"].save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    make_scene(1, size=48)["image"].resize((64, 48)).save(folder / "more/b.jpg", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 30 * 20).astype(np.uint16).reshape(20, 30)).save(folder / "c.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(model, output, source=SOURCE, **options):
    options = {"shard_size": SHARD, "batch_size": 3, "progress": False, **options}
    return embed(source, EncoderChoice(model), output, **options)


def rows_of(folder):
    return load_dataset("parquet", data_files=str(folder.path / "data/*.parquet"), split="train").with_format("numpy")


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_rows(cloc, tiny_cloc, tmp_path):
    folder = run(cloc, tmp_path / "run", kinds=("text", "region", "image"))
    rows = rows_of(folder)
    assert rows.features == folder.features == embedding_features(16)
    records, encoder = load_records(SOURCE), RegionEncoder(*tiny_cloc)
    assert len(set(rows["id"])) == len(rows) == len({row["id"] for row in rows.with_format(None)})
    expected = np.concatenate(encoder.encode_records([records[i] for i in range(NUMBER)]))
    regions = [region for record in records for region in record["regions"]]
    found = rows.filter(lambda kind: kind == "region", input_columns="kind")
    assert found["embedding"][:] == pytest.approx(expected, abs=1e-3) and len(expected) > 9
    assert found["box"][:] == pytest.approx(np.array([region["box"] for region in regions]))
    areas = [decode_rle(region["mask"]).sum() for region in regions]
    assert found["mask_area"][:].tolist() == areas and list(found["text"]) == [region["caption"] for region in regions]
    assert [name.split("#")[1] for name in found["id"]] == [str(region["id"]) for region in regions]
    images = rows.filter(lambda kind: kind == "image", input_columns="kind").sort("position")
    whole = encoder.encode_images([record["image"] for record in records])
    assert images["embedding"][:] == pytest.approx(whole, abs=1e-3)
    assert images["position"][:].tolist() == list(range(NUMBER)) and list(images["id"]) == list(images["image_id"])
    texts = rows.filter(lambda kind: kind == "text", input_columns="kind")
    assert list(texts["text"]) == [text for record in records for text in record["captions"]]
    assert texts["embedding"][:] == pytest.approx(encoder.encode_texts(list(texts["text"])), abs=1e-3)
    assert open_source(SOURCE).read(int(found["position"][-1])).name == found["image_id"][-1]


def test_settings_and_counts(cloc, tmp_path):
    folder = run(cloc, tmp_path / "run")
    settings = EmbeddingFolder.open(folder.path).settings
    assert settings["model"] == cloc and settings["width"] == 16 and settings["dtype"] == "float16"
    assert settings["revision"] is None and len(settings["weights"]) == len(settings["preprocessing"]) == 32
    assert settings["kinds"] == ["region", "image"] and settings["prompt"] == "box" and settings["source"] == SOURCE
    assert settings["regions"] == "Annotations()" and settings["precision"] == "float32"
    assert [path.name for path in folder.shards()] == [f"train-{i:05d}.parquet" for i in range(3)]
    counts = embedding_counts(folder.path)
    assert counts == {"shards": 3, "items": 9, "images": 9, "regions": len(rows_of(folder)) - 9}


def run_until_killed(model, output, replacement, before):
    """A run that dies by SIGKILL at its n-th atomic write, just before or just after it."""
    replace, written = os.replace, 0

    def dying(source, target):
        nonlocal written
        written += 1
        if written == replacement and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if written == replacement:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    run(model, output)


def test_killed_at_every_kind_of_write(cloc, tmp_path):
    whole = files(run(cloc, tmp_path / "whole").path)
    draws, deaths = random.Random(0), Counter()
    for _ in range(30):
        arguments = (cloc, tmp_path / "run", draws.randint(1, 2), draws.random() < 0.5)
        process = multiprocessing.get_context("fork").Process(target=run_until_killed, args=arguments)
        process.start()
        process.join()
        deaths[process.exitcode] += 1
        if process.exitcode == 0:
            break
    assert deaths[-signal.SIGKILL] >= 3 and deaths[0] == 1 and len(deaths) == 2, deaths
    assert files(tmp_path / "run") == whole


@pytest.mark.parametrize("full_at", ["rows", "manifest"])
def test_a_full_disk_loses_nothing(cloc, tmp_path, monkeypatch, full_at):
    """At the second shard, behind the first bytes of a file."""
    whole = files(run(cloc, tmp_path / "whole").path)
    name = {"rows": "train-00001.parquet", "manifest": "00001.json"}[full_at]
    sync = whole_files._sync

    def full(path, flags):
        if path.name.startswith(f".{name}."):
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "_sync", full)
        with pytest.raises(OSError, match="No space left for `output` .* make room and start the run again") as error:
            run(cloc, tmp_path / "run")
    assert error.value.errno == errno.ENOSPC
    left = files(tmp_path / "run")
    assert name not in {path.rpartition("/")[2] for path in left} and "shards/00000.json" in left
    assert all(content == whole[path] for path, content in left.items())
    assert files(run(cloc, tmp_path / "run").path) == whole


def test_readers_change_nothing(cloc, tmp_path):
    assert files(run(cloc, tmp_path / "two", readers=2).path) == files(run(cloc, tmp_path / "none").path)


def test_unreadable_images_are_counted(cloc, photos, tmp_path, tiny_cloc):
    folder = run(cloc, tmp_path / "run", ["images", f"folder={photos}"], regions=Grid((1, 2)))
    rows, counts = rows_of(folder), embedding_counts(folder.path)
    assert counts["image left out: not readable"] == 1 and counts["images"] == 3 and counts["items"] == 4
    assert set(rows["image_id"]) == {"a.png", "c.png", "more/b.jpg"}
    turned = rows.filter(lambda name: name == "more/b.jpg", input_columns="image_id").with_format(None)
    assert (turned[0]["width"], turned[0]["height"]) == (48, 64)  # upright
    assert turned["image_path"][0] == "more/b.jpg"
    expected = [[0, 0, 48, 64], *([x, y, x + 32, y + 128 / 3] for y in (0, 64 / 3) for x in (0, 16))]
    assert np.array(turned["box"][:5]) == pytest.approx(np.array(expected), abs=1e-4)
    data = (photos / "more/b.jpg").read_bytes()
    upright = RegionEncoder(*tiny_cloc).encode_images(open_image({"bytes": data}))
    assert np.array(turned["embedding"][-1]) == pytest.approx(upright, abs=1e-3)


def test_images_without_regions(cloc, photos, tmp_path):
    source = ["images", f"folder={photos}"]
    folder = run(cloc, tmp_path / "run", source)
    assert set(rows_of(folder)["kind"]) == {"image"}
    assert embedding_counts(folder.path)["images without regions"] == 3
    with pytest.raises(ValueError, match="Nothing of 'images folder=.*' could be embedded .4 items.* not readable: 1"):
        run(cloc, tmp_path / "regions", source, kinds=["region"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        run(cloc, tmp_path / "nothing", ["images", f"folder={tmp_path / 'empty'}"])


def test_regions_that_the_processor_refuses(tmp_path, tiny_cloc):
    model, processor = tiny_cloc
    processor.image_processor.size = {"shortest_edge": 32}
    processor.image_processor.do_center_crop, processor.image_processor.crop_size = True, {"height": 32, "width": 32}
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    wide = scenes_dataset(2, size=48)

    def at_the_edge(record):
        image = Image.new("RGB", (96, 48))
        region = {**record["regions"][0], "box": [0.0, 0.0, 10.0, 10.0], "mask": None}
        return {"image": image, "width": 96, "regions": [region]}

    datasets.concatenate_datasets([wide, wide.map(at_the_edge, features=wide.features)]).to_parquet(
        tmp_path / "records/train.parquet"
    )
    folder = run(str(tmp_path / "model"), tmp_path / "run", str(tmp_path / "records"))
    counts = embedding_counts(folder.path)
    assert counts["image left out: refused by the processor"] == 2 and counts["images"] == 2


def test_a_detector(cloc, photos, tmp_path, monkeypatch):
    hit = {"box": {"xmin": 4, "ymin": -6, "xmax": 20, "ymax": 30}, "label": "star", "score": 0.9}
    given = []

    def detect(image, threshold):
        given.append((image.size, threshold))
        return [hit] if len(given) == 1 else []

    monkeypatch.setattr(region_sources.DetectorProposer, "_pipeline", property(lambda proposer: detect))
    source = ["--source", "images", f"folder={photos}", "--model", cloc, "--output", str(tmp_path / "run")]
    folder = command.main([*source, "--detector", "any/detr", "--kinds", "region", "--batch_size", "2"])
    assert given == [((48, 48), 0.3), ((30, 20), 0.3), ((48, 64), 0.3)]
    (row,) = rows_of(folder).with_format(None).remove_columns("embedding")
    assert row == {
        "id": "a.png#0", "image_id": "a.png", "kind": "region", "box": [4, 0, 20, 30], "mask_area": None,
        "category": "star", "text": "star", "score": pytest.approx(0.9), "image_path": "a.png", "position": 0,
        "width": 48, "height": 48,
    }  # fmt: skip
    assert folder.settings["regions"] == "DetectorProposer(model='any/detr', threshold=0.3)"
    assert not (tmp_path / "run/between").exists()


def test_masks_prompt_a_pixclip(pixclip, tiny_pixclip, tmp_path):
    rows = rows_of(run(pixclip, tmp_path / "run"))
    records = load_records(SOURCE)
    expected = np.concatenate(RegionEncoder(*tiny_pixclip).encode_records([records[i] for i in range(NUMBER)]))
    found = rows.filter(lambda kind: kind == "region", input_columns="kind")
    assert found["embedding"][:] == pytest.approx(expected, abs=1e-3)


def test_a_clip_shows_regions(tmp_path, tiny_cloc):
    config = CLIPConfig(
        text_config={**tiny_cloc[0].config.text_config.to_dict(), "projection_dim": 16},
        vision_config={**tiny_cloc[0].config.vision_config.to_dict(), "projection_dim": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tiny_cloc[1].tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    folder = run(str(tmp_path / "clip"), tmp_path / "run")
    records, encoder = load_records(SOURCE), ViewEncoder(model, processor)
    expected = np.concatenate(encoder.encode_records([records[i] for i in range(NUMBER)]))
    rows = rows_of(folder)
    found = rows.filter(lambda kind: kind == "region", input_columns="kind")
    assert found["embedding"][:] == pytest.approx(expected, abs=1e-3) and folder.settings["view"] == "crop"
    images = rows.filter(lambda kind: kind == "image", input_columns="kind")
    expected = encoder.encode_images([record["image"] for record in records])
    assert images["embedding"][:] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="`reduced` must be False with a view of regions, .* got 'crop'"):
        run(str(tmp_path / "clip"), tmp_path / "reduced", reduced=True)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def test_large_photographs_at_a_reduced_scale(pixclip, tmp_path):
    scene = make_scene(3, size=64)
    large = scene["image"].resize((1200, 900), Image.Resampling.BICUBIC)
    decoded = open_image({"bytes": jpeg(large)}, at_least=64)
    assert decoded.size == (150, 113) and open_image({"bytes": jpeg(large)}, at_least=1000).size == (1200, 900)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image({"bytes": jpeg(large, exif=exif)}, at_least=64).size == (113, 150)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(jpeg(large, quality=95))
    source = ["images", f"folder={tmp_path / 'photos'}"]
    full, reduced = (
        run(pixclip, tmp_path / f"{how}", source, regions=Grid((1, 2)), reduced=how) for how in (False, True)
    )
    assert reduced.settings["decoded_sides"] == 64 and full.settings["decoded_sides"] is None
    one, other = (rows_of(folder) for folder in (full, reduced))
    a, b = (rows["embedding"][:].astype(np.float32) for rows in (one, other))
    assert (a * b).sum(-1).min() > 0.995 and (a != b).any()
    columns = [name for name in one.column_names if name != "embedding"]
    assert one.select_columns(columns).with_format(None)[:] == other.select_columns(columns).with_format(None)[:]


def test_reduced_images_that_keep_their_aspect(tmp_path):
    """Of a SigLIP 2 of variable resolution: both sides are at least twice those of a square of as many patches."""
    for part in tiny_naflex():
        part.save_pretrained(tmp_path / "naflex")
    (tmp_path / "photos").mkdir()
    photo = make_scene(3, size=64)["image"].resize((1200, 300), Image.Resampling.BICUBIC)
    (tmp_path / "photos/a.jpg").write_bytes(jpeg(photo, quality=95))
    source = ["images", f"folder={tmp_path / 'photos'}"]
    options = {"kinds": ("image",)}
    full, reduced = (
        run(str(tmp_path / "naflex"), tmp_path / f"{how}", source, reduced=how, **options) for how in (False, True)
    )
    assert reduced.settings["decoded_sides"] == 2 * 4 * 8
    a, b = (rows_of(folder)["embedding"][:].astype(np.float32) for folder in (full, reduced))
    assert len(a) == 1 and (a * b).sum(-1).min() > 0.99


def test_regions_of_a_reduced_image():
    mask = np.zeros((90, 120), bool)
    mask[30:60, 40:80] = True
    dot = np.zeros((90, 120), bool)
    dot[7, 9] = True
    regions = [
        {"id": 0, "box": [40.0, 30.0, 80.0, 60.0], "mask": encode_rle(mask)},
        {"id": 1, "box": [9.0, 7.0, 10.0, 8.0], "mask": encode_rle(dot)},
        {"id": 2, "box": [0.0, 0.0, 120.0, 90.0], "mask": None},
    ]
    found = reduced_regions(regions, (120, 90), (40, 30))
    assert np.array(found[0]["box"]) == pytest.approx([40 / 3, 10, 80 / 3, 20]) and found[2]["mask"] is None
    small = decode_rle(found[0]["mask"])
    assert small.shape == (30, 40) and small[10:20, 14:26].all() and small.sum() <= 10 * 14
    assert decode_rle(found[1]["mask"]).sum() == 1  # a region never vanishes


def test_bad_input(cloc, tmp_path):
    for options, message in (
        ({"kinds": ("region", "pixel")}, "`kinds` must be some of region, image, text, got region, pixel"),
        ({"kinds": ()}, "`kinds` must be some of .* got none"),
        ({"dtype": "int8"}, "`dtype` must be one of float16, float32, got 'int8'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"readers": -1}, "`readers` must be at least 0, got -1"),
        ({"engine": "spark"}, "`engine` must be one of local, ray, got 'spark'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(cloc, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"`grid` must hold numbers from 1 on, got \[1, 0\]"):
        Grid((1, 0))
    assert not (tmp_path / "run").exists()
    folder = run(cloc, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run with other settings: its dtype is float16, now float32"):
        run(cloc, tmp_path / "run", dtype="float32")
    with FileLock(folder.path / ".lock"), pytest.raises(ValueError, match="being written to by another process"):
        run(cloc, tmp_path / "run")
    settings = {**folder.settings, "format_version": 2, "package_version": "9.0"}
    (folder.path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="format 2, written by pixclip-hf 9.0; this version reads formats up to 1"):
        run(cloc, tmp_path / "run")
    with pytest.raises(ValueError, match="must be a folder of `pixclip-hf embed`, and has no embeddings.json"):
        EmbeddingFolder.open(tmp_path)


def test_the_command_and_its_card(cloc, tmp_path, monkeypatch, capsys):
    arguments = ["embed", "--source", SOURCE, "--model", cloc, "--output", str(tmp_path / "run"), "--shard_size", "4"]
    assert cli.main(arguments) == 0
    assert "images" in (printed := capsys.readouterr().out) and "written: " in printed
    card = DatasetCard.load(tmp_path / "run/README.md")
    assert "of the regions and images of a collection" in card.text and "16 numbers in float16" in card.text
    assert f"| source | {SOURCE} |" in card.text and "| preprocessing | " in card.text and "None" not in card.text
    embeddings = load_dataset(str(tmp_path / "run"), split="train")
    assert embeddings.features == embedding_features(16) and f"| train | {len(embeddings)} | 3 |" in card.text
    pushed = {}
    monkeypatch.setattr(hub, "_push", lambda files, *others: pushed.update(files))
    assert cli.main([*arguments, "--push_to_hub", "org/name", "--license", "mit"]) == 0
    assert list(pushed) == ["README.md", *(f"data/train-{i:05d}.parquet" for i in range(3)), SETTINGS, hub.PUSHED]


def test_no_path_of_this_machine_is_published(tmp_path, monkeypatch):
    content = {
        "model": str(tmp_path / "models/mine"),
        "source": ["coco", "annotations=/home/me/a b/i.json", "images=C:\\me\\val2017", "captions=c.json"],
        "regions": "Detector(model='/home/me/detector', batch_size=8, name='org/name')",
        "width": 16,
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps(content))
    (folder / "README.md").touch()
    monkeypatch.setattr(hub, "write_dataset_card", lambda folder, *others, **options: folder / "README.md")
    pushed = {}
    monkeypatch.setattr(hub, "_push", lambda files, *others: pushed.update(files))
    hub.publish_dataset(folder, "org/name", "embeddings")
    assert json.loads(pushed[SETTINGS]) == {
        "model": "mine",
        "source": ["coco", "annotations=i.json", "images=val2017", "captions=c.json"],
        "regions": "Detector(model='detector', batch_size=8, name='org/name')",
        "width": 16,
    }
    assert json.loads((folder / SETTINGS).read_text()) == content  # what this machine goes on with


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "must have finite weights"), (1e30, "The embedding of the")]
)
def test_what_is_no_number_is_not_kept(value, message, tiny_cloc, tmp_path):
    """Weights that are none, and those whose sums are none."""
    with torch.no_grad():
        for parameter in tiny_cloc[0].parameters():
            parameter.fill_(value)
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        embed("scenes:2", EncoderChoice(str(tmp_path / "model")), tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("data/*.parquet"))
