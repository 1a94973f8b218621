"""A saved folder is all that loading takes: with the package installed, and where it is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tokenizer
from PIL import Image
from processes import running_process
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

import pixclip_hf
from pixclip_hf import Eva02VisionConfig, Eva02VisionModel
from pixclip_hf.hub import write_folder
from pixclip_hf.training.command import main

PACKAGE = Path(pixclip_hf.__file__).parent
TRAVELING = ("modeling", "processing", "pipelines")
FEATURES, CLASSES = TASKS = ("region-feature-extraction", "zero-shot-region-classification")
GROUNDING, DETECTION = "region-grounding", "zero-shot-region-detection"
BOXES = [[2, 3, 20, 18], [0, 0, 9, 9]]
LABELS = ["dark", "bright"]

# What a folder gives through the auto classes and both pipelines; what was loaded is saved again.
LOAD = f"""
import torch
from transformers import AutoModel, AutoProcessor, pipeline
torch.set_num_threads(1)

def outputs(folder, again=None, **options):
    model, processor = (auto.from_pretrained(folder, **options) for auto in (AutoModel, AutoProcessor))
    pipelines = [pipeline(task, model=str(folder), device="cpu", **options) for task in {TASKS}]
    if again is not None:
        for part in (model, processor):
            part.save_pretrained(f"{{again}} again")
        if again.name == "CLOC siglip":
            pipelines[1].save_pretrained(f"{{again}} from a pipeline")
    pixels = processor(images="image.png", return_tensors="pt")["pixel_values"]
    texts = {{}} if model.text_model is not None else {{"text_states": torch.eye(2, 24)}}
    with torch.no_grad():
        embeds = model.get_image_features(pixels).pooler_output
    found = {{}}
    if not texts:
        detect = pipeline("{DETECTION}", model=str(folder), device="cpu", **options)
        pipelines.append(detect)
        found["detections"] = detect("image.png", boxes={BOXES}, candidate_labels={LABELS}, threshold=0)
    if model.config.model_type == "cloc":
        pipelines.append(pipeline("{GROUNDING}", model=str(folder), device="cpu", **options))
        found["grounded"] = pipelines[-1]("image.png", candidate_labels={LABELS}, threshold=-1)
    parts = (model, processor, *pipelines, pipelines[0].model, pipelines[0].processor)
    return {{
        **found,
        "modules": {{type(part).__module__.split(".")[0] for part in parts}},
        "image": embeds,
        "features": pipelines[0]("image.png", boxes={BOXES}, return_tensors=True),
        "classes": pipelines[1]("image.png", boxes={BOXES}, candidate_labels={LABELS}, **texts),
    }}
"""


def build(family, tower, text=True):
    torch.manual_seed(0)
    config = getattr(pixclip_hf, f"{family}Config")(
        vision_config={**VISION_CONFIG, "model_type": f"{tower}_vision_model"},
        text_config=dict(TEXT_CONFIG) if text else None,
        text_hidden_size=None if text else 24,
        projection_dim=16,
    )
    model = getattr(pixclip_hf, f"{family}Model")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mask_weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    image_processor = pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    tokenizer = build_tokenizer() if text else None
    return model, getattr(pixclip_hf, f"{family}Processor")(image_processor, tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an image, below `weights` a folder for each model and vision tower, and below `saved` some of them
    and those of other ways to save."""
    place = tmp_path_factory.mktemp("place")
    Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(place / "image.png")
    for family in ("CLOC", "PixCLIP"):
        for tower in ("clip", "siglip"):
            for part in build(family, tower):
                part.save_pretrained(place / "weights" / f"{family} {tower}")
    for name in ("CLOC clip", "CLOC siglip", "PixCLIP clip"):
        shutil.copytree(place / "weights" / name, place / "saved" / name)
    for part in build("PixCLIP", "clip", text=False):
        part.save_pretrained(place / "saved" / "without text")
    write_folder(*build("CLOC", "clip"), place / "saved" / "sharded", "org/name", max_shard_size="20KB")
    main([
        "--model_type", "pixclip", "--output_dir", str(place / "saved" / "run"), "--max_steps", "1",
        "--save_steps", "1", "--per_device_train_batch_size", "2", "--scenes_train_images", "4",
        "--scenes_eval_images", "2", "--image_size", "32", "--report_to", "none", "--use_cpu",
    ])  # fmt: skip
    (place / "saved" / "run" / "checkpoint-1").rename(place / "saved" / "checkpoint-1")
    return place


