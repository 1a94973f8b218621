"""Every tower that the documentation lists: step 0 equals upstream, export, int8, LoRA."""

import pytest
import torch
from builders import MODELS, VISION_MODELS, build_texts
from towers import COVERED, DOCS, REFUSED, SIGLIP_TEXT, SIGLIP_VISION, TEXT, build, documented, table
from transformers import AutoModel

from pixclip_hf.export import TextHalf, export_image_half, export_text_half
from pixclip_hf.training import add_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders("vision", "DINOv2")`: folder of a tiny model of transformers."""
    root = tmp_path_factory.mktemp("towers")

    def folder(side, name):
        path = root / f"{side}-{name}"
        if not path.exists():
            build(side, name).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture
def make(folders):
    def model(family, pair, **changes):
        vision, text = pair
        options = {"text_pooling": TEXT[text][2], "text_projection": "linear", **changes}
        return MODELS[family].from_vision_text_pretrained(folders("vision", vision), folders("text", text), **options)

    return model


def covers(column, fast=None):
    """Parametrizes by the pairs of a column; those that are not in `fast` are slow."""
    pairs = COVERED[column]
    marks = [() if fast is None or pair in fast else pytest.mark.slow for pair in pairs]
    params = [pytest.param(pair, marks=mark, id="-".join(pair)) for pair, mark in zip(pairs, marks, strict=True)]
    return pytest.mark.parametrize("pair", params)


def images(pair, number, seed=0):
    """What a vision tower takes of some images, which have a size of their own where it takes such."""
    generator = torch.Generator().manual_seed(seed)
    if pair[0] != SIGLIP_VISION[1]:
        return {"pixel_values": torch.randn(number, 3, 32, 32, generator=generator)}
    shapes = torch.tensor([[4, 4], [2, 7], [4, 3]])[:number]
    there = torch.arange(16) < shapes.prod(1, keepdim=True)
    pixels = torch.randn(number, 16, 192, generator=generator) * there[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": there.long(), "spatial_shapes": shapes}


def upstream_image_features(name, source, inputs):
    if name == "CLIP":
        return source.get_image_features(**inputs).pooler_output
    outputs = source(**inputs)
    return outputs.last_hidden_state[:, 0] if name == "ViT" else outputs.pooler_output


def project(model, name, features):
    """A tower alone whose family projects what it pools gets a new projection; a CLIP brings its own."""
    return model.visual_projection(features) if model.vision_adapter.projects and name != "CLIP" else features


def regions(family, pair, number):
    generator = torch.Generator().manual_seed(1)
    if family == "cloc":
        corners = torch.rand(number, 3, 2, 2, generator=generator)
        return torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    # The canvas of all images.
    size = (32, 56) if pair[0] == SIGLIP_VISION[1] else (32, 32)
    return torch.rand(number, 3, *size, generator=generator) > 0.5


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@covers("step 0")
def test_step_0(pair, family, make, folders):
    """Bit for bit: the image features whatever the mask, and the states of the text tower."""
    model = make(family, pair)
    source = AutoModel.from_pretrained(folders("vision", pair[0]))
    inputs = images(pair, 2)
    expected = project(model, pair[0], upstream_image_features(pair[0], source, inputs))
    assert expected.std() > 0.05
    assert torch.equal(model.get_image_features(**inputs).pooler_output, expected)
    if family == "pixclip":
        masks = regions(family, pair, 2)
        masks[:, 0] = False
        repeated = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
        repeated = project(model, pair[0], upstream_image_features(pair[0], source, repeated))
        inputs["region_masks"] = masks
        assert torch.equal(model.get_region_features(**inputs).pooler_output.flatten(0, 1), repeated)
        model.vision_model.get_parameter(mask_weight(model)).normal_()
        assert not torch.equal(model.get_region_features(**inputs).pooler_output.flatten(0, 1), repeated)
    ids, mask = build_texts(3)
    text = AutoModel.from_pretrained(folders("text", pair[1]))
    if pair[1] == SIGLIP_TEXT:
        # Filled up to the length of the tower, which reads all of it.
        whole = torch.nn.functional.pad(ids * mask, (0, 40 - ids.shape[1]))
        pooled = text(input_ids=whole).pooler_output
        assert torch.equal(model.get_text_features(ids, mask).pooler_output, model.text_projection(pooled))
        return
    states, last = text(input_ids=ids, attention_mask=mask).last_hidden_state, mask.sum(-1) - 1
    pooling = TEXT[pair[1]][2]
    if pooling == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(-1, keepdim=True)
    else:
        pooled = states[:, 0] if pooling == "cls" else states[torch.arange(3), last]
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, model.text_projection(pooled))


def mask_weight(model):
    (name,) = (name for name, _ in model.vision_model.named_parameters() if name.endswith("mask_weight"))
    return name


@torch.no_grad()
@covers("export", [])
def test_export(pair, make):
    family = "cloc" if pair[0] == "ViT" else "pixclip"
    model = make(family, pair)
    half = VISION_MODELS[family](model.config).eval()
    half.load_state_dict({name: model.state_dict()[name] for name in half.state_dict()})
    exported = export_image_half(half, "torch")
    key = "region_boxes" if family == "cloc" else "region_masks"
    for number in (1, 3):
        batch = {**images(pair, number), key: regions(family, pair, number)}
        torch.testing.assert_close(exported(**batch).region_embeds, half(**batch).region_embeds, atol=1e-4, rtol=0)
    exported = export_text_half(model, "torch")
    ids, mask = build_texts(4, length=12)
    expected = torch.nn.functional.normalize(model.get_text_features(ids, mask).pooler_output, dim=-1)
    found = exported(input_ids=ids, attention_mask=mask)["text_embeds"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_export_is_refused(make):
    for pair in REFUSED["export"]:
        for family in MODELS:
            with pytest.raises(ValueError, match="`model` must take images of one size"):
                export_image_half(make(family, pair), "torch")


@torch.no_grad()
@covers("int8", [])
def test_int8(pair, make):
    pytest.importorskip("onnxruntime", reason="needs pip install pixclip-hf[onnx]")
    model = make("cloc", pair)
    exported = export_text_half(model, int8=True)
    assert "MatMulInteger" in {node.op_type for node in exported.program.graph}
    ids, mask = build_texts(4, length=12)
    found = exported(input_ids=ids, attention_mask=mask)["text_embeds"]
    cosines = (found * TextHalf(model)(ids, mask)["text_embeds"]).sum(-1)
    assert 0.95 < cosines.min() and cosines.max() < 1 - 1e-7


@covers("LoRA")
def test_lora(pair, make):
    model = add_lora(make("pixclip", pair), r=2)
    masks, (ids, mask) = regions("pixclip", pair, 2), build_texts(2, 3)
    batch = {"region_masks": masks, "region_input_ids": ids, "region_text_attention_mask": mask}
    model(**images(pair, 2), **batch).loss.backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert any("lora_B" in name and "text_model" in name for name in moved)
    assert any(name.endswith("mask_weight") for name in moved)
    assert not any("text_model" in name and "lora_" not in name for name in moved)


TESTS = {
    "step 0": test_step_0,
    "export": test_export,
    "int8": test_int8,
    "LoRA": test_lora,
}


def test_the_table_of_the_documentation_is_that_of_these_tests():
    assert TESTS.keys() == COVERED.keys()
    for column, test in TESTS.items():
        (params,) = (mark.args[1] for mark in test.pytestmark if mark.args[0] == "pair")
        assert [param.values[0] for param in params] == COVERED[column], column
    found = documented(DOCS.read_text(encoding="utf-8"))[1]
    assert found == table(), "run `python tests/modeling/towers.py`"
