"""The example for real checkpoints runs on tiny ones, on the reference files, and says what it did not run."""

import json
from pathlib import Path

import pytest
import real_weights
import torch
from conftest import build_tokenizer
from PIL import Image
from stand_ins import tiny_naflex
from transformers import AutoModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"hidden_size": 32, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A CLIP, a SigLIP 2 of variable resolution, a DINOv2 and a folder laid out as COCO."""
    root = tmp_path_factory.mktemp("real")
    texts = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 259, "eos_token_id": 258, "bos_token_id": 1}
    vision = {**IMAGES, "intermediate_size": 48, **SIZES}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**texts, **SIZES}, projection_dim=16))
    clip.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        root / "clip"
    )
    build_tokenizer().save_pretrained(root / "clip")
    Dinov2Model(Dinov2Config(**IMAGES, **SIZES)).save_pretrained(root / "dino")
    for part in tiny_naflex():
        part.save_pretrained(root / "naflex")
    ring = [4.0, 4.0, 20.0, 4.0, 20.0, 20.0]
    annotations = [
        {"id": 1, "image_id": 7, "bbox": [4, 4, 16, 16], "category_id": 3, "segmentation": [ring], "iscrowd": 0},
        {"id": 2, "image_id": 7, "bbox": [30, 10, 20, 30], "category_id": 5, "iscrowd": 0},
    ]
    content = {
        "images": [{"id": 7, "width": 64, "height": 48, "file_name": "7.jpg"}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "bow_(ribbon)"}],
    }
    (root / "coco/annotations").mkdir(parents=True)
    (root / "coco/val2017").mkdir()
    (root / "coco/annotations/instances_val2017.json").write_text(json.dumps(content))
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(root / "coco/val2017/7.jpg")
    return root


def test_towers_and_regions(places, tiny_pixclip, tmp_path, monkeypatch, capsys):
    for part in tiny_pixclip:
        part.save_pretrained(places / "pixclip")
    width = tiny_pixclip[0].config.vision_config.hidden_size
    monkeypatch.setattr(real_weights, "PUBLISHED", {"clip": {32: 12.3}, "pixclip": {width: 45.6}})
    clip, naflex, dino, pixclip = (str(places / name) for name in ("clip", "naflex", "dino", "pixclip"))
    arguments = ["--towers", clip, naflex, dino, "--models", pixclip, "--coco", str(places / "coco")]
    real_weights.main([*arguments, "--output_dir", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    for name in (clip, naflex, dino):
        assert f"step 0, {name}: equal bit for bit" in shown
    lines = [line for line in shown.splitlines() if ", " in line and "regions: accuracy" in line]
    found = [(line.split(", ")[0], line.split(", ")[1], line.split("published: ")[1]) for line in lines]
    assert found == [
        (clip, "context-masks", "12.3 (class mean)"),
        (naflex, "context-masks", "none"),
        (pixclip, "pixclip-coco", "45.6 (class mean)"),
        (pixclip, "pixclip-coco-official", "45.6 (class mean)"),
        (pixclip, "context-masks", "none"),
    ]
    assert all(", 2 regions: accuracy " in line and "class_mean_accuracy" in line for line in lines)
    missing = shown[shown.index("not run:") :]
    for said in (f"{dino}: it has no text tower", "alpha-clip: no file", "pixclip: no file"):
        assert said in missing


def test_a_tower_that_differs_is_said(places, tmp_path, monkeypatch, capsys):
    real = AutoModel.from_pretrained

    def changed(*args, **kwargs):
        model = real(*args, **kwargs)
        with torch.no_grad():
            model.vision_model.post_layernorm.bias += 1
        return model

    monkeypatch.setattr(real_weights.AutoModel, "from_pretrained", changed)
    real_weights.main(["--towers", str(places / "clip"), "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"step 0, {places / 'clip'}: differs by up to" in shown and "classification: no --coco" in shown


def test_published_files(places, tmp_path, capsys):
    if not FIXTURES.is_dir():
        pytest.skip(f"{FIXTURES} is absent: the reference files")
    files = {name: str(FIXTURES / f"{folder}_tiny" / "checkpoint.safetensors")
             for name, folder in (("alpha_clip", "alpha_clip"), ("pixclip", "official_pixclip"))}  # fmt: skip
    arguments = ["--alpha_clip", files["alpha_clip"], "--pixclip", files["pixclip"], "--coco", str(places / "coco")]
    real_weights.main([*arguments, "--output_dir", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    for kind in ("alpha-clip", "pixclip"):
        assert f"{kind}, {files[kind.replace('-', '_')]}: " in shown and (tmp_path / kind / "config.json").is_file()
        assert f"classification by {kind}: no tokenizer or language model was given" in shown
