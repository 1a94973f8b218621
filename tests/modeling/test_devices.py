"""Models whose parts lie on several devices, or whose weights come from main memory or a disk when they are used."""

import accelerate
import builders
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from transformers import AutoModel
from two_devices import OTHER, TwoDevices, here

TOWERS = (("clip", "clip_text"), ("eva02", "llama"), ("clip", "bert"))


def outputs_of(family, model, batch):
    """Everything that the models' methods return for a batch, by name."""
    image = {"pixel_values": batch["pixel_values"]}
    regions = {name: batch[name] for name in (builders.region_key(family), "region_attention_mask")}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = {
        "forward": model(**batch),
        "image": model.get_image_features(**image),
        "text": model.get_text_features(**texts),
        "region": model.get_region_features(**image, **regions),
    }
    if family == "pixclip":
        outputs["pooled"] = model.get_region_features(**image, **regions, mode="pooled")
    else:
        outputs["tokens"] = model.get_region_tokens(**image, **regions)
        outputs["ground"] = model.ground(**image, **texts)
        masks = torch.rand(*batch["region_attention_mask"].shape, 32, 32) > 0.5
        outputs["masks"] = model.get_region_features(**image, region_masks=masks)
    parts = outputs["forward"].loss_parts
    named = {f"{method}.{name}": value for method, output in outputs.items() for name, value in output.items()}
    named = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    return named | {f"loss.{name}": value for name, value in parts.items()}


def check_equal(found, expected):
    assert found.keys() == expected.keys() and len(found) > 15
    for name, value in found.items():
        torch.testing.assert_close(here(value), expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("towers", TOWERS, ids="-".join)
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_offloaded_weights(family, towers, offload, tmp_path):
    model, batch = builders.build_model(family, *towers), builders.build_batch(family)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = outputs_of(family, model, batch)
        if offload == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        else:
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
        assert {tensor.device.type for tensor in model.state_dict(keep_vars=True).values()} == {"meta"}
        torch.manual_seed(0)
        check_equal(outputs_of(family, model, batch), expected)


@pytest.mark.parametrize("layer", ["soft_pooling", "first"])
def test_offloaded_prompter_layers(layer):
    model, batch = builders.build_model("cloc", prompter_layer=layer), builders.build_batch("cloc")
    with torch.no_grad():
        torch.manual_seed(0)
        expected = outputs_of("cloc", model, batch)
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        torch.manual_seed(0)
        check_equal(outputs_of("cloc", model, batch), expected)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_part_of_a_saved_model_on_disk(family, tmp_path):
    model, batch = builders.build_model(family), builders.build_batch(family)
    model.save_pretrained(tmp_path)
    device_map = {name: "disk" for name, _ in model.named_children()} | {"vision_model": "cpu", "text_model": "cpu"}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded")
    with torch.no_grad():
        torch.manual_seed(0)
        expected = outputs_of(family, model, batch)
        torch.manual_seed(0)
        check_equal(outputs_of(family, loaded.eval(), batch), expected)


def move(model, name):
    """Puts a part of a model on the other device, with the hooks of accelerate, as `dispatch_model` does."""
    attach_execution_device_hook(model, torch.device("cpu"))
    part = model.get_submodule(name)
    # Its own inputs follow it too, where it has no weights but in its parts.
    add_hook_to_module(part, AlignDevicesHook(execution_device=torch.device("cpu")), append=True)
    with torch.no_grad():
        for module in part.modules():
            for tensors, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda moved, _: moved)):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        tensors[key] = wrap(tensor.detach().to(OTHER), False)
            for hook in getattr(getattr(module, "_hf_hook", None), "hooks", [getattr(module, "_hf_hook", None)]):
                if hook is not None:
                    hook.execution_device = OTHER


PARTS = {
    "cloc": [
        "prompter",
        "prompter.positions",
        "prompter.layer",
        "region_norm",
        "region_projection",
        "region_logit_scale",
        "box_head",
    ],
    "pixclip": [],
}
BOTH = [
    "vision_model",
    "vision_model.embeddings",
    "vision_model.encoder.layers.0",
    "vision_model.encoder.layers.1",
    "vision_model.post_layernorm",
    "text_model",
    "visual_projection",
    "text_projection",
    "logit_scale",
]


CONTRAST = {"local_global_objective": "contrastive"}


@pytest.mark.parametrize(
    "family, part, changes",
    [(family, part, {}) for family in builders.FAMILIES for part in PARTS[family] + BOTH]
    + [("pixclip", part, CONTRAST) for part in ("vision_model.post_layernorm", "visual_projection", "logit_scale")],
)
def test_part_on_another_device(family, part, changes):
    model, batch = builders.build_model(family, **changes), builders.build_batch(family)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = outputs_of(family, model, batch)
        with TwoDevices():
            move(model, part)
            torch.manual_seed(0)
            check_equal(outputs_of(family, model, batch), expected)


def test_two_devices_do_not_mix():
    with TwoDevices():
        there = torch.ones(2).to(OTHER)
        assert there.device == OTHER and (there * 2).device == OTHER
        assert torch.zeros(2, device=OTHER).device == OTHER
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2)
        assert torch.equal(here((there + 1).cpu()), torch.full((2,), 2.0))


@pytest.mark.parametrize("towers", TOWERS, ids="-".join)
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_parts_that_stay_together_exist(family, towers):
    model = builders.build_model(family, *towers)
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules <= names
    towers = {name for tower in (model.vision_model, model.text_model) for name in tower._no_split_modules}
    assert towers & names <= model._no_split_modules
    assert ("CLOCPrompter" in model._no_split_modules) == (family == "cloc")
