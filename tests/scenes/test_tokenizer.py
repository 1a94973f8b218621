import pytest
from transformers import AutoTokenizer

from pixclip_hf.scenes import tokenizer as module
from pixclip_hf.scenes.dataset import all_descriptions, late_detail_pairs, make_scene
from pixclip_hf.scenes.tokenizer import scenes_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return scenes_tokenizer()


def test_every_text_stands_between_bos_and_eos(tokenizer):
    ids = tokenizer("a striped red star")["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<bos>", "<eos>"]
    assert tokenizer.bos_token_id not in ids[1:] and tokenizer.eos_token_id not in ids[:-1]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_padding_is_on_the_right_and_masked(tokenizer):
    batch = tokenizer(["a star", "a striped red star and a plain disc"], padding=True)
    short = batch["input_ids"][0]
    kept = sum(batch["attention_mask"][0])
    assert batch["attention_mask"][0] == [1] * kept + [0] * (len(short) - kept) and kept < len(short)
    assert set(short[kept:]) == {tokenizer.pad_token_id}


@pytest.mark.parametrize("text", ["日本語 und Umlaute äöü", "🦊🦊", "a\tb\nc\x00", "\u202e‮ zero​width", "ﬁ ½ é"])
def test_any_text_has_tokens_and_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert None not in ids and len(ids) > 2
    assert tokenizer.unk_token is None
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_label_reads_like_part_of_a_caption(tokenizer):
    inside = tokenizer("There is a striped red star.")["input_ids"]
    label = tokenizer("a striped red star")["input_ids"][1:-1]
    assert any(inside[i : i + len(label)] == label for i in range(len(inside)))


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = ["a striped red star", "日本語", make_scene(0, "test")["regions"][0]["long_caption"]]
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)):
        assert loaded(texts, padding=True)["input_ids"] == tokenizer(texts, padding=True)["input_ids"]
        assert (loaded.model_max_length, loaded.padding_side) == (256, "right")
        assert loaded.decode(loaded(texts[1])["input_ids"], skip_special_tokens=True) == texts[1]


def test_truncates_at_model_max_length():
    tokenizer = train_tokenizer(["a star"], vocab_size=300, model_max_length=8)
    ids = tokenizer("a star " * 20, truncation=True)["input_ids"]
    assert len(ids) == 8 and ids[-1] == tokenizer.eos_token_id


def test_training_is_deterministic_and_seeds_differ():
    first = scenes_tokenizer(1)
    module._trained.cache_clear()
    assert scenes_tokenizer(1).get_vocab() == first.get_vocab()
    assert scenes_tokenizer(1).get_vocab() != scenes_tokenizer(2).get_vocab()


def test_each_call_gives_a_tokenizer_of_its_own():
    first, second = scenes_tokenizer(1), scenes_tokenizer(1)
    first.model_max_length, first.padding_side = 5, "left"
    first.add_tokens(["zzzz"])
    third = scenes_tokenizer(1)
    for other in (second, third):
        assert other.model_max_length == 256 and other.padding_side == "right" and len(other) == len(first) - 1
    assert second("a zzzz star")["input_ids"] == third("a zzzz star")["input_ids"]


@pytest.mark.parametrize("setting", ["default", "hard"])
def test_long_captions_reach_past_77_tokens_and_fit(tokenizer, setting):
    lengths, firsts = [], []
    for index in range(200):
        record = make_scene(index, "test", seed=5, setting=setting)
        ids = [tokenizer(region["long_caption"])["input_ids"] for region in record["regions"]]
        lengths += [len(item) for item in ids]
        for i, j in late_detail_pairs(record):
            firsts.append(next(k for k, (a, b) in enumerate(zip(ids[i], ids[j], strict=False)) if a != b))
    assert min(lengths) > 77 and max(lengths) <= 170
    assert len(firsts) > 40 and min(firsts) > 77


def test_descriptions_are_one_token_a_word(tokenizer):
    assert {len(tokenizer(text)["input_ids"]) for text in all_descriptions()} == {6}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": []}, ValueError, "`texts` must hold at least one text"),
        ({"texts": "a star"}, TypeError, "`texts` must be an iterable of str, got one str"),
        ({"texts": ["a", 3]}, TypeError, r"`texts\[1\]` must be a str, got int"),
        ({"texts": ["a"], "vocab_size": 258}, ValueError, "`vocab_size` must be at least 259, got 258"),
        ({"texts": ["a"], "model_max_length": 2}, ValueError, "`model_max_length` must be at least 3, got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(**arguments)
