"""What a model tells `Trainer` of its loss, and the parameters that it adds for data parallelism."""

import inspect

import pytest
import torch
from builders import FAMILIES, MODELS, build_batch, build_model
from transformers import AutoModel
from transformers.utils.generic import can_return_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_returns_a_loss_and_the_argument_is_left_open(family):
    assert can_return_loss(MODELS[family])
    assert inspect.signature(MODELS[family].forward).parameters["return_loss"].default is True
    model = build_model(family)
    assert model(**build_batch(family)).loss is not None
    # More texts than images are no error where nobody asked for a loss.
    batch = build_batch(family, region_texts=False)
    batch["input_ids"], batch["attention_mask"] = (
        batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask")
    )
    assert model(**batch).loss is None


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize(("vision", "text"), [("siglip", "bert"), ("clip", "clip_text")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_where_ranks_expect_it(family, vision, text, captions, monkeypatch):
    model = build_model(family, vision, text).train()
    batch = build_batch(family, captions=captions)

    def gradients():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {name: value.grad for name, value in model.named_parameters()}

    loss, expected = gradients()
    unused = {name for name, value in expected.items() if value is None}
    assert bool(unused) == (text == "bert" or (family == "cloc" and not captions))
    model.activation_checkpointing_enable()
    assert {name for name, value in gradients()[1].items() if value is None} == unused
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    same, found = gradients()
    assert torch.equal(same, loss)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]) if value is None else value, msg=name)
    model.eval()
    assert {name for name, value in gradients()[1].items() if value is None} == unused


def test_frozen_parameters_stay_frozen(monkeypatch, tmp_path):
    build_model("cloc", "clip", "bert").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).train()
    model.text_model.requires_grad_(False)
    model.activation_checkpointing_enable()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model(**build_batch("cloc", captions=False)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("text_model."), name
