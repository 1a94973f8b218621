"""LoRA on the text tower: what trains, what is saved, and that it comes back."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, TrainingArguments

import pixclip_hf
from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer, add_lora

FAMILIES = ("cloc", "pixclip")


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, size=32) for index in range(12)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def base(family, request, tmp_path):
    """(folder, processor) of a saved model."""
    model, processor = request.getfixturevalue(f"tiny_{family}")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", processor


def train(model, processor, scenes, folder, max_steps=4, resume=None):
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=4,
        logging_steps=1,
    )
    crops = processor.has_crops
    trainer = RegionTrainer(
        model,
        settings,
        data_collator=RegionCollator(processor, regions_per_image=2, crops=crops),
        train_dataset=scenes,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@torch.no_grad()
def outputs(model, processor, scenes):
    crops = processor.has_crops
    batch = RegionCollator(processor, regions_per_image=2, crops=crops)(scenes[:3])
    output = model.eval()(**batch)
    return torch.cat([output.region_embeds.flatten(0, 1), output.region_text_embeds.flatten(0, 1), output.text_embeds])


def test_trains_adapters_and_everything_but_the_text_base(base, scenes, tmp_path):
    folder, processor = base
    model = add_lora(AutoModel.from_pretrained(folder), r=4)
    assert isinstance(model, PeftModel)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        copied = "modules_to_save" in name
        assert value.requires_grad == (copied or "lora_" in name), name
        # The original of a copy stays behind, frozen; everything else outside the text tower is a copy.
        assert copied or "text_model" in name or "original_module" in name, name
    train(model, processor, scenes, tmp_path / "run")
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for part in ("lora_A", "lora_B", "vision_model", "visual_projection", "text_projection", "logit_scale"):
        assert any(part in name for name in moved), part
    still = {name for name in before if ".text_model." in name and "lora_" not in name}
    assert len(still) > 30 and not moved & still
    projections = {name.split(".")[-4] for name in moved if "lora_A" in name}
    assert projections == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_checkpoint_holds_adapters_and_loads(base, scenes, tmp_path):
    folder, processor = base
    model = train(add_lora(AutoModel.from_pretrained(folder), r=4), processor, scenes, tmp_path / "run").model
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    saved = set(load_file(checkpoint / "adapter_model.safetensors"))
    assert not [name for name in saved if ".text_model." in name and "lora_" not in name]
    assert sum("lora_A" in name for name in saved) == sum("lora_B" in name for name in saved) == 8
    assert any("mask_weight" in name for name in saved) == processor.has_crops

    expected = outputs(model, processor, scenes)
    assert (expected - outputs(AutoModel.from_pretrained(folder), processor, scenes)).abs().max() > 0.1
    loaded = AutoModel.from_pretrained(checkpoint)
    torch.testing.assert_close(outputs(loaded, processor, scenes), expected, atol=1e-6, rtol=1e-5)
    plain = model.merge_and_unload()
    assert type(plain) is type(loaded)
    torch.testing.assert_close(outputs(plain, processor, scenes), expected, atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(again, processor, scenes), expected, atol=1e-5, rtol=1e-5)


def test_resumes_to_the_same_end(base, scenes, tmp_path):
    folder, processor = base

    def fresh():
        torch.manual_seed(7)
        return add_lora(AutoModel.from_pretrained(folder), r=4)

    whole = train(fresh(), processor, scenes, tmp_path / "whole", max_steps=8)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(fresh(), processor, scenes, tmp_path / "resumed", max_steps=8, resume=checkpoint)
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_frozen_parts_stay_frozen(base, scenes, tmp_path):
    folder, processor = base
    model = AutoModel.from_pretrained(folder)
    model.vision_model.requires_grad_(False)
    model = add_lora(model, r=4)
    assert not [name for name, value in model.named_parameters() if "vision_model" in name and value.requires_grad]
    train(model, processor, scenes, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    assert not [name for name in saved if "vision_model" in name] and any("text_projection" in name for name in saved)
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    expected = outputs(model, processor, scenes)
    torch.testing.assert_close(outputs(loaded, processor, scenes), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "projections"),
    [("bert", {"query", "key", "value"}), ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_default_targets_of_other_towers(kind, projections, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **sizes}
    text = AutoConfig.for_model(kind, vocab_size=60, **sizes)
    config = pixclip_hf.PixCLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    pixclip_hf.PixCLIPModel(config).save_pretrained(tmp_path / "base")
    model = add_lora(AutoModel.from_pretrained(tmp_path / "base"), r=2)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.split(".")[-1] for name in adapted} == projections and len(adapted) == 2 * len(projections)
    assert all(".text_model." in name for name in adapted)
    model.save_pretrained(tmp_path / "adapters")
    loaded = AutoModel.from_pretrained(tmp_path / "adapters")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval().get_image_features(pixels).pooler_output
        torch.testing.assert_close(loaded.get_image_features(pixels).pooler_output, expected, atol=1e-6, rtol=1e-5)


FUSED = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, {"attn.c_attn", "attn.c_proj"}),
    "phi3": ({"num_key_value_heads": 2, "pad_token_id": 0}, {"self_attn.qkv_proj", "self_attn.o_proj"}),
    "falcon": ({}, {"self_attention.query_key_value", "self_attention.dense"}),
    "modernbert": ({"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, {"attn.Wqkv", "attn.Wo"}),
    "distilbert": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        {f"attention.{name}_lin" for name in ("q", "k", "v", "out")},
    ),
}


@pytest.mark.parametrize("kind", FUSED)
def test_default_targets_of_fused_attention(kind, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **sizes}
    own, projections = FUSED[kind]
    named = {} if kind in ("gpt2", "distilbert") else sizes
    text = AutoConfig.for_model(kind, **{"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, **named, **own})
    config = pixclip_hf.PixCLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    pixclip_hf.PixCLIPModel(config).save_pretrained(tmp_path / "base")
    model = add_lora(AutoModel.from_pretrained(tmp_path / "base"), r=2)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {".".join(name.split(".")[-2:]) for name in adapted} == projections
    assert len(adapted) == 2 * len(projections)
    # They train: a gradient reaches each of them.
    ids = torch.randint(3, 60, (2, 5))
    model.get_text_features(input_ids=ids).pooler_output.square().sum().backward()
    reached = [value.grad for name, value in model.named_parameters() if ".lora_B" in name]
    assert len(reached) == len(adapted) and all(gradient is not None and gradient.any() for gradient in reached)


def test_attention_of_unknown_names_is_listed(tiny_cloc):
    """Only the way out of the attention has a name that is known: nothing is adapted by half."""
    model, _ = tiny_cloc
    for layer in model.text_model.encoder.layers:
        attention = layer.self_attn
        attention.mixed = attention.q_proj
        del attention.q_proj, attention.k_proj, attention.v_proj
    message = r"`target_modules` \(`--lora_target_modules`\) must name them; .*self_attn\.mixed, .*self_attn\.out_proj"
    with pytest.raises(ValueError, match=message):
        add_lora(model)
    assert len(add_lora(model, target_modules=r"text_model\..*\.out_proj").peft_config) == 1


def test_own_targets(tiny_cloc):
    model = add_lora(tiny_cloc[0], r=3, alpha=6, dropout=0.1, target_modules=r"text_model\..*\.fc1")
    adapted = [(name, value) for name, value in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 and all(".fc1." in name and value.shape == (3, 32) for name, value in adapted)
    assert model.peft_config["default"].lora_alpha == 6 and model.peft_config["default"].lora_dropout == 0.1


def test_unknown_targets(tiny_cloc):
    message = (
        r"`target_modules` 'text_model.*wqkv' matches no module.*"
        r"text_model\.encoder\.layers\.\*\.mlp\.fc1, .*text_model\.encoder\.layers\.\*\.self_attn\.k_proj"
    )
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_cloc[0], target_modules="text_model.*wqkv")
    # Part of a name is no match.
    with pytest.raises(ValueError, match="matches no module"):
        add_lora(tiny_cloc[0], target_modules="q_proj")


def test_targets_outside_the_text_tower(tiny_cloc):
    with pytest.raises(ValueError, match=r"modules of the text tower alone, got \['vision_model\.encoder\.layers\.0"):
        add_lora(tiny_cloc[0], target_modules=r".*\.q_proj")


@pytest.mark.parametrize("prefix", ("CLOC", "PixCLIP"))
def test_no_text_tower(prefix):
    config = getattr(pixclip_hf, f"{prefix}Config")(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32,
                       "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 16},
        text_config=None, text_hidden_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`model` has no text tower"):
        add_lora(getattr(pixclip_hf, f"{prefix}Model")(config))
