"""The losses against plain loops, closed forms and numbers worked out by hand, in value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import contrastive_by_loops, run_ranks

from pixclip_hf.modeling.modeling_gathered_loss import gathered_contrastive_loss, rows_per_rank
from pixclip_hf.modeling.modeling_losses import contrastive_loss, grounding_losses, local_global_loss, text_ids

VALID = torch.tensor([True, True, False, True, True, False, True])
IDS = torch.tensor([3, 8, 0, 3, 5, 0, 9])


def embeddings(rows=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(rows, width, generator=generator), dim=-1).requires_grad_() for _ in range(2)]


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("ids", [None, IDS])
def test_contrastive_loss_equals_loops(ids, valid, threshold):
    embeds, texts = embeddings()
    scale = torch.tensor(4.0, requires_grad=True)
    loss = contrastive_loss(embeds, texts, scale, ids=ids, valid=valid, similarity_threshold=threshold)
    exact = [tensor.detach().double().requires_grad_() for tensor in (embeds, texts, scale)]
    expected = contrastive_by_loops(*exact, ids, valid, threshold)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(loss, embeds, texts, scale), gradients(expected, *exact), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_cases_differ():
    embeds, texts = embeddings()
    options = [{}, {"ids": IDS}, {"valid": VALID}, {"similarity_threshold": 0.3}]
    assert len({round(contrastive_loss(embeds, texts, torch.tensor(4.0), **o).item(), 4) for o in options}) == 4


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_zero_embeddings_give_log_n(rows):
    zeros = torch.zeros(rows, 5)
    ids = torch.arange(rows)
    torch.testing.assert_close(contrastive_loss(zeros, zeros, torch.tensor(9.0), ids=ids).item(), math.log(rows))


def test_equal_texts_are_no_negatives():
    embeds, texts = embeddings()
    assert contrastive_loss(embeds, texts, torch.tensor(4.0), ids=torch.full((7,), 2)) == 0


def test_no_valid_row_gives_zero_and_finite_gradients():
    embeds, texts = embeddings()
    scale = torch.tensor(4.0, requires_grad=True)
    nothing = torch.zeros(7, dtype=torch.bool)
    loss = contrastive_loss(embeds, texts, scale, ids=torch.zeros(7, dtype=torch.long), valid=nothing)
    assert loss == 0
    for gradient in gradients(loss, embeds, texts, scale):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_padded_rows_get_no_gradient_and_change_nothing():
    embeds, texts = embeddings()
    loss = contrastive_loss(embeds, texts, torch.tensor(4.0), ids=IDS, valid=VALID)
    for gradient in gradients(loss, embeds, texts):
        assert gradient[VALID].norm(dim=-1).min() > 0 and gradient[~VALID].abs().max() == 0
    kept = contrastive_loss(embeds[VALID], texts[VALID], torch.tensor(4.0), ids=IDS[VALID])
    torch.testing.assert_close(loss, kept)


@pytest.mark.parametrize("rows", [(3, 1, 3), (2, 5, 0)])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_ranks_together_equal_the_whole(rows, valid, threshold):
    embeds, texts = embeddings()
    scale = torch.tensor(4.0, requires_grad=True)
    whole = contrastive_loss(embeds, texts, scale, ids=IDS, valid=valid, similarity_threshold=threshold)
    starts = [sum(rows[:rank]) for rank in range(len(rows))]

    def on_rank(rank, gather):
        own = slice(starts[rank], starts[rank] + rows[rank])
        return gathered_contrastive_loss(
            embeds[own], texts[own], scale, IDS[own], None if valid is None else valid[own], threshold, gather, 3
        )

    mean = sum(run_ranks(3, on_rank)) / 3
    torch.testing.assert_close(mean, whole, atol=1e-6, rtol=1e-5)
    for got, wanted in zip(gradients(mean, embeds, texts, scale), gradients(whole, embeds, texts, scale), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_offset_and_normalizer():
    embeds, texts = embeddings()
    own = slice(3, 5)
    loss = contrastive_loss(
        embeds[own], texts[own], torch.tensor(4.0), all_embeds=embeds, all_text_embeds=texts, offset=3, normalizer=0.5
    )
    logits = 4 * embeds @ texts.T
    rows = sum(-torch.log_softmax(table, 1)[i, i] / 2 for table in (logits, logits.T) for i in (3, 4))
    torch.testing.assert_close(loss, rows / 0.5)


PREDICTED = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.25], [0.1, 0.2, 0.7, 0.6], [0.3, 0.3, 0.6, 0.9]])
WANTED = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.75, 0.75, 1.0, 1.0], [0.1, 0.2, 0.7, 0.6], [0.0, 0.0, 0.0, 0.0]])
# Overlap 1/16 of a union of 7/16 in a hull of 9/16; apart, 1/8 in a hull of 1; equal.
L1 = (1.0, 3.0, 0.0)
ONE_MINUS_GIOU = (1 - (1 / 7 - 2 / 9), 1 + 7 / 8, 0.0)


def test_grounding_losses_by_hand():
    valid = torch.tensor([True, True, True, False])
    predicted = PREDICTED.clone().requires_grad_()
    l1, giou = grounding_losses(predicted, WANTED, valid)
    torch.testing.assert_close(l1.item(), sum(L1) / 3, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(giou.item(), sum(ONE_MINUS_GIOU) / 3, atol=1e-6, rtol=1e-6)
    for loss in (l1, giou):
        (gradient,) = torch.autograd.grad(loss, predicted, retain_graph=True)
        assert gradient.isfinite().all() and gradient[3].abs().max() == 0
        assert gradient[0].abs().max() > 0 and gradient[1].abs().max() > 0


@pytest.mark.parametrize("row", range(3))
def test_grounding_losses_one_box_at_a_time(row):
    l1, giou = grounding_losses(PREDICTED[row : row + 1], WANTED[row : row + 1])
    torch.testing.assert_close((l1.item(), giou.item()), (L1[row], ONE_MINUS_GIOU[row]), atol=1e-6, rtol=1e-6)


def test_grounding_losses_take_a_normalizer_and_no_valid_row():
    l1, giou = grounding_losses(PREDICTED[:3], WANTED[:3], normalizer=0.25)
    torch.testing.assert_close((l1.item(), giou.item()), (sum(L1) / 0.25, sum(ONE_MINUS_GIOU) / 0.25))
    assert sum(grounding_losses(PREDICTED, WANTED, torch.zeros(4, dtype=torch.bool))) == 0


def test_rows_per_rank_makes_uneven_ranks_add_up():
    valid = (torch.tensor([True, False]), torch.tensor([True]), torch.tensor([True, True, False, True]))
    predicted = torch.cat([PREDICTED, PREDICTED[:3]]).requires_grad_()
    boxes = torch.cat([WANTED, WANTED.flip(0)[:3]])
    starts, whole = (0, 2, 3, 7), grounding_losses(predicted, boxes, torch.cat(valid))

    def on_rank(rank, gather):
        own = slice(starts[rank], starts[rank + 1])
        return grounding_losses(predicted[own], boxes[own], valid[rank], rows_per_rank(valid[rank], gather, 3))

    for index, parts in enumerate(zip(*run_ranks(3, on_rank), strict=True)):
        torch.testing.assert_close(sum(parts) / 3, whole[index])
        torch.testing.assert_close(*(gradients(loss, predicted)[0] for loss in (sum(parts) / 3, whole[index])))


def test_local_global_loss_pulls_one_side_only():
    pooled, crops = embeddings()
    loss = local_global_loss(pooled, crops, VALID)
    loss.backward()
    cosines = [
        sum(a * b for a, b in zip(*rows, strict=True)) for rows in zip(pooled.tolist(), crops.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss.item(), sum(1 - c for c, real in zip(cosines, VALID, strict=True) if real) / 5)
    assert crops.grad is None
    torch.testing.assert_close(pooled.grad, torch.where(VALID[:, None], -crops.detach() / 5, 0))
    assert local_global_loss(pooled, crops, torch.zeros(7, dtype=torch.bool)) == 0
    torch.testing.assert_close(local_global_loss(pooled, crops, VALID, normalizer=2.5), 2 * loss)


def test_text_ids_tell_texts_apart():
    generator = torch.Generator().manual_seed(0)
    texts = torch.unique(torch.randint(0, 4, (20000, 9), generator=generator), dim=0)
    large = torch.unique(torch.randint(0, 150000, (20000, 9), generator=generator), dim=0)
    for values in (texts, large, torch.arange(5000)[:, None], texts.float() * 0.25):
        assert len(values) > 4000 and len(text_ids(values).unique()) == len(values)
        assert torch.equal(text_ids(values.clone()), text_ids(values))
        assert text_ids(values).dtype == torch.int64


def test_text_ids_know_order_and_length():
    ids = text_ids(
        torch.tensor([[5, 6, 7], [7, 6, 5], [6, 5, 7], [5, 6, 0], [5, 6, 0], [0, 5, 6]]),
        torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]),
    )
    assert len(ids.unique()) == 6


def test_text_ids_ignore_padding():
    text = [5, 9, 0, 7]
    rows = torch.tensor([[*text, 0, 0], [0, 0, *text], [3, *text, 3], [*text, 44, 55]])
    masks = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    alone = text_ids(torch.tensor([text]))
    assert (text_ids(rows, masks) == alone).all() and (text_ids(rows, masks.bool()) == alone).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_ids_of_states(dtype):
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    nearly = states.clone()
    nearly[:, 3] *= 1.01
    ids = text_ids(torch.cat([states, states, nearly]).requires_grad_())
    assert torch.equal(ids[:50], ids[50:100]) and len(ids.unique()) == 100
