"""Converted checkpoints compute what the public code computes: its recorded numbers, and references."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from conversion_references import (
    alpha_image_features,
    build_clip,
    eva_checkpoint,
    eva_image_features,
    eva_text_features,
    openai_state,
    random,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, LlamaConfig, LlamaModel, pipeline

from pixclip_hf.conversion import tokenizer as tokenizers
from pixclip_hf.conversion.command import main
from pixclip_hf.conversion.convert import convert

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
BOUND = 1e-4


def close(found, expected):
    assert found.shape == expected.shape and expected.abs().max() > 0.1
    assert (found - expected).abs().max() < BOUND


def different(one, other):
    assert (one - other).abs().max() > 10 * BOUND


def save(state, path):
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def fixture(name):
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"{FIXTURES / name} is absent: the numbers of the public code")
    return FIXTURES / name / "checkpoint.safetensors", load_file(FIXTURES / name / "io.safetensors")


def everything_accounted(report, source, target):
    """Every name of both sides is in the report, and each entry leads to the other side."""
    assert {name.removeprefix(report["prefix"]) for name in source} <= set(report["sources"])
    assert set(report["targets"]) == set(target)
    for name, entry in report["targets"].items():
        assert entry["shape"] == list(target[name].shape) and entry["how"]
        assert entry["source"] is None or name in report["sources"][entry["source"]]["targets"]
    for name, entry in report["sources"].items():
        assert entry["how"] and all(report["targets"][other]["source"] == name for other in entry["targets"])


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((40, 30)).convert("RGB")


# The recorded numbers of the public code


@torch.no_grad()
def test_the_recorded_numbers_of_pixclip(tmp_path):
    checkpoint, io = fixture("official_pixclip_tiny")
    report = convert("pixclip", checkpoint, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    everything_accounted(report, load_file(checkpoint), model.state_dict())
    pixels, mask = io["pixel_values"], io["mask"]
    regions = model.get_region_features(pixels, mask)
    close(regions.pooler_output[:, 0], io["image_features"])
    close(model.get_image_features(pixels, use_mask=False).pooler_output, io["image_features_no_mask"])
    # The last mask is all ones: what the model means by the whole image.
    close(model.get_image_features(pixels[-1:]).pooler_output, io["image_features"][-1:])
    different(io["image_features"], io["image_features_no_mask"])
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    tokens = model.vision_model.post_layernorm(regions.last_hidden_state[:, 1:])
    close(tokens.mT.unflatten(-1, (side, side)), io["patch_feature_map"])
    close(model.get_text_features(text_states=io["text_embeds"]).pooler_output, io["text_features"])
    assert model.config.text_config is None and model.config.text_model_name
    model.set_attn_implementation("eager")
    close(model.get_region_features(pixels, mask).pooler_output[:, 0], io["image_features"])


@torch.no_grad()
@pytest.mark.parametrize("half", ["full", "file", "folder"])
def test_the_recorded_numbers_of_alpha_clip(half, tmp_path):
    checkpoint, io = fixture("alpha_clip_tiny")
    options = {}
    if half != "full":
        state = load_file(checkpoint)
        clip = {name.replace(".in_proj.", ".in_proj_"): t for name, t in state.items() if "alpha" not in name}
        visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
        checkpoint = save(visual, tmp_path / "visual.pth")
        # The image tower of the CLIP is another, so that its weights would show.
        clip |= {name: random(*t.shape) for name, t in clip.items() if name.startswith("visual.")}
        options["clip"] = save(clip, tmp_path / "clip.pt")
        if half == "folder":
            convert("clip", options["clip"], tmp_path / "pixclip")
            as_clip(AutoModel.from_pretrained(tmp_path / "pixclip")).save_pretrained(tmp_path / "clip")
            options["clip"] = tmp_path / "clip"
    report = convert("alpha-clip", checkpoint, tmp_path / "out", **options)
    model = AutoModel.from_pretrained(tmp_path / "out")
    state = load_file(checkpoint) if half == "full" else torch.load(checkpoint)
    everything_accounted(report, state, model.state_dict())
    assert model.config.text_config.eos_token_id == io["input_ids"].max()
    close(model.get_region_features(io["pixel_values"], io["mask"]).pooler_output[:, 0], io["image_features"])
    close(model.get_text_features(io["input_ids"]).pooler_output, io["text_features"])
    shown = torch.arange(io["input_ids"].shape[1]) <= io["input_ids"].argmax(-1, keepdim=True)
    close(model.get_text_features(io["input_ids"], shown.long()).pooler_output, io["text_features"])


def scalars(image_size):
    """The sizes that OpenAI's own files carry among their weights."""
    sizes = {"input_resolution": image_size, "context_length": 13, "vocab_size": 60}
    return {name: torch.tensor(size) for name, size in sizes.items()}


