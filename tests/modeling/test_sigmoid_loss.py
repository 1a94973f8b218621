"""The sigmoid loss against loops over single pairs, in float64, and against SigLIP's own."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from builders import build_batch, build_model, loss_names, run_ranks
from test_tiled_loss import ROWS, assert_same, problem

from pixclip_hf.modeling import modeling_losses
from pixclip_hf.modeling.modeling_gathered_loss import gathered_contrastive_loss
from pixclip_hf.modeling.modeling_losses import sigmoid_loss


def sigmoid_by_loops(embeds, texts, scale, bias, ids=None, valid=None, threshold=None, equal_texts="left_out"):
    """One pair at a time."""
    rows = [i for i in range(len(embeds)) if valid is None or valid[i]]
    total = embeds.sum() * 0
    for i in rows:
        for j in rows:
            logit = scale * (embeds[i] * texts[j]).sum() + bias
            same = ids is not None and ids[i] == ids[j]
            if i == j or (same and equal_texts == "positive"):
                total = total + torch.log1p(torch.exp(-logit))
            elif not same and (threshold is None or (texts[i] * texts[j]).sum() <= threshold):
                total = total + torch.log1p(torch.exp(logit))
    return total / max(len(rows), 1)


def with_bias(dtype=torch.float64):
    tensors, ids, valid = problem(dtype=dtype)
    return [*tensors, torch.tensor(-2.5, dtype=dtype, requires_grad=True)], ids, valid


@pytest.mark.parametrize("tile_size", [0, 1, 7, 100])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("equal_texts", [None, "left_out", "positive"])
def test_equals_loops(equal_texts, padded, threshold, tile_size):
    tensors, ids, valid = with_bias()
    ids, valid = ids if equal_texts else None, valid if padded else None
    equal_texts = equal_texts or "left_out"
    options = {"ids": ids, "valid": valid, "similarity_threshold": threshold, "equal_texts": equal_texts}
    expected = sigmoid_by_loops(*tensors, ids, valid, threshold, equal_texts)
    assert_same(sigmoid_loss(*tensors, tile_size=tile_size, **options), expected, tensors)


def test_the_cases_differ():
    tensors, ids, valid = with_bias()
    cases = [
        {},
        {"ids": ids},
        {"ids": ids, "equal_texts": "positive"},
        {"valid": valid},
        {"similarity_threshold": 0.3},
    ]
    assert len({round(sigmoid_loss(*tensors, **options).item(), 6) for options in cases}) == 5


@pytest.mark.parametrize("tile_size", [0, 7])
def test_single_precision_and_autocast(tile_size):
    exact, ids, valid = with_bias()
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    expected = sigmoid_by_loops(*exact, ids, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(*single, ids=ids, valid=valid, tile_size=tile_size)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(torch.autograd.grad(loss, single), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tile_size", [0, 4])
@pytest.mark.parametrize("equal_texts", ["left_out", "positive"])
def test_ranks_together_equal_the_whole(equal_texts, tile_size):
    """Ranks of different sizes, and one without any row."""
    tensors, ids, valid = with_bias()
    embeds, texts, scale, bias = tensors
    options = {"tile_size": tile_size, "equal_texts": equal_texts}
    whole = sigmoid_loss(*tensors, ids=ids, valid=valid, **options)
    bounds = (0, 9, 9, ROWS)

    def on_rank(rank, gather):
        own = slice(bounds[rank], bounds[rank + 1])
        return gathered_contrastive_loss(
            embeds[own], texts[own], scale, ids[own], valid[own], None, gather, 3, logit_bias=bias, **options
        )

    # The normalizer is a float32 quotient.
    assert_same(sum(run_ranks(3, on_rank)) / 3, whole, tensors, atol=1e-6)


def test_tiles_are_used_where_there_are_many_pairs(monkeypatch):
    tensors, *_ = with_bias()
    seen = []

    def spy(*args):
        seen.append(args[-1])
        return args[0].sum(1)

    monkeypatch.setattr(modeling_losses, "tiled_sigmoid_losses", spy)
    sigmoid_loss(*tensors)
    assert seen == []
    monkeypatch.setattr(modeling_losses, "TILED_FROM_PAIRS", ROWS * ROWS)
    sigmoid_loss(*tensors)
    assert seen == [modeling_losses.TILE_SIZE]


def test_no_valid_row_and_wide_logits():
    tensors, ids, _ = with_bias()
    for tile_size in (0, 7):
        loss = sigmoid_loss(*tensors, ids=ids, valid=torch.zeros(ROWS, dtype=torch.bool), tile_size=tile_size)
        assert loss == 0 and all((gradient == 0).all() for gradient in torch.autograd.grad(loss, tensors))
        scale = torch.tensor(1e4, dtype=torch.float64)
        loss = sigmoid_loss(tensors[0], tensors[1], scale, tensors[3], ids=ids, tile_size=tile_size)
        assert loss.isfinite() and all(
            gradient.isfinite().all() for gradient in torch.autograd.grad(loss, tensors[:2])
        )


@pytest.mark.parametrize("tile_size", [0, 2])
def test_equals_siglips_own(tile_size):
    """Values, and gradients of scale, bias and the embeddings."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(5, 8, generator=generator, requires_grad=True) for _ in range(2)]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.SiglipConfig(
        vision_config=sizes | {"image_size": 8, "patch_size": 8},
        text_config=sizes | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2},
    )
    siglip = transformers.SiglipModel(config)
    with torch.no_grad():
        siglip.logit_scale.fill_(2.5)
        siglip.logit_bias.fill_(-9.0)
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

    siglip.vision_model.forward = lambda *args, **kwargs: Output(pooler_output=sides[0])
    siglip.text_model.forward = lambda *args, **kwargs: Output(pooler_output=sides[1])
    expected = siglip(input_ids=torch.ones(5, 1).long(), pixel_values=torch.zeros(5, 3, 8, 8), return_loss=True).loss
    embeds, texts = (F.normalize(side, dim=-1) for side in sides)
    scale, bias = siglip.logit_scale.exp().reshape(()), siglip.logit_bias.reshape(())
    loss = sigmoid_loss(embeds, texts, scale, bias, tile_size=tile_size)
    assert_same(loss, expected, [*sides, siglip.logit_scale, siglip.logit_bias], atol=1e-5)


