"""Cached states equal the LLM's own, are computed once, belong to one key, and survive a kill."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

import pixclip_hf
from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.modeling.modeling_text import encode_text, set_bidirectional
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset
from pixclip_hf.training import text_cache
from pixclip_hf.training.text_cache import TextEmbeddingCache

TEXTS = ["a red disc", "a striped blue star in the upper left part", "two rings", "a red disc", "é" * 9]


def save_llm(folder, tokenizer, seed=0, width=24, **changes):
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    model = LlamaModel(LlamaConfig(hidden_size=width, vocab_size=259, eos_token_id=258, **sizes, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llm(tmp_path, tiny_tokenizer):
    return save_llm(tmp_path / "llm", tiny_tokenizer)


@pytest.fixture
def loads(monkeypatch):
    """Counts how often an LLM is loaded."""
    count = []
    original = text_cache.load_text_model

    def load(*args, **kwargs):
        count.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(text_cache, "load_text_model", load)
    return count


def alone(llm, text, pooling, bidirectional, max_length):
    """State of one text, by the LLM itself, without padding."""
    model, tokenizer = LlamaModel.from_pretrained(llm).eval(), AutoTokenizer.from_pretrained(llm)
    if bidirectional:
        set_bidirectional(model)
    ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt").input_ids
    states = model(input_ids=ids).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize(
    ("pooling", "bidirectional", "max_length"), [("mean", False, 100), ("mean", True, 12), ("last", False, 100)]
)
@torch.no_grad()
def test_states_are_those_of_the_llm(pooling, bidirectional, max_length, llm, tmp_path):
    settings = {"pooling": pooling, "bidirectional": bidirectional, "max_length": max_length}
    cache = TextEmbeddingCache(tmp_path / "cache", llm, **settings)
    assert cache.fill(TEXTS, batch_size=2, texts_per_file=3) == len(cache) == 4
    states = cache.states(TEXTS)
    assert states.shape == (5, 24) and states.dtype == torch.float32 and cache.width == 24
    expected = torch.stack([alone(llm, text, **settings) for text in TEXTS])
    assert torch.pdist(expected[:3]).min() > 0.05
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(states[0], states[3])
    assert "two rings" in cache and "three rings" not in cache
    assert cache.states([]).shape == (0, 24)


def test_the_llm_is_loaded_for_new_texts_alone(llm, tmp_path, loads):
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    cache.fill(TEXTS)
    assert len(loads) == 1
    again = TextEmbeddingCache(tmp_path / "cache", llm)
    assert len(again) == 4 and again.fill(TEXTS) == 0 and len(loads) == 1
    assert torch.equal(again.states(TEXTS), cache.states(TEXTS))
    assert again.fill([*TEXTS, "a new text"]) == 1 and len(loads) == 2
    assert torch.equal(again.states(TEXTS), cache.states(TEXTS)) and len(again) == 5
    with pytest.raises(ValueError, match=r"1 of 2 texts are not in the text cache .* 'a new text'.*`fill`"):
        cache.states(["two rings", "a new text"])


@pytest.mark.parametrize(
    "changes", [{"pooling": "last"}, {"max_length": 30}, {"bidirectional": True}, {"dtype": torch.bfloat16}]
)
def test_a_changed_key_computes_anew(changes, llm, tmp_path):
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    cache.fill(["a striped blue star in the upper left part"])
    other = TextEmbeddingCache(tmp_path / "cache", llm, **changes)
    assert len(other) == 0 and other.folder != cache.folder
    assert other.fill(["a striped blue star in the upper left part"]) == 1
    text = ["a striped blue star in the upper left part"]
    assert not torch.equal(other.states(text), cache.states(text))
    assert len(TextEmbeddingCache(tmp_path / "cache", llm)) == 1


def test_other_weights_or_tokens_are_another_model(llm, tiny_tokenizer, tmp_path):
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    cache.fill(TEXTS)
    save_llm(llm, tiny_tokenizer, seed=1)
    retrained = TextEmbeddingCache(tmp_path / "cache", llm)
    assert len(retrained) == 0
    retrained.fill(TEXTS)
    assert (retrained.states(TEXTS) - cache.states(TEXTS)).abs().max() > 0.1
    tiny_tokenizer.add_tokens(["disc"])
    tiny_tokenizer.save_pretrained(llm)
    assert len(TextEmbeddingCache(tmp_path / "cache", llm)) == 0


def test_states_of_another_model_are_refused(llm, tiny_tokenizer, tmp_path):
    """Whoever moves the files of one model to the place of another, or hands them to another model."""
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    cache.fill(TEXTS)
    other = save_llm(tmp_path / "other", tiny_tokenizer, seed=1)
    place = TextEmbeddingCache(tmp_path / "cache", other).folder
    cache.folder.rename(place)
    with pytest.raises(ValueError, match=rf"of another model: text_model_name '{llm}', not '{other}'; revision '"):
        TextEmbeddingCache(tmp_path / "cache", other)

    def config(**changes):
        given = {"text_config": None, "text_hidden_size": 24, "text_model_name": llm, "text_pooling": "mean"}
        return pixclip_hf.PixCLIPConfig(**given | changes)

    cache.check(config())
    cache.check(config(text_model_name=None))
    for changes, message in (
        ({"text_model_name": "a/b"}, f"text_model_name '{llm}', not 'a/b'"),
        (
            {"text_pooling": "eos", "text_hidden_size": 32},
            "text_pooling 'mean', not 'eos'; text_hidden_size 24, not 32",
        ),
        ({"bidirectional": True}, "bidirectional False, not True"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.check(config(**changes))


def test_goes_on_after_a_kill(llm, tmp_path, monkeypatch):
    """What was written whole counts; what was under way is computed again."""
    texts = [f"text number {i} of some length" + " and more" * (i % 3) for i in range(10)]
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    calls = []

    def kill(self, model, batch, encode=TextEmbeddingCache._encode):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TextEmbeddingCache, "_encode", kill)
        cache.fill(texts, batch_size=2, texts_per_file=4)
    again = TextEmbeddingCache(tmp_path / "cache", llm)
    assert len(again) == 4
    assert again.fill(texts, batch_size=2, texts_per_file=4) == 6 and len(again) == 10
    whole = TextEmbeddingCache(tmp_path / "whole", llm)
    whole.fill(texts)
    torch.testing.assert_close(again.states(texts), whole.states(texts), atol=1e-6, rtol=1e-5)
    assert json.loads((again.folder / "key.json").read_text()) == again.key


def test_ranks_share_the_texts(llm, tmp_path, monkeypatch):
    """Each text belongs to one rank, whatever another rank has written by then."""
    texts = [f"text {i}" for i in range(40)]

    class Rank:
        num_processes, device, is_local_main_process = 3, torch.device("cpu"), False

        def __init__(self, index):
            self.process_index = index

        def wait_for_everyone(self):
            pass

    shares = []
    for index in range(3):
        monkeypatch.setattr(text_cache, "PartialState", lambda index=index: Rank(index))
        shares.append(TextEmbeddingCache(tmp_path / "cache", llm).fill(texts))
    assert sum(shares) == 40 and min(shares) > 3
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    assert len(cache) == 40 and cache.states(texts).shape == (40, 24)


def test_bad_input(llm, tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="`pooling` must be one of .* got 'max'"):
        TextEmbeddingCache(tmp_path / "cache", llm, pooling="max")
    with pytest.raises(TypeError, match="`texts` must be str, got 3"):
        TextEmbeddingCache(tmp_path / "cache", llm).fill(["a", 3])
    tiny_tokenizer.model_max_length = int(1e30)
    tiny_tokenizer.save_pretrained(llm)
    with pytest.raises(ValueError, match="`max_length` must be a number of tokens"):
        TextEmbeddingCache(tmp_path / "cache", llm)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError)):
        TextEmbeddingCache(tmp_path / "cache", str(tmp_path / "empty"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
@torch.no_grad()
def test_a_batch_of_states_gives_what_tokens_give(family, llm, tmp_path, request):
    """The collator draws the same regions and captions; the losses of a model with the LLM agree."""
    processor = request.getfixturevalue(f"tiny_{family}")[1]
    config_class = type(request.getfixturevalue(f"tiny_{family}")[0].config)
    vision = request.getfixturevalue(f"tiny_{family}")[0].config.vision_config
    torch.manual_seed(0)
    llm_config = LlamaConfig.from_pretrained(llm)
    config = config_class(vision_config=vision, text_config=llm_config, text_pooling="mean", projection_dim=16)
    model = type(request.getfixturevalue(f"tiny_{family}")[0])(config).eval()
    model.text_model.load_state_dict(LlamaModel.from_pretrained(llm).state_dict())
    processor.tokenizer.model_max_length = 512
    cache = TextEmbeddingCache(tmp_path / "cache", llm, max_length=512)
    scenes = [make_scene(i, size=32) for i in range(4)]
    scenes[1] = {**scenes[1], "regions": scenes[1]["regions"][:1]}
    settings = {"regions_per_image": 3, "region_text": ("caption", "category"), "crops": family == "pixclip"}
    online = RegionCollator(processor, **settings)
    cached = RegionCollator(processor, text_cache=cache, **settings)
    cache.fill(cached.texts(scenes))
    tokens, states = online(scenes), cached(scenes)
    assert not {"input_ids", "region_input_ids"} & set(states)
    assert states["text_states"].shape == (4, 24) and states["region_text_states"].shape == (4, 3, 24)
    assert states["region_attention_mask"].tolist()[1] == [1, 0, 0]
    assert not states["region_text_states"][1, 1:].any() and states["region_text_states"][0].any(-1).all()
    expected, found = model(**tokens), model(**states)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.region_text_embeds, expected.region_text_embeds, atol=1e-4, rtol=1e-3)
    half = model.to(torch.bfloat16)(**{name: value.to(torch.bfloat16) if name == "pixel_values" else value
                                       for name, value in states.items()})  # fmt: skip
    assert torch.isfinite(half.loss)


def test_texts_of_records(tiny_cloc):
    """Every text that is drawn over many epochs, and no other."""
    records = scenes_dataset(3, size=32)
    collator = RegionCollator(
        tiny_cloc[1], region_text=("category", "long_caption"), image_captions=False, whole_image_share=0.5
    )
    drawn = set()

    class Everything:
        def states(self, texts):
            drawn.update(texts)
            return torch.zeros(len(texts), 4)

    collator.text_cache = Everything()
    for epoch in range(40):
        collator([{**record, "sample_key": (epoch, i)} for i, record in enumerate(records)])
    assert set(collator.texts(records)) == drawn
    regions = [region for record in records for region in record["regions"]]
    assert {f"a {region['category']}" for region in regions} < drawn
    assert {caption for record in records for caption in record["captions"]} < drawn
    lengths = [max(len(region["long_caption"]) for region in record["regions"]) for record in records]
    assert collator.text_lengths(records) == lengths


def test_encode_text_is_what_the_cache_runs(llm, tmp_path):
    """The states are not projected and not normalized."""
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    cache.fill(["a red disc"])
    inputs = AutoTokenizer.from_pretrained(llm)("a red disc", return_tensors="pt")
    with torch.no_grad():
        model = LlamaModel.from_pretrained(llm).eval()
        expected = encode_text(model, inputs.input_ids, inputs.attention_mask, "mean").pooler_output
    torch.testing.assert_close(cache.states(["a red disc"]), expected, atol=1e-6, rtol=1e-5)
    assert abs(expected.norm().item() - 1) > 0.1


@pytest.mark.parametrize("damage", ("cut", "flipped", "of an earlier version, cut"))
def test_damaged_files_are_named_and_computed_again(damage, llm, tmp_path, loads, caplog):
    cache = TextEmbeddingCache(tmp_path / "cache", llm, max_length=100)
    cache.fill(TEXTS, texts_per_file=2)
    states = cache.states(TEXTS)
    path = sorted(cache.folder.glob("*.arrow"))[0]
    content = path.read_bytes()
    # In front of the end of the stream lie the states of its last text.
    changed = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:] if damage == "flipped" else content[:-200]
    path.write_bytes(changed)
    if "earlier" in damage:
        path.with_suffix(".json").unlink()
    again = TextEmbeddingCache(tmp_path / "cache", llm, max_length=100)
    assert path.name in caplog.text and len(again) == 2
    assert again.fill(TEXTS) == 2 and torch.equal(again.states(TEXTS), states) and not path.exists()
    caplog.clear()
    assert len(TextEmbeddingCache(tmp_path / "cache", llm, max_length=100)) == 4 and not caplog.text


def test_a_file_is_compared_with_its_checksum_once(llm, tmp_path, monkeypatch):
    TextEmbeddingCache(tmp_path / "cache", llm).fill(TEXTS[:2])
    compared = []
    fault = text_cache._fault
    monkeypatch.setattr(text_cache, "_fault", lambda path: compared.append(path) or fault(path))
    cache = TextEmbeddingCache(tmp_path / "cache", llm)
    assert len(compared) == 1 and cache.fill(TEXTS[:2]) == 0 and len(compared) == 1
    assert cache.fill(TEXTS) == 2 and len(compared) == len(set(compared)) == 2 and len(cache) == 4