def as_clip(model):
    """The towers of a converted model as a transformers CLIP, with the wrong token ids of the first on the Hub."""
    config = CLIPConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=model.config.text_config.to_dict() | {"bos_token_id": 0, "eos_token_id": 2},
        projection_dim=model.config.projection_dim,
    )
    clip = CLIPModel(config)
    state = {name: t for name, t in model.state_dict().items() if "mask_weight" not in name}
    state["logit_scale"] = state.pop("logit_scale.log_scale")
    clip.load_state_dict(state)
    return clip


# Other shapes of the same architectures

EVA_SHAPES = {
    "heads by the tables": {"width": 96, "tables": 32, "side": 5, "layers": 2},
    "heads of 64, no bias": {"biases": False},
    "larger than its grid": {"width": 64, "tables": 16, "side": 18, "patch": 2, "layers": 1},
    "heads as given": {"width": 96, "layers": 2},
}
EVA_OPTIONS = {"heads as given": {"head_width": 32}, "heads by the tables": {"head_width": 32}}


@torch.no_grad()
@pytest.mark.parametrize("shape", EVA_SHAPES)
def test_pixclip_of_other_shapes(shape, tmp_path):
    state = eva_checkpoint(**EVA_SHAPES[shape])
    stored = {f"module.{name}": tensor for name, tensor in state.items()}
    stored |= {"module.l2v.model.norm.weight": random(9), "module.l2v.model.layers.0.mlp.weight": random(9, 9)}
    path = tmp_path / "model.pth"
    torch.save({"epoch": 3, "state_dict": stored, "optimizer": {}}, path)
    options = EVA_OPTIONS.get(shape, {})
    report = convert("pixclip", path, tmp_path / "out", text_model_name="org/llm", **options)
    model = AutoModel.from_pretrained(tmp_path / "out")
    everything_accounted(report, stored, model.state_dict())
    assert report["prefix"] == "module." and report["beside"] == ["epoch", "optimizer"]
    assert report["sources"]["l2v.model.norm.weight"]["targets"] == [] and model.config.text_model_name == "org/llm"
    side = model.config.vision_config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(1)) > 0.5
    tables = EVA_SHAPES[shape].get("tables")
    heads = tables or options.get("head_width", 64)
    assumed = [note for note in report["notes"] if f"attention heads {heads} channels wide" in note]
    assert len(assumed) == (tables is None)
    expected, tokens = eva_image_features(state, pixels, mask, heads)
    found = model.get_region_features(pixels, mask)
    close(found.pooler_output[:, 0], expected)
    close(model.vision_model.post_layernorm(found.last_hidden_state[:, 1:]), tokens)
    plain, _ = eva_image_features(state, pixels, None, heads)
    close(model.get_image_features(pixels, use_mask=False).pooler_output, plain)
    different(plain, expected)
    different(expected, eva_image_features(state, pixels, mask, heads, rope_grid=15)[0])
    states = random(4, 24, scale=3.0)
    close(model.get_text_features(text_states=states).pooler_output, eva_text_features(state, states))
    assert torch.equal(model.logit_scale.log_scale, state["logit_scale"])


CLIPS = [
    ("clip", "quick_gelu", {}),
    ("clip", "gelu", {"activation": "gelu"}),
    ("clip", "quick_gelu", {"head_width": 12, "text_head_width": 20}),
    ("open-clip", "gelu", {}),
    ("open-clip", "quick_gelu", {"activation": "quick_gelu"}),
    ("alpha-clip", "quick_gelu", {"head_width": 32}),
]


