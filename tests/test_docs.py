"""The guides: every snippet and every command in them runs, on tiny stand-ins of what they name."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tiny, build_tokenizer
from tiny_sam import save_tiny_sam
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    pipeline,
)

import pixclip_hf
from pixclip_hf import CLOCConfig, CLOCModel, CLOCProcessor, save_records
from pixclip_hf.data.sources import KINDS, load_records
from pixclip_hf.record import validate_record
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training.command import build_parser, main

ROOT = Path(__file__).parents[1]
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
# Behind each command: what makes it short, and fit for two cores.
SHORT = [
    "--max_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "--disable_tqdm",
    "True", "--logging_steps", "1", "--image_size", "32", "--dataloader_num_workers", "1", "--shuffle_buffer", "4",
]  # fmt: skip


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS[name], flags=re.S)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The working folder of a reader: the repository's examples, and the checkpoints that the guides name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    clip, llm = tmp_path / "openai/clip-vit-base-patch16", tmp_path / "any/llm"
    CLIPModel(CLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16)).save_pretrained(
        clip
    )
    dino = tmp_path / "facebook/dinov2-base"
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=112, patch_size=28)
    ).save_pretrained(dino)
    for folder in (clip, dino):
        CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=259, num_key_value_heads=2, **sizes)).save_pretrained(llm)
    for folder in (clip, llm):
        build_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block):
    """A command of a guide, in this process."""
    words = shlex.split(block.replace("\\\n", " "))
    if words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file" and Path(words[3]).is_file()
        assert words[4] == "examples/run_pretrain.py" and Path(words[4]).is_file()
        return main(words[5:] + SHORT)
    assert words[:2] == ["pixclip-hf", "train"]
    assert not words[2].endswith(".yaml") or Path(words[2]).is_file()
    return main(words[2:] + SHORT)


def write_coco(folder):
    """`photos/` and `instances.json` as COCO has them: polygons, RLEs and no captions."""
    (folder / "photos").mkdir()
    images, annotations = [], []
    for index in range(8):
        scene = make_scene(index, size=32)
        scene["image"].save(folder / "photos" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 32, "height": 32})
        for region in scene["regions"]:
            x0, y0, x1, y1 = region["box"]
            mask = region["mask"] if region["id"] % 2 else [[x0, y0, x1, y0, x1, y1, x0, y1]]
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": region["id"], "image_id": index, "category_id": 1, "bbox": box, "segmentation": mask}
            )
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return len(annotations)


def write_image_folder(folder):
    (folder / "labeled-photos").mkdir()
    lines = []
    for index in range(3):
        scene = make_scene(index, size=32)
        scene["image"].save(folder / "labeled-photos" / f"{index}.png")
        boxes, texts = zip(*[(region["box"], region["caption"]) for region in scene["regions"]], strict=True)
        row = {"file_name": f"{index}.png", "caption": scene["captions"][0], "boxes": boxes, "texts": texts}
        lines.append(json.dumps(row))
    (folder / "labeled-photos" / "metadata.jsonl").write_text("\n".join(lines))


def test_data_guide(places, monkeypatch):
    annotated = write_coco(places)
    write_image_folder(places)
    pushed = []
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    names = {"__name__": "guide"}
    for block in blocks("data", "python"):
        exec(compile(block, "data.md", "exec"), names)
    assert pushed == [(("org/regions",), {"private": True})]
    records = load_records("my-regions", "train")
    assert len(records) == len(names["records"]) == 8
    assert sum(len(record["regions"]) for record in records) == annotated
    for record in records:
        validate_record(record)
    scene = make_scene(0, size=32)
    assert records[0]["regions"][0]["box"] == pytest.approx(scene["regions"][0]["box"])
    own = names["own"]
    validate_record(own[2])
    assert own[2]["regions"][0]["caption"] == make_scene(2, size=32)["regions"][0]["caption"]
    trainers = [run(block) for block in blocks("data", "bash")]
    assert len(trainers) == 3 and all(trainer.state.global_step == 1 for trainer in trainers)
    # The tar that the guide writes is one that the stream reads.
    (places / "tars").mkdir()
    (places / "train-00000.tar").rename(places / "tars" / "train-00000.tar")
    command = blocks("data", "bash")[2].replace("my-regions", "tars").replace("runs/streamed", "runs/tars")
    trainer = run(command)
    assert trainer.state.global_step == 1 and trainer._stream.delivered == 1


def test_finetuning_guide(places):
    """On the data that it makes itself: regions with categories, and no caption anywhere."""
    write_coco(places)
    (block,) = blocks("finetune", "python")
    exec(compile(block.replace("1000", "4"), "finetune.md", "exec"), {})
    assert not any(record["captions"] for record in load_records("my-regions", "train"))
    trainers = [run(block) for block in blocks("finetune", "bash")]
    assert len(trainers) == 8 and all(trainer.state.global_step == 1 for trainer in trainers)
    frozen, lora, cloc, locked, more, *recipes = trainers
    assert not any(p.requires_grad for p in frozen.model.text_model.parameters())
    assert type(lora.model).__name__ == type(locked.model).__name__ == "PeftModel"
    assert not any(p.requires_grad for p in locked.model.vision_model.parameters())
    assert locked.model.config.vision_config.image_size == 224
    assert len({group["initial_lr"] for group in cloc.optimizer.param_groups}) > 3
    assert AutoModel.from_pretrained("runs/more").config.model_type == more.model.config.model_type == "cloc"
    assert [trainer.model.config.model_type for trainer in recipes] == ["pixclip", "cloc", "cloc"]


def test_the_finetuning_guide_takes_drawn_scenes_too(places):
    """What it offers to readers without files, in the flag of another kind of text."""
    assert 'load_records("scenes:200")' in DOCS["finetune"]
    save_records(load_records("scenes:8"), "my-regions")
    command = blocks("finetune", "bash")[4].replace("runs/cloc", str(places / "start")).replace("category", "caption")
    tiny = build_tiny(CLOCConfig, CLOCModel, CLOCProcessor)
    for part in tiny:
        part.save_pretrained(places / "start")
    assert run(command).state.global_step == 1


def test_prompts(places):
    """With a grid in the place of a detector."""
    processor = build_tiny(CLOCConfig, CLOCModel, CLOCProcessor)[1]
    for name, points in (("cloc-with-points", True), ("cloc", False)):
        config = CLOCConfig(
            vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16, prompter_points=points
        )
        for part in (CLOCModel(config), processor):
            part.save_pretrained(places / "org" / name)
    save_tiny_sam(places / "facebook" / "sam-vit-base")
    image = make_scene(0, "test", size=200)["image"]
    found = {"image": image, "pipeline": pipeline, "pixclip_hf": pixclip_hf}
    found["classify"] = pipeline("zero-shot-region-classification", model="org/cloc")
    for block in blocks("prompts", "python"):
        block = block.replace('"detector:PekingU/rtdetr_r50vd"', '"grid"')
        exec(compile(block, "prompts.md", "exec"), found)
    assert [mask.shape for mask in found["masks"]] == [(200, 200)] and found["detections"]


def test_the_guide_lists_every_kind_of_source_with_its_arguments():
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCS["data"], flags=re.M))
    for kind, source in KINDS.items():
        optional = [(item.name, item.default is not dataclasses.MISSING) for item in dataclasses.fields(source)]
        assert listed[kind] == ", ".join(f"`{name}`" + "*" * has_default for name, has_default in optional)


def test_what_the_guides_name_exists():
    text = "\n".join(DOCS.values())
    for path in re.findall(r"(?:examples|src)/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(\w+\.yaml)`", text):
        assert (ROOT / "examples" / "accelerate" / name).is_file(), name
    for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / "docs" / path).exists(), path


def test_every_argument_of_the_guides_exists():
    known = set(build_parser()._option_string_actions)
    launcher = {"--config_file", "--machine_rank"}
    guides = (DOCS["finetune"], DOCS["data"])
    named = {name for text in guides for name in re.findall(r"(?<![\w-])--\w+", text)} - launcher
    assert len(named) > 25 and named <= known, named - known


def test_claims_name_arms_of_the_ablation():
    """Each arm of a command, each claim and measure of the table."""
    from ablation import ARMS

    named = re.findall(r"\b(cloc|pixclip)/(\w+)", DOCS["claims"])
    assert named and all(arm in ARMS[family] for family, arm in named)
    claims = [
        (arm.claim, f"`{measure}`") for arms in ARMS.values() for arm in arms.values() for measure in arm.measures
    ]
    table = re.findall(r"^\| (.*?) \| (`\w+(?:@1)?`) \|", DOCS["claims"], flags=re.M)
    assert table == claims