@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_every_contrastive_part(family):
    """The models' parts are the loss of their own embeddings, with the temperature and bias of each."""
    changes = {"local_global_objective": "contrastive"} if family == "pixclip" else {}
    model = build_model(family, contrastive_objective="sigmoid", equal_texts="positive", **changes)
    batch = build_batch(family)
    batch["region_input_ids"][1, 0], batch["region_text_attention_mask"][1, 0] = (
        batch[name][0, 0] for name in ("region_input_ids", "region_text_attention_mask")
    )
    output = model(**batch)
    assert set(output.loss_parts) == loss_names(family)
    valid = batch["region_attention_mask"].bool().flatten()
    ids = output.region_text_ids.flatten()
    assert len(ids[valid].unique()) < valid.sum()
    texts = output.region_text_embeds.flatten(0, 1)
    scale, bias = model.get_logit_scale(), model.get_logit_bias()
    expected = {
        "image_text": sigmoid_by_loops(
            output.image_embeds, output.text_embeds, model.logit_scale(), model.logit_scale.get_bias()
        )
    }
    regions = (
        {"region_text": "region_embeds"}
        if family == "cloc"
        else {"mask_text": "region_embeds", "crop_text": "crop_embeds"}
    )
    for name, rows in regions.items():
        rows = output[rows].flatten(0, 1)
        expected[name] = sigmoid_by_loops(rows, texts, scale, bias, ids, valid, equal_texts="positive")
    if family == "pixclip":
        sides = (output[name].flatten(0, 1) for name in ("pooled_region_embeds", "crop_embeds"))
        # The crop of another region is another's, whatever its text.
        expected["local_global"] = sigmoid_by_loops(*sides, scale, bias, ids, valid)
    for name, value in expected.items():
        torch.testing.assert_close(output.loss_parts[name], value, atol=1e-4, rtol=1e-5)
    model.contrastive_tile_size = 2
    for name, value in model(**batch).loss_parts.items():
        torch.testing.assert_close(value, output.loss_parts[name], atol=1e-5, rtol=1e-5)
    logits = output.region_embeds @ output.text_embeds.T * scale + bias
    torch.testing.assert_close(output.logits_per_region, logits)
    softmax = build_model(family, **changes)
    assert softmax.get_logit_bias() is None and not any(
        name.endswith("scale.bias") for name, _ in softmax.named_parameters()
    )
