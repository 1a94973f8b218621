"""Text towers: pooling against loops, and embeddings that know nothing of padding or batch mates."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import EOS, TEXT_KINDS, build_batch, build_config, build_model, build_texts, shake, text_tower_config
from transformers import AutoModel, CLIPTextModel
from transformers.cache_utils import Cache

from pixclip_hf.modeling.configuration_region_text import TEXT_POOLINGS
from pixclip_hf.modeling.modeling_region_text import region_text_features
from pixclip_hf.modeling.modeling_text import (
    LogitScale,
    MLPAdapter,
    build_text_model,
    encode_text,
    pool_states,
    right_pad,
    set_bidirectional,
)

POOLINGS = [pooling for pooling in TEXT_POOLINGS if pooling != "tower"]
TOWERS = (*TEXT_KINDS, "llama_bidirectional")


def build_tower(kind, **changes):
    torch.manual_seed(0)
    tower = shake(AutoModel.from_config(text_tower_config(kind.split("_bidirectional")[0], **changes)).eval())
    if kind.endswith("bidirectional"):
        set_bidirectional(tower)
    return tower


def pool_by_loops(states, mask, pooling, ids, eos):
    rows = []
    for state, real, tokens in zip(states, mask.tolist(), ids.tolist(), strict=True):
        places = [i for i, flag in enumerate(real) if flag]
        ends = [i for i in places if tokens[i] in eos]
        if pooling == "mean":
            rows.append(sum(state[i] for i in places) / len(places))
        elif pooling == "cls":
            rows.append(state[places[0]])
        elif pooling == "eos" and ends:
            rows.append(state[ends[0]])
        else:
            rows.append(state[places[-1]])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_loops(pooling):
    states = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[5, 9, 9, 9, 9, 9], [5, 6, 7, 9, 6, 0], [5, 6, 0, 0, 9, 9], [4, 0, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    pooled = pool_states(states, mask, pooling, ids == 9)
    expected = pool_by_loops(states, mask, pooling, ids, {9})
    torch.testing.assert_close(pooled, expected)
    got, wanted = (torch.autograd.grad(rows.pow(2).sum(), states)[0] for rows in (pooled, expected))
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted)


def test_right_pad_keeps_the_order():
    ids = torch.tensor([[7, 8, 5, 6], [5, 7, 6, 7], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
    moved, moved_mask = right_pad(ids, mask)
    for row, moved_row, real in zip(ids.tolist(), moved.tolist(), mask.tolist(), strict=True):
        kept = [token for token, flag in zip(row, real, strict=True) if flag]
        assert moved_row[: len(kept)] == kept and sorted(moved_row) == sorted(row)
    assert moved_mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", TOWERS)
def test_an_embedding_depends_on_its_text_alone(kind, pooling):
    tower = build_tower(kind)
    ids, mask = build_texts(5, length=9)
    # The tower itself sees each text without any padding.
    states = [
        tower(input_ids=row[real.bool()][None]).last_hidden_state[0] for row, real in zip(ids, mask, strict=True)
    ]
    expected = torch.stack(
        [
            pool_by_loops(state[None], torch.ones(1, len(state)), pooling, row[real.bool()][None], {EOS})[0]
            for state, row, real in zip(states, ids, mask, strict=True)
        ]
    )
    assert torch.pdist(expected).max() > 0.01
    for padding, extra in (("right", 0), ("left", 0), ("right", 6), ("left", 6)):
        padded_ids, padded_mask = build_texts(5, length=9, padding=padding)
        filler = torch.full((5, extra), 7)
        columns = (padded_ids, filler) if padding == "right" else (filler, padded_ids)
        mask_columns = (padded_mask, filler * 0) if padding == "right" else (filler * 0, padded_mask)
        for rows in (slice(None), slice(1, 2)):
            pooled = encode_text(tower, torch.cat(columns, 1)[rows], torch.cat(mask_columns, 1)[rows], pooling)
            torch.testing.assert_close(pooled.pooler_output, expected[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("asked", [{}, {"use_cache": True}, {"use_cache": False}], ids=["not asked", "true", "false"])
def test_no_key_value_cache_is_built(kind, asked, monkeypatch):
    built = []
    initialize = Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda *args, **kwargs: (built.append(kind), initialize(*args, **kwargs))[1]
    )
    ids, mask = build_texts(2)
    # A tower of a fresh configuration caches by default: what this test would miss otherwise.
    tower = build_tower(kind)
    tower(input_ids=ids, attention_mask=mask)
    assert bool(built) == (kind == "llama")
    built.clear()
    model = build_model("cloc", "clip", kind)
    features = model.get_text_features(ids, mask, **asked).pooler_output
    batch = build_batch("cloc", counts=(1, 1))
    output = model(**batch, **asked)
    assert not built
    assert torch.equal(features, model.get_text_features(ids, mask).pooler_output)
    assert torch.equal(output.loss, model(**batch).loss)


@pytest.mark.parametrize("eos", [EOS, 2])
def test_eos_pooling_is_that_of_clip(eos):
    tower = build_tower("clip_text", eos_token_id=eos)
    ids, mask = build_texts(5)
    # What CLIP's tokenizer gives: padding repeats the end-of-sequence token, the largest id.
    ids[mask == 0] = EOS
    ids[0, 1] = 2
    expected = tower(input_ids=ids, attention_mask=mask).pooler_output
    assert isinstance(tower, CLIPTextModel)
    if eos == 2:
        # The first token with id 2 is not the end of the text.
        assert (expected[0] - tower(input_ids=ids).last_hidden_state[0, 1]).abs().max() > 0.01
    else:
        ids[0, 1] = 3
        expected = tower(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(encode_text(tower, ids, mask, "eos").pooler_output, expected, atol=1e-5, rtol=1e-5)


def test_eos_may_be_several_ids_or_none():
    ids, mask = torch.tensor([[5, 8, 6, 9, 6]]), torch.ones(1, 5, dtype=torch.long)
    for eos, place in (([9, 8], 1), ([9], 3), (9, 3), (None, 4)):
        tower = build_tower("llama", eos_token_id=eos)
        outputs = encode_text(tower, ids, mask, "eos")
        torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, place])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bidirectional_lets_early_tokens_see_late_ones(attention):
    ids, _ = build_texts(1)
    other = ids.clone()
    other[0, -1] += 1
    for kind in ("llama", "llama_bidirectional"):
        tower = build_tower(kind)
        tower.set_attn_implementation(attention)
        early = [tower(input_ids=text).last_hidden_state[0, 0] for text in (ids, other)]
        difference = (early[0] - early[1]).abs().max()
        assert difference == 0 if kind == "llama" else difference > 1e-3


def test_bidirectional_survives_saving(tmp_path):
    model = build_model("pixclip", text="llama", bidirectional=True)
    ids, mask = build_texts(3)
    expected = model.get_text_features(ids, mask).pooler_output
    causal = build_model("pixclip", text="llama")
    assert (causal.get_text_features(ids, mask).pooler_output - expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.bidirectional and loaded.text_model.config.is_causal is False
    assert torch.equal(loaded.get_text_features(ids, mask).pooler_output, expected)


@pytest.mark.parametrize("kind", ["bert", "clip_text"])
def test_bidirectional_needs_a_decoder(kind):
    with pytest.raises(ValueError, match="bidirectional.*decoder"):
        build_text_model(build_config("pixclip", text=kind, bidirectional=True))


def test_without_mask_every_token_is_real():
    tower = build_tower("llama")
    ids, _ = build_texts(3)
    torch.testing.assert_close(
        encode_text(tower, ids, None, "mean").pooler_output, tower(input_ids=ids).last_hidden_state.mean(1)
    )


def test_mlp_adapter_equals_its_formula():
    torch.manual_seed(0)
    adapter = shake(MLPAdapter(6, 4)).double()
    states = torch.randn(3, 6, dtype=torch.float64)

    def norm(x, layer):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * layer.weight + layer.bias

    def row(x):
        x = x / math.sqrt(sum(v * v for v in x.tolist()))
        for block in adapter.blocks:
            hidden = block.fc1.weight @ norm(x, block.norm) + block.fc1.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + block.fc2.weight @ hidden + block.fc2.bias
        return adapter.projection.weight @ norm(x, adapter.norm) + adapter.projection.bias

    assert len(adapter.blocks) == 4 and adapter.blocks[0].fc1.out_features == 12
    expected = torch.stack([row(x) for x in states])
    torch.testing.assert_close(adapter(states), expected)
    torch.testing.assert_close(adapter(7 * states), expected)


def test_logit_scale_stops_at_100():
    torch.testing.assert_close(LogitScale(2.0)().item(), math.exp(2), rtol=1e-6, atol=0)
    for start in (math.log(100), 9.0):
        scale = LogitScale(start)
        value = scale()
        torch.testing.assert_close(value.item(), 100.0, rtol=1e-6, atol=0)
        # It can come back: the gradient is that of 100.
        value.backward()
        torch.testing.assert_close(scale.log_scale.grad.item(), 100.0, rtol=1e-6, atol=0)


def test_means_of_half_precision_do_not_overflow():
    states = torch.full((1, 512, 2), 150.0, dtype=torch.float16)
    pooled = pool_states(states, torch.ones(1, 512, dtype=torch.long), "mean")
    assert pooled.dtype == torch.float16 and (pooled == 150).all()


@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_states_take_the_place_of_the_tower(family, tmp_path):
    full = build_model(family, text="llama")
    ids, mask = build_texts(3)
    states = encode_text(full.text_model, ids, mask, full.config.text_pooling).pooler_output
    expected = full.get_text_features(ids, mask).pooler_output
    assert torch.equal(full.get_text_features(text_states=states).pooler_output, expected)
    full.save_pretrained(tmp_path)
    config = build_config(family, text=None, text_model_name="some/llm")
    bare, info = type(full).from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert bare.text_model is None and not info["missing_keys"]
    assert torch.equal(bare.get_text_features(text_states=states).pooler_output, expected)
    with pytest.raises(ValueError, match="some/llm.*text_states"):
        bare.get_text_features(ids, mask)
    bare.save_pretrained(tmp_path / "bare")
    again = type(full).from_pretrained(tmp_path / "bare")
    assert again.text_model is None and again.config.text_config is None
    assert torch.equal(again.get_text_features(text_states=states).pooler_output, expected)


def test_text_arguments_are_checked():
    model = build_model("pixclip")
    ids, mask = build_texts(2)
    with pytest.raises(ValueError, match="input_ids.*text_states.*both"):
        model.get_text_features(ids, mask, text_states=torch.zeros(2, 24))
    with pytest.raises(ValueError, match="input_ids.*text_states.*neither"):
        model.get_text_features()
    with pytest.raises(ValueError, match=r"text_states.*24.*\(2, 7\)"):
        model.get_text_features(text_states=torch.zeros(2, 7))


def test_linear_projection_is_linear():
    model = build_model("cloc", text_projection="linear")
    states = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(
        model.get_text_features(text_states=states).pooler_output, states @ model.text_projection.weight.T
    )


@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_what_no_text_tower_takes_is_refused(family):
    """A misspelt mask would let padding count as text."""
    model = build_model(family, text="llama")
    ids, mask = build_texts(3)
    with pytest.raises(TypeError, match="Unknown arguments: attention_msk"):
        model.get_text_features(ids, attention_msk=mask)


@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_region_texts_come_as_tokens_or_states(family):
    model = build_model(family, text="llama")
    real, (ids, mask) = torch.ones(1, 3, dtype=torch.bool), build_texts(3)
    states = torch.zeros(1, 3, model.config.text_hidden_size)
    with pytest.raises(ValueError, match="`region_input_ids` and `region_text_states` must be given, got both"):
        region_text_features(model, real, ids[None], mask[None], states)
