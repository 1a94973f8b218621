"""Exported halves against the models they come from, on other shapes than the example's; graphs without a break."""

import pytest
import torch
from builders import (
    FAMILIES,
    VISION_MODELS,
    build_batch,
    build_model,
    build_texts,
    region_key,
    text_config,
    vision_config,
)
from transformers.exporters import ExportedModel

from pixclip_hf.export import TextHalf, export_image_half, export_text_half

CASES = [("cloc", "prompted"), ("pixclip", "prompted"), ("pixclip", "pooled")]
# Each family and each format once; the other pairs are slow.
FAST = [("cloc", "prompted", "onnx"), ("pixclip", "prompted", "torch")]
IMAGE_HALVES = [
    pytest.param(*case, format, marks=() if (*case, format) in FAST else pytest.mark.slow)
    for case in CASES
    for format in ("torch", "onnx")
]
CLOSE = {"atol": 1e-4, "rtol": 0}


def build_small(family, text="clip_text"):
    """With one layer per tower: what an export takes goes by the number of operations."""
    towers = {"vision_config": vision_config("clip", num_hidden_layers=1)}
    if text is not None:
        towers["text_config"] = text_config(text, num_hidden_layers=1)
    return build_model(family, text=text, **towers)


def needs_onnx(format):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs pip install pixclip-hf[onnx]")


def regions(family, images, count):
    batch = build_batch(family, False, False, False, counts=(count,) * images, seed=images)
    return {name: batch[name] for name in ("pixel_values", region_key(family))}


@torch.no_grad()
@pytest.mark.parametrize("family, mode, format", IMAGE_HALVES)
def test_image_half(family, mode, format, tmp_path):
    needs_onnx(format)
    model = build_small(family)
    half = VISION_MODELS[family](model.config).eval()
    half.load_state_dict({name: model.state_dict()[name] for name in half.state_dict()})
    export_image_half(half, format, mode).save_pretrained(tmp_path)
    exported = ExportedModel.from_pretrained(tmp_path)
    options = {"mode": mode} if family == "pixclip" else {}
    seen = []
    for images, count in ((1, 1), (3, 5), (2, 1)):
        batch = regions(family, images, count)
        found, expected = exported(**batch), model(**batch, **options)
        torch.testing.assert_close(found.image_embeds, expected.image_embeds, **CLOSE)
        torch.testing.assert_close(found.region_embeds, expected.region_embeds, **CLOSE)
        seen.append(found.region_embeds.flatten(0, 1))
    assert torch.cat(seen).std(0).max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("format", ("torch", "onnx"))
@pytest.mark.parametrize("text", ("clip_text", pytest.param("llama", marks=pytest.mark.slow)))
def test_text_half(text, format):
    needs_onnx(format)
    model = build_small("pixclip", text)
    exported = export_text_half(model, format)
    for count, length, padding in ((1, 5, "right"), (4, 12, "right"), (3, 9, "left")):
        ids, mask = build_texts(count, length=length, padding=padding)
        expected = torch.nn.functional.normalize(model.get_text_features(ids, mask).pooler_output, dim=-1)
        found = exported(input_ids=ids, attention_mask=mask)["text_embeds"]
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("format", ("torch", "onnx"))
def test_states_in_place_of_tokens(format):
    needs_onnx(format)
    model = build_small("cloc", text=None)
    exported = export_text_half(model, format)
    states = torch.randn(5, 24)
    expected = TextHalf(model)(text_states=states)["text_embeds"]
    torch.testing.assert_close(exported(text_states=states)["text_embeds"], expected, **CLOSE)


@torch.no_grad()
def test_int8():
    needs_onnx("onnx")
    model = build_small("cloc")
    exported = export_text_half(model, int8=True)
    assert "MatMulInteger" in {node.op_type for node in exported.program.graph}
    ids, mask = build_texts(4, length=12)
    found = exported(input_ids=ids, attention_mask=mask)["text_embeds"]
    cosines = (found * TextHalf(model)(ids, mask)["text_embeds"]).sum(-1)
    assert cosines.min() > 0.98 and cosines.max() < 1 - 1e-7


@pytest.mark.parametrize("export", (export_image_half, export_text_half))
def test_training_goes_on_as_before(export):
    model = build_small("cloc").train()
    model.text_model.eval()
    modes = [module.training for module in model.modules()]
    export(model, "torch")
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


def test_refusals():
    model = build_model("cloc")
    with pytest.raises(ValueError, match="`format` must be one of 'torch', 'onnx', got 'tflite'"):
        export_image_half(model, "tflite")
    with pytest.raises(ValueError, match="`mode` must be one of .*, got 'cropped'"):
        export_image_half(model, mode="cropped")
    with pytest.raises(ValueError, match="`int8=True` needs `format='onnx'`"):
        export_text_half(model, "torch", int8=True)


@torch.no_grad()
@pytest.mark.parametrize("family, mode", CASES)
def test_compiled_without_graph_breaks(family, mode):
    model = build_small(family)
    batch = build_batch(family, False, False, False)
    options = {"mode": mode} if family == "pixclip" else {}
    calls = [
        (model.get_region_features, {**batch, **options}),
        (model.get_image_features, {"pixel_values": batch["pixel_values"]}),
        (model.get_text_features, dict(zip(("input_ids", "attention_mask"), build_texts(3), strict=True))),
    ]
    torch._dynamo.reset()
    for method, given in calls:
        found = torch.compile(method, backend="aot_eager", fullgraph=True)(**given).pooler_output
        torch.testing.assert_close(found, method(**given).pooler_output)


def test_families_are_covered():
    assert {family for family, _ in CASES} == set(FAMILIES)