@torch.no_grad()
@pytest.mark.parametrize(("source", "activation", "options"), CLIPS)
def test_clips_of_other_shapes(source, activation, options, tmp_path):
    widths = {name: options.get(name, 64) for name in ("head_width", "text_head_width")}
    clip = build_clip(activation, **widths)
    masked = source == "alpha-clip"
    state = openai_state(clip, masked, "in_proj." if masked else "in_proj_")
    if source != "open-clip":
        state |= scalars(image_size=18)
    report = convert(source, save(state, tmp_path / "model.safetensors"), tmp_path / "out", **options)
    model = AutoModel.from_pretrained(tmp_path / "out")
    everything_accounted(report, state, model.state_dict())
    pixels = torch.randn(2, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 18, 18, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = clip.get_image_features(pixels).pooler_output
    close(model.get_image_features(pixels, use_mask=False).pooler_output, expected)
    if masked:
        shown = alpha_image_features(clip, state, pixels, mask)
        different(shown, expected)
        expected = shown
    close(model.get_region_features(pixels, mask).pooler_output[:, 0], expected)
    ids = torch.randint(0, 58, (3, 9), generator=torch.Generator().manual_seed(2))
    ids[0, 4], ids[1, 8], ids[2, 1] = 59, 59, 59
    expected = clip.get_text_features(ids).pooler_output
    close(model.get_text_features(ids).pooler_output, expected)
    # Padding behind the end token, marked as such.
    shown = (torch.arange(9) <= torch.tensor([[4], [8], [1]])).long()
    close(model.get_text_features(ids, shown).pooler_output, expected)
    assert model.logit_scale.log_scale == clip.logit_scale
    assert any(activation in note for note in report["notes"])


@torch.no_grad()
@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "part"])
def test_compiled_models(wrapped, tmp_path):
    """`torch.compile` of the model, behind data parallelism or before it, or of a part of it."""
    clip = build_clip()
    state = openai_state(clip)
    if wrapped == "part":
        stored = {name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()}
    else:
        stored = {wrapped + name: value for name, value in state.items()}
    report = convert("clip", save(stored, tmp_path / "model.safetensors"), tmp_path / "out")
    everything_accounted(report, state, AutoModel.from_pretrained(tmp_path / "out").state_dict())
    assert report["prefix"] == ("" if wrapped == "part" else wrapped)
    twice = stored | {"visual.proj": state["visual.proj"].clone()}
    if wrapped == "part":
        with pytest.raises(ValueError, match="holds 'visual.proj' twice"):
            convert("clip", save(twice, tmp_path / "twice.safetensors"), tmp_path / "other")


@torch.no_grad()
@pytest.mark.parametrize("source", ["clip", "alpha-clip", "laid over"])
def test_long_clip_has_two_tables_of_positions(source, tmp_path):
    """The sum of both under their masks (Long-CLIP's `encode_text`), for texts that end in either part."""
    clip = build_clip(positions=30)
    state = openai_state(clip, mask=source != "clip")
    second = random(*state["positional_embedding"].shape, seed=77)
    given = state | {"positional_embedding_res": second}
    options = {}
    if source == "laid over":
        own = {name: value for name, value in given.items() if name != "visual.conv1_alpha.weight"}
        options["clip"] = save(own, tmp_path / "long.safetensors")
        given = {
            name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")
        }  # fmt: skip
    kind = "clip" if source == "clip" else "alpha-clip"
    report = convert(kind, save(given, tmp_path / "model.safetensors"), tmp_path / "out", **options)
    joined = [entry["how"] for name, entry in report["sources"].items() if "positional_embedding_res" in name]
    assert len(joined) == 1 and "from 20 on" in joined[0] and any("Long-CLIP" in note for note in report["notes"])
    model = AutoModel.from_pretrained(tmp_path / "out")
    first = clip.text_model.embeddings.position_embedding.weight
    plain = clip.get_text_features(ids := torch.randint(0, 58, (3, 30), generator=torch.Generator().manual_seed(2)))
    early = (torch.arange(30) < 20)[:, None].float()
    first.copy_(first * early + second * (1 - early))
    ids[0, 5:], ids[1, 19:], ids[2, 28:] = 59, 59, 59
    shown = (torch.arange(30) <= torch.tensor([[5], [19], [28]])).long()
    expected = clip.get_text_features(ids).pooler_output
    close(model.get_text_features(ids, shown).pooler_output, expected)
    different(plain.pooler_output[2], expected[2])