@pytest.fixture(scope="module")
def here(place):
    """What the folders give in this process: name -> outputs. Bit for bit against the model as loaded: weights mapped
    from a file lie at other addresses than new ones, and the last bit of a sum depends on that."""
    names = {}
    exec(LOAD, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return {folder.name: names["outputs"](folder) for folder in sorted((place / "saved").iterdir())}


def assert_same(found, wanted):
    assert torch.equal(found["image"], wanted["image"])
    assert torch.equal(found["features"], wanted["features"])
    assert found["classes"] == wanted["classes"]
    for name in ("detections", "grounded"):
        assert found.get(name) == wanted.get(name)


def test_weights_come_back(place):
    for family in ("CLOC", "PixCLIP"):
        for tower in ("clip", "siglip"):
            state = build(family, tower)[0].state_dict()
            loaded = AutoModel.from_pretrained(place / "weights" / f"{family} {tower}").state_dict()
            assert state.keys() == loaded.keys()
            assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    folder = place / "saved" / "sharded"
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A folder, and a process in it that lacks the package."""
    folder = tmp_path_factory.mktemp("stranger")
    with running_process(folder, package=False, HF_HUB_OFFLINE="1") as process:
        yield folder, process


def test_without_the_package(place, here, stranger):
    assert len(here) == 7
    tmp_path, process = stranger
    # Copies, so that nothing can lean on where it came from when only what was saved again is left.
    shutil.copytree(place / "saved", tmp_path / "copies")
    shutil.copyfile(place / "image.png", tmp_path / "image.png")
    found = {}
    code = """
import pathlib
torch.save({
    folder.name: outputs(folder, AGAIN and pathlib.Path(AGAIN, folder.name), trust_remote_code=True)
    for folder in sorted(pathlib.Path(FOLDER).iterdir())
}, "outputs.pt")
"""
    process.run(LOAD + code.replace("FOLDER", "'copies'").replace("AGAIN", "'again'"))
    found |= torch.load(tmp_path / "outputs.pt")
    # A repository whose pipeline code is gone keeps its model, and says so.
    broken = tmp_path / "copies" / "CLOC clip"
    for path in ("region_feature_extraction.py", "zero_shot_region_classification.py"):
        (broken / path).unlink()
    lost = "AutoModel.from_pretrained('{}', trust_remote_code=True).save_pretrained('lost')"
    printed = process.run(lost.format(broken.rename(tmp_path / "broken")))
    assert FEATURES in printed and "is not saved" in printed
    assert not json.loads((tmp_path / "lost" / "config.json").read_text()).get("custom_pipelines")

    shutil.rmtree(tmp_path / "copies")
    other_home = str(tmp_path / "other-home")
    with running_process(tmp_path, package=False, HF_HUB_OFFLINE="1", HF_HOME=other_home) as another:
        another.run(LOAD + code.replace("FOLDER", "'again'").replace("AGAIN", "None"))
    found |= torch.load(tmp_path / "outputs.pt")
    for name, wanted in here.items():
        # Two regions that differ, and scores that are no tie, or equality would say little.
        assert (wanted["features"][0] - wanted["features"][1]).abs().max() > 1e-4
        for way in (name, f"{name} again"):
            assert found[way]["modules"] == {"transformers_modules"}, way
            # Saved again, shards become one file, as the same weights have in another folder.
            assert_same(found[way], here["CLOC clip"] if way == "sharded again" else wanted)
    assert_same(found["CLOC siglip from a pipeline"], here["CLOC siglip"])


def tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = Eva02VisionModel(Eva02VisionConfig(image_size=32, patch_size=8, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_our_own_tower_without_the_package(stranger):
    folder, process = stranger
    shared = {"text_config": None, "text_hidden_size": 24, "projection_dim": 16}
    shared["vision_config"] = tower().config.to_dict()
    models = {
        "eva cloc": pixclip_hf.CLOCModel(pixclip_hf.CLOCConfig(**shared)).eval(),
        "eva pixclip": pixclip_hf.PixCLIPModel(pixclip_hf.PixCLIPConfig(**shared, visual_projection_bias=True)).eval(),
        "eva": tower(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    names = [*models, *(f"{name} again" for name in models)]
    process.run(f"""
import torch
from transformers import AutoModel

states = {{}}
for name in {names}:
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(f"{{name}} again")
    with torch.no_grad():
        states[name] = getattr(model, "get_image_features", model)(torch.ones(1, 3, 32, 32)).pooler_output
torch.save(states, "eva.pt")
""")
    states = torch.load(folder / "eva.pt")
    for name, model in models.items():
        expected = getattr(model, "get_image_features", model)(torch.ones(1, 3, 32, 32)).pooler_output
        torch.testing.assert_close(states[name], expected)
        assert torch.equal(states[f"{name} again"], states[name])


@pytest.mark.parametrize("remote", [False, True])
def test_with_the_package_nobody_has_to_trust_code(place, here, remote, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(LOAD, names)
    assert all(wanted["modules"] == {"pixclip_hf"} for wanted in here.values())
    for name in ("CLOC clip", "PixCLIP clip", "checkpoint-1"):
        wanted = here[name]
        found = names["outputs"](place / "saved" / name, trust_remote_code=remote)
        assert found["modules"] == {"pixclip_hf"}
        assert_same(found, wanted)


def test_what_is_in_the_folder(place):
    for folder in (place / "saved").iterdir():
        # No code but what tests/hub/test_traveling_files.py reads.
        traveling = {path.name for part in TRAVELING for path in (PACKAGE / part).iterdir()}
        assert {file.name for file in folder.glob("*.py")} <= traveling
        written = json.loads((folder / "config.json").read_text())
        tasks = {task: info["impl"].split(".") for task, info in written["custom_pipelines"].items()}
        assert set(tasks) == {*TASKS, GROUNDING, DETECTION}
        for module, name in tasks.values():
            assert f"class {name}(" in (folder / f"{module}.py").read_text()
        # The live configuration does not carry what only the file needs.
        config = AutoConfig.from_pretrained(folder)
        assert not hasattr(config, "custom_pipelines") and "custom_pipelines" not in config.to_dict()
    assert (place / "saved" / "sharded" / "README.md").is_file() and (place / "saved" / "run" / "README.md").is_file()
    model, processor = build("CLOC", "clip")
    pipeline(FEATURES, model=model, processor=processor, device="cpu").save_pretrained(place / "pipe")
    assert "custom_pipelines" not in model.config.to_dict()
    assert type(AutoProcessor.from_pretrained(place / "pipe")) is type(processor)
