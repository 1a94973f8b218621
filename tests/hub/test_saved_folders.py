"""A saved folder is all that loading takes: with the package installed, and where it is not."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tokenizer
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

import pixclip_hf
from pixclip_hf import hub

FEATURES, CLASSES = TASKS = ("region-feature-extraction", "zero-shot-region-classification")
KINDS = [(family, tower) for family in ("CLOC", "PixCLIP") for tower in ("clip", "siglip")]
BOXES = [[2, 3, 20, 18], [0, 0, 9, 9]]
LABELS = ["dark", "bright"]

# Loads the folder with the auto classes and both pipelines, and says what they give; then saves what it has loaded.
STRANGER = """
import json, sys
sys.modules["pixclip_hf"] = None
import torch
from transformers import AutoModel, AutoProcessor, pipeline
torch.set_num_threads(1)
jobs, image, again, result = sys.argv[1:]
outputs = {}
for name, folder in json.loads(jobs).items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if again != "-":
        model.save_pretrained(f"{again}/{name}")
        processor.save_pretrained(f"{again}/{name}")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    extract = pipeline("region-feature-extraction", model=folder, trust_remote_code=True, device="cpu")
    classify = pipeline("zero-shot-region-classification", model=folder, trust_remote_code=True, device="cpu")
    if again != "-":
        classify.save_pretrained(f"{again}/{name} from a pipeline")
    boxes, labels = BOXES, LABELS
    with torch.no_grad():
        embeds = model.get_image_features(pixels).pooler_output
    outputs[name] = {
        "modules": [type(part).__module__.split(".")[0] for part in (model, processor, extract, classify)],
        "image": embeds,
        "features": extract(image, boxes=boxes, return_tensors=True),
        "classes": classify(image, boxes=boxes, candidate_labels=labels),
    }
torch.save(outputs, result)
"""


def ask_stranger(folders, image, again, tmp_path):
    """What a process without the package makes of {name: folder}; saves what it loaded below `again`."""
    code = STRANGER.replace("BOXES", repr(BOXES)).replace("LABELS", repr(LABELS))
    result = tmp_path / "result.pt"
    jobs = json.dumps({name: str(folder) for name, folder in folders.items()})
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, jobs, str(image), str(again), str(result)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(result), process.stderr


def build(family, tower):
    torch.manual_seed(0)
    config = getattr(pixclip_hf, f"{family}Config")(
        vision_config={**VISION_CONFIG, "model_type": f"{tower}_vision_model"},
        text_config=dict(TEXT_CONFIG),
        projection_dim=16,
    )
    model = getattr(pixclip_hf, f"{family}Model")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mask_weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    image_processor = pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    return model, getattr(pixclip_hf, f"{family}Processor")(image_processor, build_tokenizer())


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (folder, model, processor), for each model and vision tower."""
    root = tmp_path_factory.mktemp("saved")
    folders = {}
    for family, tower in KINDS:
        model, processor = build(family, tower)
        folder = root / f"{family}-{tower}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # As loaded: weights mapped from a file lie at other addresses than new ones, and the last bit of a sum
        # depends on that.
        loaded = AutoModel.from_pretrained(folder)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        folders[f"{family}-{tower}"] = folder, loaded, processor
    return folders


def expected(model, processor, image):
    pixels = processor(images=str(image), return_tensors="pt")["pixel_values"]
    extract = pipeline(FEATURES, model=model, processor=processor, device="cpu")
    classify = pipeline(CLASSES, model=model, processor=processor, device="cpu")
    with torch.no_grad():
        embeds = model.get_image_features(pixels).pooler_output
    return {
        "image": embeds,
        "features": extract(str(image), boxes=BOXES, return_tensors=True),
        "classes": classify(str(image), boxes=BOXES, candidate_labels=LABELS),
    }


def assert_same(found, wanted):
    assert torch.equal(found["image"], wanted["image"])
    assert torch.equal(found["features"], wanted["features"])
    assert found["classes"] == wanted["classes"]


def test_without_the_package(saved, image, tmp_path):
    copies = {}
    for name, (folder, _, _) in saved.items():
        copies[name] = tmp_path / "copies" / name
        shutil.copytree(folder, copies[name])
    first, _ = ask_stranger(copies, image, tmp_path / "again", tmp_path)
    # Only what was saved again is left, so that it cannot lean on where it came from.
    shutil.rmtree(tmp_path / "copies")
    shutil.rmtree(tmp_path / "modules")
    again = {path.name: path for path in (tmp_path / "again").iterdir()}
    assert len(again) == 2 * len(saved)
    second, _ = ask_stranger(again, image, "-", tmp_path)
    for name, (_, model, processor) in saved.items():
        wanted = expected(model, processor, image)
        # Two regions that differ, and scores that are no tie, or equality would say little.
        assert (wanted["features"][0] - wanted["features"][1]).abs().max() > 1e-4
        for found in (first[name], second[name], second[f"{name} from a pipeline"]):
            assert found["modules"] == ["transformers_modules"] * 4
            assert_same(found, wanted)


@pytest.mark.parametrize("remote", [None, False, True])
def test_with_the_package_nobody_has_to_trust_code(saved, image, remote):
    for folder, model, processor in saved.values():
        wanted = expected(model, processor, image)
        options = {} if remote is None else {"trust_remote_code": remote}
        extract = pipeline(FEATURES, model=str(folder), device="cpu", **options)
        classify = pipeline(CLASSES, model=str(folder), device="cpu", **options)
        assert torch.equal(extract(str(image), boxes=BOXES, return_tensors=True), wanted["features"])
        assert classify(str(image), boxes=BOXES, candidate_labels=LABELS) == wanted["classes"]
        loaded = AutoModel.from_pretrained(folder, **options), AutoProcessor.from_pretrained(folder, **options)
        for part in (*loaded, extract, classify, extract.model, extract.processor):
            assert type(part).__module__.startswith("pixclip_hf.")


def test_what_is_in_the_folder(saved):
    for folder, model, _ in saved.values():
        written = json.loads((folder / "config.json").read_text())
        tasks = {task: info["impl"].split(".") for task, info in written["custom_pipelines"].items()}
        assert set(tasks) == set(TASKS)
        for module, name in tasks.values():
            assert f"class {name}(" in (folder / f"{module}.py").read_text()
        # The live configuration does not carry what only the file needs.
        assert not hasattr(model.config, "custom_pipelines")
        assert not hasattr(AutoConfig.from_pretrained(folder), "custom_pipelines")
        assert AutoConfig.from_pretrained(folder).to_dict().keys() == model.config.to_dict().keys()


def test_lost_pipeline_code_is_said_and_left_out(saved, image, tmp_path):
    folder, _, _ = saved["CLOC-clip"]
    shutil.copytree(folder, tmp_path / "whole")
    for path in ("region_feature_extraction.py", "zero_shot_region_classification.py"):
        (tmp_path / "whole" / path).unlink()
    code = (
        "import sys; sys.modules['pixclip_hf'] = None\n"
        "from transformers import AutoModel\n"
        "AutoModel.from_pretrained('whole', trust_remote_code=True).save_pretrained('again')\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert "region-feature-extraction" in process.stderr and "is not saved" in process.stderr
    assert not json.loads((tmp_path / "again" / "config.json").read_text()).get("custom_pipelines")


def test_large_weights_are_sharded(tmp_path):
    model, processor = build("CLOC", "clip")
    folder = hub.write_folder(model, processor, tmp_path / "out", "org/cloc", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    state = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