def test_long_clips_tables_must_fit(tmp_path):
    state = openai_state(build_clip(positions=30)) | {"positional_embedding_res": random(29, 128)}
    with pytest.raises(ValueError, match=r"must have one shape.*got \(30, 128\) and \(29, 128\)"):
        convert("clip", save(state, tmp_path / "model.safetensors"), tmp_path / "out")


@torch.no_grad()
def test_the_settings_of_open_clip_beside_its_weights(tmp_path):
    clip = build_clip("quick_gelu", head_width=40, text_head_width=32)
    path = save(openai_state(clip), tmp_path / "open_clip_model.safetensors")
    settings = {
        "model_cfg": {
            "embed_dim": 20,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 18, "layers": 3, "width": 80, "patch_size": 6, "head_width": 40},
            "text_cfg": {"context_length": 13, "vocab_size": 60, "width": 64, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]},
    }
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps(settings))
    convert("open-clip", path, tmp_path / "out")
    model, processor = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModel, AutoProcessor))
    pixels = torch.randn(2, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    close(model.get_image_features(pixels).pooler_output, clip.get_image_features(pixels).pooler_output)
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_processor.image_std) == [0.3, 0.2, 0.1]
    with pytest.raises(ValueError, match="open_clip_config.json.*'open-clip'"):
        convert("clip", path, tmp_path / "clip")
    for part, name, value in (("vision_cfg", "layers", 4), ("text_cfg", "vocab_size", 61)):
        changed = json.loads(json.dumps(settings))
        changed["model_cfg"][part][name] = value
        beside.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{name} {value}, the weights say {value - 1}"):
            convert("open-clip", path, tmp_path / "again")
    settings["model_cfg"]["text_cfg"]["pool_type"] = "last"
    beside.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="text_cfg has settings of another architecture: pool_type"):
        convert("open-clip", path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@torch.no_grad()
def test_the_heads_that_open_clip_takes_where_its_settings_name_none(tmp_path):
    clip = build_clip("gelu", text_heads=8, text_head_width=16)
    path = save(openai_state(clip), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"width": 128}}}))
    convert("open-clip", path, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 8, 5, 59]])
    found = model.get_text_features(ids).pooler_output
    close(found, clip.get_text_features(ids).pooler_output)
    # The same weights with two heads of 64.
    different(found, build_clip("gelu").get_text_features(ids).pooler_output)


