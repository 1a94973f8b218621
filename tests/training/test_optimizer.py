"""Parameter groups: every trainable parameter once, at the rate and with the decay of its part."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import pixclip_hf
from pixclip_hf.training import OptimizerArguments, add_lora, optimizer_for, parameter_groups

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {
    "clip": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZES},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **SIZES},
}
TEXT = {
    "clip": {"model_type": "clip_text_model", "vocab_size": 64, **SIZES},
    "llama": {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2, **SIZES},
    "bert": {"model_type": "bert", "vocab_size": 64, **SIZES},
}
RATE, DECAY = 1e-3, 0.1


def build(family, vision="clip", text="clip"):
    config, model = (getattr(pixclip_hf, family + part) for part in ("Config", "Model"))
    return model(config(vision_config=dict(VISION[vision]), text_config=dict(TEXT[text]), projection_dim=16))


def settings_of(model, **options):
    """name -> (rate over RATE, decays) of every trainable parameter, each of which is in one group."""
    groups = parameter_groups(model, RATE, DECAY, **options)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            assert group["weight_decay"] in (0, DECAY)
            found[id(parameter)] = pytest.approx(group["lr"] / RATE), group["weight_decay"] == DECAY
    names = {name: found.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not found
    return names


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("family", ("CLOC", "PixCLIP"))
def test_rates_follow_the_parts(family, vision, text):
    names = settings_of(build(family, vision, text), vision_lr_scale=0.1, text_lr_scale=0.01)
    assert {"vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"} <= {
        name.split(".")[0] for name in names
    }
    for name, (rate, _) in names.items():
        tower = {"vision_model": 0.1, "text_model": 0.01}.get(name.split(".")[0], 1)
        assert rate == (1 if name.endswith("mask_weight") else tower), name
    assert any(name.endswith("mask_weight") for name in names) == (family == "PixCLIP")
    assert any(name.startswith("prompter.") for name in names) == (family == "CLOC")


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("vision", VISION)
def test_what_decays(vision, text):
    """The matrices of linear layers and convolutions, and nothing else."""
    model = build("PixCLIP", vision, text)
    matrices = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for name in ("weight", "mask_weight")
        if hasattr(module, name)
    }
    if vision == "siglip":
        matrices.add("vision_model.head.attention.in_proj_weight")
    assert {name for name, (_, decays) in settings_of(model).items() if decays} == matrices
    spared = {"clip": "class_embedding", "siglip": "head.probe"}[vision], "logit_scale.log_scale", "embed"
    for part in spared:
        assert any(part in name for name in settings_of(model).keys() - matrices), part


def test_layer_decay_counts_from_the_output():
    names = settings_of(build("PixCLIP", "siglip", "llama"), layer_decay=0.5, text_lr_scale=0.1)
    expected = {
        "vision_model.embeddings.patch_embedding.weight": 0.5**4,
        "vision_model.embeddings.patch_embedding.mask_weight": 1,
        "vision_model.embeddings.position_embedding.weight": 0.5**4,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.5**3,
        "vision_model.encoder.layers.2.layer_norm1.bias": 0.5,
        "vision_model.post_layernorm.weight": 1,
        "vision_model.head.probe": 1,
        "text_model.embed_tokens.weight": 0.1 * 0.5**4,
        "text_model.layers.1.self_attn.q_proj.weight": 0.1 * 0.5**2,
        "text_model.norm.weight": 0.1,
        "visual_projection.weight": 1,
    }
    assert {name: names[name][0] for name in expected} == expected
    clip = settings_of(build("CLOC", "clip", "bert"), layer_decay=0.5)
    assert clip["vision_model.pre_layrnorm.weight"][0] == 0.5**4
    assert clip["text_model.embeddings.word_embeddings.weight"][0] == 0.5**4
    assert clip["text_model.encoder.layer.2.output.dense.weight"][0] == 0.5


@pytest.mark.parametrize("family", ("CLOC", "PixCLIP"))
def test_lora(family):
    """PEFT renames everything: the same rates, adapters at the full one, nothing of the text base."""
    options = {"vision_lr_scale": 0.1, "text_lr_scale": 0.01, "layer_decay": 0.5}
    plain = settings_of(build(family, "clip", "llama"), **options)
    adapted = settings_of(add_lora(build(family, "clip", "llama"), r=2), **options)
    adapters = {name for name in adapted if ".lora_" in name}
    assert len(adapters) == 3 * 4 * 2 and all(adapted[name] == (1, True) for name in adapters)
    copies = {
        name.replace("base_model.model.", "").replace("modules_to_save.default.", ""): setting
        for name, setting in adapted.items()
        if name not in adapters
    }
    assert copies == {name: setting for name, setting in plain.items() if not name.startswith("text_model.")}


def test_the_full_rate_comes_first_and_frozen_parts_are_left_out():
    model = build("CLOC")
    model.text_model.requires_grad_(False)
    groups = parameter_groups(model, RATE, DECAY, vision_lr_scale=2.0, layer_decay=0.9)
    assert groups[0]["lr"] == RATE and groups[0]["name"] == "new"
    assert {group["name"] for group in groups} == {"new", "vision_model"}
    # A rate, with and without decay: heads, embeddings, three blocks, output.
    assert len(groups) == 2 + 2 * 4 + 1
    assert model.visual_projection.weight in set(groups[0]["params"])


def test_compiled_models_keep_their_groups():
    model = build("PixCLIP")
    options = {"vision_lr_scale": 0.1, "layer_decay": 0.5}
    compiled = settings_of(torch.compile(model), **options)
    assert compiled == {f"_orig_mod.{name}": setting for name, setting in settings_of(model, **options).items()}


def test_a_step_moves_each_part_by_its_rate(tmp_path):
    model = build("PixCLIP")
    training = TrainingArguments(str(tmp_path), learning_rate=RATE, weight_decay=DECAY, use_cpu=True)
    optimizer_class, options = optimizer_for(model, training, OptimizerArguments(vision_lr_scale=0.1, text_lr_scale=0))
    optimizer = optimizer_class(options.pop("params"), **options)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the rate itself, apart from the decay of the weights.
    for name, rate, decay in (
        ("visual_projection.weight", 1, DECAY),
        ("logit_scale.log_scale", 1, 0),
        ("vision_model.embeddings.patch_embedding.mask_weight", 1, DECAY),
        ("vision_model.embeddings.patch_embedding.weight", 0.1, DECAY),
        ("vision_model.embeddings.position_embedding.weight", 0.1, 0),
        ("text_model.embeddings.token_embedding.weight", 0, 0),
    ):
        expected = before[name] * (1 - rate * RATE * decay) - rate * RATE
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_lr_scale": -1}, "`vision_lr_scale` must not be negative, got -1"),
        ({"text_lr_scale": float("nan")}, "`text_lr_scale` must not be negative, got nan"),
        ({"layer_decay": 0}, r"`layer_decay` must lie in \(0, 1\], got 0"),
        ({"layer_decay": 1.5}, r"`layer_decay` must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(build("CLOC"), RATE, **options)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(build("CLOC").requires_grad_(False), RATE)


def test_optimizers_that_pick_their_parameters(tmp_path, monkeypatch):
    class Own(torch.optim.SGD):
        pass

    def own(training, model):
        return Own, {"lr": RATE, "optimizer_dict": {}}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(own))
    training = TrainingArguments(str(tmp_path), use_cpu=True)
    assert optimizer_for(build("CLOC"), training, OptimizerArguments()) == (Own, {"lr": RATE, "optimizer_dict": {}})
    with pytest.raises(ValueError, match="picks its parameters itself, and takes no .*layer_decay=0.5"):
        optimizer_for(build("CLOC"), training, OptimizerArguments(layer_decay=0.5))


def test_names_of_other_towers():
    """GPT-2 calls its embeddings and blocks by other names."""
    text = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    towers = {"vision_config": dict(VISION["clip"]), "text_config": text, "projection_dim": 16}
    names = settings_of(pixclip_hf.PixCLIPModel(pixclip_hf.PixCLIPConfig(**towers)), layer_decay=0.5)
    assert names["text_model.wte.weight"] == (0.5**3, False) and names["text_model.wpe.weight"] == (0.5**3, False)
    assert names["text_model.h.1.ln_1.weight"] == (0.5, False) and names["text_model.ln_f.weight"] == (1, False)
