"""The tiled loss against loops over single pairs, in float64, and against the plain loss."""

import pytest
import torch
import torch.nn.functional as F
from builders import build_batch, build_model, contrastive_by_loops, run_ranks

from pixclip_hf.modeling import modeling_losses, modeling_tiled_loss
from pixclip_hf.modeling.modeling_gathered_loss import gathered_contrastive_loss
from pixclip_hf.modeling.modeling_losses import contrastive_loss

ROWS = 23


def problem(rows=ROWS, width=6, dtype=torch.float64, seed=0):
    """Embeddings, texts and temperature; identities with repeats; some rows padding, one the only one of its kind."""
    generator = torch.Generator().manual_seed(seed)
    sides = (F.normalize(torch.randn(rows, width, generator=generator), dim=-1).to(dtype) for _ in range(2))
    ids = torch.randint(0, rows // 2 + 1, (rows,), generator=generator)
    valid = torch.rand(rows, generator=generator) > 0.2
    scale = torch.tensor(7.0, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (*sides, scale)], ids, valid


def assert_same(got, wanted, tensors, atol=1e-12):
    torch.testing.assert_close(got.double(), wanted.double(), atol=atol, rtol=atol)
    gradients = torch.autograd.grad(got, tensors)
    expected = torch.autograd.grad(wanted, tensors)
    for gradient, value in zip(gradients, expected, strict=True):
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(gradient.double(), value.double(), atol=atol, rtol=atol)


@pytest.mark.parametrize("tile_size", [1, 4, 7, 23, 100])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_equals_loops(repeated, padded, threshold, tile_size):
    tensors, ids, valid = problem()
    ids, valid = ids if repeated else None, valid if padded else None
    loss = contrastive_loss(*tensors, ids=ids, valid=valid, similarity_threshold=threshold, tile_size=tile_size)
    assert_same(loss, contrastive_by_loops(*tensors, ids, valid, threshold), tensors)


def test_rows_without_a_negative():
    """Rows 0 to 4 have one text; all others are padding: no row has a negative. Then row 5 alone joins them."""
    tensors, _, _ = problem()
    ids, valid = torch.zeros(ROWS, dtype=torch.long), torch.arange(ROWS) < 5
    loss = contrastive_loss(*tensors, ids=ids, valid=valid, tile_size=4)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, tensors):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    ids[5], valid[5] = 1, True
    loss = contrastive_loss(*tensors, ids=ids, valid=valid, tile_size=4)
    assert_same(loss, contrastive_by_loops(*tensors, ids, valid), tensors)


def test_no_valid_row_and_one_row():
    tensors, ids, valid = problem()
    for rows, flags in ((ROWS, torch.zeros(ROWS, dtype=torch.bool)), (1, None)):
        loss = contrastive_loss(tensors[0][:rows], tensors[1][:rows], tensors[2], valid=flags, tile_size=8)
        assert loss == 0
        for gradient in torch.autograd.grad(loss, tensors):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("rows", [(9, 3, 11), (5, 18, 0)])
def test_ranks_together_equal_the_whole(rows, threshold):
    tensors, ids, valid = problem()
    whole = contrastive_by_loops(*tensors, ids, valid, threshold)
    starts = [sum(rows[:rank]) for rank in range(len(rows))]

    def on_rank(rank, gather):
        own = slice(starts[rank], starts[rank] + rows[rank])
        embeds, texts, scale = tensors
        return gathered_contrastive_loss(
            embeds[own], texts[own], scale, ids[own], valid[own], threshold, gather, 3, tile_size=4
        )

    # The share of the rows that a rank divides by is a float32.
    assert_same(sum(run_ranks(3, on_rank)) / 3, whole, tensors, atol=1e-7)