@pytest.mark.parametrize(("wide", "laid_over"), [(12, 12), (12, 6)])
def test_a_visual_half_needs_its_own_clip(wide, laid_over, tmp_path):
    state = openai_state(build_clip(image_size=36, patch_size=wide), mask=True)
    visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    checkpoint = save(visual, tmp_path / "visual.pth")
    openai = openai_state(build_clip(image_size=36, patch_size=laid_over)) | scalars(image_size=36)
    clip = save(openai, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="`clip` must name the CLIP"):
        convert("alpha-clip", checkpoint, tmp_path / "out")
    if wide != laid_over:
        with pytest.raises(ValueError, match="is not the CLIP that the visual half was trained from"):
            convert("alpha-clip", checkpoint, tmp_path / "out", clip=clip)
        assert not (tmp_path / "out").exists()
    else:
        report = convert("alpha-clip", checkpoint, tmp_path / "out", clip=clip)
        assert report["sources"]["clip:context_length"]["how"] == "checked: 13"
        other = save(openai | {"context_length": torch.tensor(14)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="'context_length' of the checkpoint says 14, its weights say 13"):
            convert("alpha-clip", checkpoint, tmp_path / "again", clip=other)
    full = save(state, tmp_path / "full.pt")
    with pytest.raises(ValueError, match="the checkpoint is a full Alpha-CLIP"):
        convert("alpha-clip", full, tmp_path / "again", clip=clip)
    (tmp_path / "open_clip_config.json").write_text("{}")
    for path, options in ((checkpoint, {"clip": clip}), (full, {})):
        with pytest.raises(ValueError, match="open_clip_config.json lies beside .*(clip|full).pt'.*'open-clip' alone"):
            convert("alpha-clip", path, tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()


# The language model, the processor, the pipelines


@torch.no_grad()
def test_the_language_model_is_attached(tmp_path, picture):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = LlamaModel(LlamaConfig(vocab_size=259, max_position_embeddings=600, num_key_value_heads=2, **sizes)).eval()
    llm.save_pretrained(tmp_path / "llm")
    path = save(eva_checkpoint(tables=32), tmp_path / "pixclip.pt")
    report = convert("pixclip", path, tmp_path / "bare", text_model=str(tmp_path / "llm"))
    assert any("no tokenizer" in note for note in report["notes"])
    build_tokenizer().save_pretrained(tmp_path / "llm")
    convert("pixclip", path, tmp_path / "out", text_model=str(tmp_path / "llm"))
    model, processor = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModel, AutoProcessor))
    everything_accounted(report, {}, model.state_dict())
    assert processor.tokenizer.model_max_length == 128 and model.config.bidirectional
    inputs = processor(text=["a short text", "another text, which is longer"], return_tensors="pt")
    for row in range(2):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        # Without a causal mask: every position attends to all.
        visible = torch.zeros(1, 1, len(ids), len(ids))
        states = llm(input_ids=ids[None], attention_mask=visible).last_hidden_state.mean(1)
        expected = eva_text_features(eva_checkpoint(tables=32), states)
        found = model.get_text_features(**inputs).pooler_output[row : row + 1]
        close(found, expected)
        different(
            eva_text_features(eva_checkpoint(tables=32), llm(input_ids=ids[None]).last_hidden_state.mean(1)), found
        )
    labels = ["a dark corner", "a bright corner"]
    found = pipeline("zero-shot-region-classification", model=str(tmp_path / "out"), device="cpu")(
        picture, boxes=[[2, 3, 20, 18]], candidate_labels=labels
    )
    assert set(found[0]["labels"]) == set(labels)
    LlamaModel(LlamaConfig(vocab_size=259, **sizes | {"hidden_size": 32})).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="`text_model`.*32 wide, the adaptor takes 24"):
        convert("pixclip", path, tmp_path / "no", text_model=str(tmp_path / "wide"))
    assert not (tmp_path / "no").exists()


@torch.no_grad()
def test_both_pipelines_load_what_was_converted(tmp_path, picture):
    boxes, labels = [[2, 3, 20, 18], [25, 1, 39, 29]], ["dark", "bright"]
    pixclip = save(eva_checkpoint(), tmp_path / "pixclip.pt")
    convert("pixclip", pixclip, tmp_path / "pixclip")
    clip = save(openai_state(build_clip(vocabulary=259)), tmp_path / "clip.pt")
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    convert("clip", clip, tmp_path / "clip", tokenizer=tmp_path / "tokenizer")
    for name, options in (("pixclip", {"text_states": random(2, 24)}), ("clip", {})):
        folder = str(tmp_path / name)
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        side = model.config.vision_config.image_size
        assert processor.image_processor.size == {"height": side, "width": side}
        inputs = processor(images=picture, boxes=boxes, return_tensors="pt")
        expected = model.get_region_features(**inputs).pooler_output[0]
        features = pipeline("region-feature-extraction", model=folder, device="cpu")(
            picture, boxes=boxes, return_tensors=True, normalize=False
        )
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        classify = pipeline("zero-shot-region-classification", model=folder, device="cpu")
        found = classify(picture, boxes=boxes, candidate_labels=labels, **options)
        assert [set(region["labels"]) for region in found] == [set(labels)] * 2
    processor = AutoProcessor.from_pretrained(tmp_path / "pixclip")
    with pytest.raises(ValueError, match="LLM2CLIP"):
        processor(text="a text")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for vocabulary, message in (
        (60, "has 259 tokens, the text tower knows 60"),
        (300, "token 258.*pools at token 299"),
    ):
        path = save(openai_state(build_clip(vocabulary=vocabulary)), tmp_path / "clip.pt")
        with pytest.raises(ValueError, match=message):
            convert("clip", path, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
        assert not (tmp_path / "out").exists()
    path = save(eva_checkpoint(), tmp_path / "pixclip.pt")
    with pytest.raises(ValueError, match="`tokenizer`.*needs a text tower"):
        convert("pixclip", path, tmp_path / "out", tokenizer=tmp_path / "tokenizer")


def test_openai_merges_make_a_tokenizer(tmp_path, monkeypatch):
    merges = ["#version: 0.2", "l o", "lo w</w>", "e r</w>", "never used"]
    path = tmp_path / tokenizers.MERGES
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(merges))
    vocabulary = 2 * 256 + 3 + 2
    checkpoint = save(openai_state(build_clip(vocabulary=vocabulary)), tmp_path / "clip.pt")
    # "!" is OpenAI's first letter, "a" is 64 later; letters that end a word follow 256 later, then the merges.
    expected = [515, 513, 512 + 2, 64 + 256, 516]
    convert("clip", checkpoint, tmp_path / "out", tokenizer=path)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    texts = processor(text="Low er A")["input_ids"].tolist()
    assert texts == [expected] and processor.tokenizer.model_max_length == 13
    assert tokenizers.find_merges() is None or tokenizers.find_merges().name == tokenizers.MERGES
    monkeypatch.setattr("pixclip_hf.conversion.convert.find_merges", lambda: path)
    monkeypatch.setattr("pixclip_hf.conversion.convert.OPENAI_VOCABULARY", vocabulary)
    report = convert("clip", checkpoint, tmp_path / "found")
    assert AutoProcessor.from_pretrained(tmp_path / "found")(text="Low er A")["input_ids"].tolist() == texts
    assert any(str(path) in note for note in report["notes"])
    monkeypatch.setattr("pixclip_hf.conversion.convert.find_merges", lambda: None)
    report = convert("clip", checkpoint, tmp_path / "none")
    assert AutoProcessor.from_pretrained(tmp_path / "none").tokenizer is None
    assert any("has no tokenizer" in note for note in report["notes"])


