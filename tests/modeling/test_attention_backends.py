"""Towers and Prompter follow the attention backend that is asked for."""

import builders
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KINDS = [("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")]
READOUTS = [{}, {"prompter_layer": "first"}, {"prompter_layer": "first", "region_readout": "mean"}]


def compare(model, batch):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        sdpa = model(**batch)
        model.set_attn_implementation("eager")
        eager = model(**batch)
    for name in ("region_embeds", "image_embeds", "text_embeds", "region_text_embeds", "pred_boxes"):
        if sdpa.get(name) is not None:
            torch.testing.assert_close(eager[name], sdpa[name], atol=2e-6, rtol=1e-4, msg=lambda t, n=name: n + t)
    torch.testing.assert_close(eager.loss, sdpa.loss)


@pytest.mark.parametrize("vision, text", KINDS)
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_eager_equals_sdpa(family, vision, text):
    compare(builders.build_model(family, vision, text), builders.build_batch(family))


@pytest.mark.parametrize("changes", READOUTS)
def test_eager_equals_sdpa_in_every_prompter(changes):
    compare(builders.build_model("cloc", **changes), builders.build_batch("cloc"))


@pytest.mark.parametrize("changes", READOUTS)
def test_the_prompter_follows_the_model(changes, monkeypatch):
    """Eager by its formula; any other backend is sdpa, since the prior is a bias."""
    model, batch = builders.build_model("cloc", **changes), builders.build_batch("cloc", region_texts=False)
    prompter, tokens, calls = model.prompter, torch.randn(3, 16, 32), []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs)
    )
    expected = prompter(tokens, (4, 4), boxes=batch["region_boxes"])
    for backend, count in (("sdpa", 1), ("eager", 0), ("flash_attention_2", 1), ("flex_attention", 1)):
        calls.clear()
        model.config._attn_implementation = backend
        torch.testing.assert_close(prompter(tokens, (4, 4), boxes=batch["region_boxes"]), expected)
        assert len(calls) == count, backend


@pytest.mark.parametrize("vision, text", KINDS)
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_towers_run_the_backend(family, vision, text, monkeypatch):
    """A backend of one's own, registered with transformers, serves every attention of the towers."""
    model, batch = builders.build_model(family, vision, text), builders.build_batch(family)
    expected = model(**batch)
    used = []

    def backend(module, *args, **kwargs):
        used.append(module)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa_of_a_test", backend)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa_of_a_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model.set_attn_implementation("sdpa_of_a_test")
    torch.testing.assert_close(model(**batch).loss, expected.loss)
    # Two layers per tower, each of them.
    assert len({id(module) for module in used}) == 4