def test_large_logits():
    """At the largest temperature a wrong row costs 200, and a right one nothing."""
    embeds = F.normalize(torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    for sign in (1, -1):
        texts, scale = sign * embeds, torch.tensor(100.0)
        loss = contrastive_loss(embeds, texts, scale, tile_size=5)
        plain = contrastive_loss(embeds.double(), texts.double(), scale.double(), tile_size=0)
        torch.testing.assert_close(loss.double(), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_accumulate_in_float32(dtype):
    tensors, ids, valid = problem(rows=300, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = contrastive_loss(*tensors, ids=ids, valid=valid, tile_size=64)
    wanted = contrastive_loss(*exact, ids=ids, valid=valid, tile_size=0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, atol=1e-5, rtol=1e-5)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for got, value in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(wanted, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), value, atol=rounding * value.abs().max().item(), rtol=rounding)


def test_embeddings_of_two_precisions():
    (embeds, texts, scale), ids, _ = problem(dtype=torch.float32)
    losses = [contrastive_loss(embeds.bfloat16(), texts, scale, ids=ids, tile_size=size) for size in (0, 5)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(losses[0], contrastive_loss(embeds, texts, scale, ids=ids), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_under_autocast(threshold):
    """Neither pass falls to half precision, even when the backward pass runs under autocast too."""
    tensors, ids, valid = problem(dtype=torch.float32)
    options = {"ids": ids, "valid": valid, "similarity_threshold": threshold}
    wanted = contrastive_loss(*tensors, **options, tile_size=0)
    expected = torch.autograd.grad(wanted, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(*tensors, **options, tile_size=5)
        found = torch.autograd.grad(loss, tensors)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_one_side_frozen():
    tensors, ids, _ = problem()
    embeds, texts, scale = tensors
    wanted = torch.autograd.grad(contrastive_loss(*tensors, ids=ids, tile_size=0), texts)
    loss = contrastive_loss(embeds.detach(), texts, scale.detach(), ids=ids, tile_size=5)
    torch.testing.assert_close(torch.autograd.grad(loss, texts), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [0, 7])
def test_under_compile(tile_size):
    """Tiles run outside of the compiled graph, which would unroll them."""
    tensors, ids, valid = problem(dtype=torch.float32)

    def loss_of(embeds, texts, scale):
        return 2 * contrastive_loss(embeds * 1, texts, scale, ids=ids, valid=valid, tile_size=tile_size)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=not tile_size)
    assert_same(compiled(*tensors), loss_of(*tensors), tensors, atol=1e-6)


def test_no_matrix_of_all_pairs(monkeypatch):
    """What is computed at a time is a tile, in both passes; and many pairs mean tiles."""
    shapes = []
    tiles = modeling_tiled_loss._tiles

    def watched(*args):
        for rows, columns, logits in tiles(*args):
            shapes.append(tuple(logits.shape))
            yield rows, columns, logits

    monkeypatch.setattr(modeling_tiled_loss, "_tiles", watched)
    tensors, ids, _ = problem()
    contrastive_loss(*tensors, ids=ids, tile_size=10).backward()
    assert sorted(set(shapes)) == [(3, 3), (3, 10), (10, 3), (10, 10)] and len(shapes) == 2 * 9
    shapes.clear()
    contrastive_loss(*tensors, ids=ids)
    assert not shapes
    monkeypatch.setattr(modeling_losses, "TILED_FROM_PAIRS", ROWS * ROWS)
    contrastive_loss(*tensors, ids=ids)
    assert shapes == [(ROWS, ROWS)]


@pytest.mark.parametrize("family", ["cloc", "pixclip"])
def test_models_take_the_tile_size_from_their_attribute(family, monkeypatch):
    batch = build_batch(family)
    model = build_model(family)
    assert model.contrastive_tile_size is None
    plain = model(**batch).loss
    wanted = torch.autograd.grad(plain, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    seen = []
    tiled = modeling_losses.tiled_losses
    monkeypatch.setattr(modeling_losses, "tiled_losses", lambda *args: seen.append(args[-1]) or tiled(*args))
    model.contrastive_tile_size = 2
    loss = model(**batch).loss
    # Every contrastive part: images, regions, and the crops of PixCLIP.
    assert seen == [2] * (2 if family == "cloc" else 3)
    torch.testing.assert_close(loss, plain)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for got, value in zip(gradients, wanted, strict=True):
        if value is not None:
            torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="`contrastive_tile_size` must not be negative, got -1"):
        model.contrastive_tile_size = -1