# Precision, the report, the command


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["pixclip", "clip"])
def test_half_precision_is_kept_or_changed(source, dtype, tmp_path):
    state = eva_checkpoint(tables=32) if source == "pixclip" else openai_state(build_clip())
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = save(half, tmp_path / "model.pt")
    name = str(dtype).removeprefix("torch.")
    assert convert(source, path, tmp_path / "kept")["dtype"] == name
    assert convert(source, path, tmp_path / "changed", dtype="float32")["dtype"] == "float32"
    kept = AutoModel.from_pretrained(tmp_path / "kept")
    changed = AutoModel.from_pretrained(tmp_path / "changed")
    assert {t.dtype for t in kept.parameters()} == {dtype} and kept.config.dtype == dtype
    assert {t.dtype for t in changed.parameters()} == {torch.float32}
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor.float(), changed.state_dict()[name])
    # Matrices in half precision and norms in full, as OpenAI's own files: nothing is lost.
    mixed = {name: t.to(dtype) if t.ndim > 1 and "rope" not in name else t for name, t in state.items()}
    assert convert(source, save(mixed, tmp_path / "mixed.pt"), tmp_path / "mixed")["dtype"] == "float32"
    pixels = torch.randn(1, 3, *[kept.config.vision_config.image_size] * 2, generator=torch.Generator().manual_seed(0))
    expected = changed.get_image_features(pixels).pooler_output
    found = kept.get_image_features(pixels.to(dtype)).pooler_output.float()
    assert torch.cosine_similarity(found, expected).min() > 0.99


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path):
    state = openai_state(build_clip())
    state["visual.proj"][0, 0] = 1e6
    path = save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="visual.proj.*too large for torch.float16"):
        convert("clip", path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_and_saves_its_report(tmp_path, capsys):
    state = eva_checkpoint()
    path = save(state, tmp_path / "pixclip.safetensors")
    assert main(["pixclip", str(path), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert set(report["sources"]) == set(state) and "name its language model" in printed
    lines = [line.split() for line in printed.splitlines() if line]
    for name, entry in report["sources"].items():
        assert [name, "->", *", ".join(entry["targets"]).split()] in [
            line[: 2 + len(entry["targets"])] for line in lines
        ]
    for name, entry in report["targets"].items():
        assert [name, "<-", entry["source"]] in [line[:3] for line in lines]
    assert main(["pixclip", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "new or empty folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pixclip.safetensors"]
    with pytest.raises(SystemExit):
        main(["pixclip", str(path), "--output", str(tmp_path / "no"), "--activation", "gelu"])
