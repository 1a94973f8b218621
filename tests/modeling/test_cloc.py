"""CLOC's Prompter against its formulas, the first edition's against the full self-attention layer of torch; readouts,
positions, masks and grounding."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from builders import build_batch, build_config, build_model, build_texts, shake
from torch import nn
from transformers import AutoConfig, AutoModel

from pixclip_hf import CLOCModel, CLOCVisionModel
from pixclip_hf.modeling.modeling_prompter import (
    QUERY_GAIN,
    CLOCFirstPrompterLayer,
    CLOCPrompterLayer,
    FourierPositions,
    PlacedTokens,
)

WIDTH, HEADS, INNER = 32, 4, 48


def torch_layer(layer):
    """The same layer from torch, with copied weights: pre-norm self-attention over a whole sequence."""
    full = nn.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = torch.cat([getattr(getattr(layer, f"{part}_proj"), name) for part in "qkv"])
            getattr(full.self_attn, f"in_proj_{name}").copy_(rows)
            for mine, theirs in TWINS:
                getattr(full.get_submodule(theirs), name).copy_(getattr(layer.get_submodule(mine), name))
    return full.train()


TWINS = (
    ("out_proj", "self_attn.out_proj"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("fc1", "linear1"),
    ("fc2", "linear2"),
)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return shake(CLOCFirstPrompterLayer(WIDTH, HEADS, INNER))


def layer_norm(norm, row):
    """In float64, from the definition."""
    centered = row - row.mean()
    return norm.weight.double() * centered / (centered.pow(2).mean() + norm.eps).sqrt() + norm.bias.double()


def apply_linear(linear, row):
    product = linear.weight.double() @ row
    return product if linear.bias is None else product + linear.bias.double()


def read_by_loops(layer, prompt, content, positions, coverage=None):
    """One prompt (D,) of a new layer over patches (N, D), head by head and patch by patch, in float64. With `coverage`
    (N,) the prompt is a region, else a text."""
    prompt, content, positions = prompt.double(), content.double(), positions.double()
    size = WIDTH // HEADS
    looked = layer_norm(layer.norm1, prompt)
    kind = "" if coverage is not None else "text_"
    by_position = apply_linear(getattr(layer, f"{kind}position_query"), looked)
    by_content = apply_linear(getattr(layer, f"{kind}content_query"), looked)
    read = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        logits, values = [], []
        for n in range(len(content)):
            position_key = apply_linear(layer.position_key, layer_norm(layer.norm1, positions[n]))
            content_key = apply_linear(layer.content_key, content[n])
            logit = (by_position[part] @ position_key[part] + by_content[part] @ content_key[part]) / size**0.5
            value = apply_linear(layer.v_proj, content[n])
            if coverage is None:
                value = value + apply_linear(layer.text_position_value, positions[n])
            elif layer.prior_gain is not None:
                logit = logit + layer.prior_gain[head].double() * (coverage[n].double() + 1e-3).log()
            logits.append(logit)
            values.append(value[part])
        read.append((torch.stack(logits).softmax(0)[:, None] * torch.stack(values)).sum(0))
    state = apply_linear(layer.out_proj, torch.cat(read)) + apply_linear(layer.prompt_proj, prompt)
    inner = F.gelu(apply_linear(layer.fc1, layer_norm(layer.norm2, state)))
    return state + apply_linear(layer.fc2, inner)


@pytest.mark.parametrize("kind", ["region", "region without prior", "text"])
def test_the_prompter_layer_equals_its_formula(kind):
    torch.manual_seed(0)
    layer = shake(CLOCPrompterLayer(WIDTH, HEADS, INNER, prior=kind == "region", texts=True))
    prompts, content = prompts_and_tokens()
    positions = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    coverage = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(3))
    coverage[:, :, :3] = 0
    coverage.requires_grad_()
    tokens = PlacedTokens(content, positions)
    got = layer.read_texts(prompts, tokens) if kind == "text" else layer.read_regions(prompts, tokens, coverage)
    wanted = torch.stack([
        torch.stack([
            read_by_loops(layer, prompts[b, r], content[b], positions, None if kind == "text" else coverage[b, r])
            for r in range(3)
        ])
        for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)

    used = {name: value for name, value in layer.named_parameters() if ("text_" in name) <= (kind == "text")}
    if kind == "text":
        used = {
            n: p for n, p in used.items() if n.split(".")[0] not in ("position_query", "content_query", "prior_gain")
        }
    inputs = [prompts, content, positions, *([coverage] if kind == "region" else []), *used.values()]
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    own = torch.autograd.grad((got * weights).sum(), inputs)
    reference = torch.autograd.grad((wanted * weights).sum(), inputs)
    for gradient, expected in zip(own, reference, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_a_new_layer_is_a_soft_pooling():
    torch.manual_seed(0)
    layer = CLOCModel(build_config("cloc")).prompter.layer
    prompts, content = prompts_and_tokens()
    coverage = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(3))
    positions = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    read = layer.read_regions(prompts, PlacedTokens(content, positions), coverage)
    size = WIDTH // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        alike = QUERY_GAIN**2 * layer.norm1(prompts)[..., part] @ layer.norm1(positions)[:, part].T / size**0.5
        weights = (alike + (coverage + 1e-3).log()).softmax(-1)
        own = weights @ layer.v_proj(content)[..., part]
        rest = layer.out_proj.weight[:, part] @ own.transpose(-1, -2)
        read = read - rest.transpose(-1, -2)
    # Nothing but the pooled values is left: no content in the keys, no prompt, no feed-forward part.
    torch.testing.assert_close(read, layer.out_proj.bias.expand_as(read), atol=1e-5, rtol=1e-5)


def test_texts_of_a_new_layer_look_by_content_alone():
    torch.manual_seed(0)
    layer = CLOCModel(build_config("cloc")).prompter.layer
    prompts, content = prompts_and_tokens()
    positions = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    layer.text_position_value.weight.data.zero_()
    read = layer.read_texts(prompts, PlacedTokens(content, positions))
    torch.testing.assert_close(layer.read_texts(prompts, PlacedTokens(content, positions.flip(0))), read)
    moved = layer.read_texts(prompts, PlacedTokens(content + content.flip(1).roll(1, 2), positions))
    assert (moved - read).abs().max() > 1e-2
    assert (read[:, 0] - read[:, 1]).abs().max() > 1e-3


def prompts_and_tokens(regions=3, patches=7):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, regions, WIDTH, generator=generator).requires_grad_(),
        torch.randn(2, patches, WIDTH, generator=generator).requires_grad_(),
    )


def full_attention(full, prompts, tokens):
    """Every output token, (B, R, 1 + N, D), one prompt at a time."""
    return torch.stack(
        [full(torch.cat([prompts[:, r : r + 1], tokens], dim=1)) for r in range(prompts.shape[1])], dim=1
    )


@pytest.mark.parametrize("form", ["queries", "read_all"])
def test_the_prompter_layer_equals_full_self_attention(layer, form):
    full = torch_layer(layer)
    prompts, tokens = prompts_and_tokens()
    got, wanted = layer.read_all(prompts, tokens), full_attention(full, prompts, tokens)
    if form == "queries":
        got, wanted = layer(prompts, tokens), wanted[:, :, 0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)

    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for output in (got, wanted):
        (output * weights).sum().backward()
        if output is got:
            own_inputs = [prompts.grad, tokens.grad]
            prompts.grad = tokens.grad = None
    pairs = list(zip(own_inputs, [prompts.grad, tokens.grad], strict=True))
    for name in ("weight", "bias"):
        rows = torch.cat([getattr(getattr(layer, f"{part}_proj"), name).grad for part in "qkv"])
        pairs.append((rows, getattr(full.self_attn, f"in_proj_{name}").grad))
        for mine, theirs in TWINS:
            pairs.append(
                (getattr(layer.get_submodule(mine), name).grad, getattr(full.get_submodule(theirs), name).grad)
            )
    assert len(pairs) == 14
    for own, reference in pairs:
        assert reference.abs().max() > 1e-2
        torch.testing.assert_close(own, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["forward", "read_all"])
def test_prompts_do_not_see_each_other(layer, form):
    prompts, tokens = prompts_and_tokens()
    output = getattr(layer, form)(prompts, tokens)
    gradient = torch.autograd.grad(output[:, 1].pow(2).sum(), prompts)[0]
    assert gradient[:, 1].abs().max() > 0 and gradient[:, [0, 2]].abs().max() == 0
    alone = getattr(layer, form)(prompts[:, 1:2], tokens)
    torch.testing.assert_close(alone[:, 0], output[:, 1], atol=1e-5, rtol=1e-5)


def test_the_prompter_mixes_the_image_in(layer):
    prompts, tokens = prompts_and_tokens()
    gradient = torch.autograd.grad(layer(prompts, tokens).pow(2).sum(), tokens)[0]
    assert (gradient.norm(dim=-1) > 1e-3).all()


def test_prompts_of_the_new_layer_do_not_see_each_other():
    torch.manual_seed(0)
    layer = shake(CLOCPrompterLayer(WIDTH, HEADS, INNER, prior=True, texts=True))
    prompts, content = prompts_and_tokens()
    tokens = PlacedTokens(content, torch.randn(7, WIDTH))
    coverage = torch.rand(2, 3, 7)
    for rows in (lambda p, c: layer.read_regions(p, tokens, c), lambda p, c: layer.read_texts(p, tokens)):
        output = rows(prompts, coverage)
        gradient = torch.autograd.grad(output[:, 1].pow(2).sum(), prompts)[0]
        assert gradient[:, 1].abs().max() > 0 and gradient[:, [0, 2]].abs().max() == 0
        alone = rows(prompts[:, 1:2], coverage[:, 1:2])
        torch.testing.assert_close(alone[:, 0], output[:, 1], atol=1e-5, rtol=1e-5)


def test_the_attention_of_prompts_stays_exact_under_autocast():
    torch.manual_seed(0)
    layer = shake(CLOCPrompterLayer(WIDTH, HEADS, INNER, prior=True, texts=False))
    seen = []
    sdpa = F.scaled_dot_product_attention
    prompts, content = prompts_and_tokens()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(sdpa(*a, **k)) or seen[-1])
        layer.read_regions(prompts, PlacedTokens(content, torch.randn(7, WIDTH)), torch.rand(2, 3, 7))
    assert seen[0].dtype == torch.float32


def test_fourier_positions_equal_their_formula():
    torch.manual_seed(0)
    positions = FourierPositions(6, 1.5)
    points = torch.rand(4, 2)
    encoded = positions(points)
    for (x, y), row in zip(points.tolist(), encoded.tolist(), strict=True):
        for k in range(3):
            fx, fy = positions.frequencies[:, k].tolist()
            angle = 2 * math.pi * ((2 * x - 1) * fx + (2 * y - 1) * fy)
            assert row[2 * k] == pytest.approx(math.sin(angle), abs=1e-5)
            assert row[2 * k + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_positions_stay_exact_under_autocast():
    positions, points = FourierPositions(32, 1.0), torch.rand(50, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = positions(points)
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, positions(points))


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_position_scale_is_the_spread_of_the_frequencies(scale):
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 2048}
    vision |= {"num_hidden_layers": 0, "num_attention_heads": 4, "intermediate_size": 8}
    model = CLOCModel(build_config("cloc", vision_config=vision, position_scale=scale))
    assert model.prompter.positions.frequencies.std().item() == pytest.approx(scale, rel=0.1)


def test_tokens_and_corners_share_one_basis():
    model = build_model("cloc")
    prompter = model.prompter
    assert sum(isinstance(module, FourierPositions) for module in model.modules()) == 1
    tokens = torch.randn(1, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    placed = prompter.place(tokens, (4, 4))
    torch.testing.assert_close(placed.content, prompter.token_norm(tokens))
    seen = []
    hook = prompter.box_fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # Corners on the centers of patches 1 (row 0, column 1) and 11 (row 2, column 3).
    boxes = torch.tensor([[[0.375, 0.125, 0.875, 0.625]]])
    prompter.read_regions(prompter.box_prompts(boxes, (4, 4)), placed)
    hook.remove()
    corners = torch.cat([placed.positions[1], placed.positions[11]])
    torch.testing.assert_close(seen[0][0, 0], corners, atol=1e-5, rtol=1e-5)


def test_a_non_square_image_keeps_its_geometry():
    model = build_model("cloc")
    placed = model.prompter.place(torch.zeros(1, 6, WIDTH), (2, 3))
    centers = torch.tensor([[(c + 0.5) / 3, (r + 0.5) / 2] for r in range(2) for c in range(3)])
    torch.testing.assert_close(placed.positions, model.prompter.positions(centers), atol=1e-6, rtol=1e-5)
    prompts = model.prompter.box_prompts(torch.tensor([[[1 / 3, 0.5, 1.0, 0.75]]]), (2, 3))
    torch.testing.assert_close(prompts.coverage[0, 0], torch.tensor([0, 0, 0, 0, 0.5, 0.5]), atol=1e-6, rtol=0)


def box_mean(positions, box, steps=400):
    """The features averaged over a fine grid of points of a box, at the length of one point's features."""
    share = (torch.arange(steps) + 0.5) / steps
    x, y = (box[k] + (box[k + 2] - box[k]) * share for k in (0, 1))
    mean = positions(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).mean((0, 1))
    return mean / mean.norm() * positions(torch.zeros(2)).norm()


def tight_box(mask):
    """xyxy in [0, 1], pixel by pixel."""
    rows, columns = mask.nonzero(as_tuple=True)
    height, width = mask.shape
    return torch.tensor([
        columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
    ])  # fmt: skip


def share_of_patches(region):
    """Of a box or a mask: share of each of the 4 x 4 patches inside it, patch by patch."""
    shares = []
    for row in range(4):
        for column in range(4):
            if region.ndim == 2:
                side = len(region) // 4
                part = region[row * side : (row + 1) * side, column * side : (column + 1) * side]
                shares.append(part.float().mean())
                continue
            x0, y0, x1, y1 = (4 * value for value in region.tolist())
            across = max(0.0, min(x1, column + 1) - max(x0, column))
            down = max(0.0, min(y1, row + 1) - max(y0, row))
            shares.append(torch.tensor(across * down))
    return torch.stack(shares)


def manual_region_features(model, pixel_values, regions):
    """From the tower's output on, one image and one region (box or mask) at a time."""
    config = model.config
    states = model.vision_model(pixel_values=pixel_values).last_hidden_state
    tokens = states[:, 1:] if config.vision_config.model_type.startswith("clip") else states
    assert tokens.shape[1] == 16
    centers = torch.tensor([[(c + 0.5) / 4, (r + 0.5) / 4] for r in range(4) for c in range(4)])
    rows = []
    for image, image_regions in zip(tokens, regions, strict=True):
        for region in image_regions:
            mask = region if region.ndim == 2 else None
            box = tight_box(region) if region.ndim == 2 else region
            if config.region_readout == "roi_align":
                cells = 14
                steps = (torch.arange(cells) + 0.5) / cells
                grid = image.T.reshape(1, WIDTH, 4, 4)
                x, y = (box[k] + (box[k + 2] - box[k]) * steps for k in (0, 1))
                at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] * 2 - 1
                state = F.grid_sample(grid, at, padding_mode="border", align_corners=False).mean((2, 3))[0]
                rows.append(model.region_projection(model.region_norm(state)))
                continue
            if config.region_readout == "image_head":
                coverage = share_of_patches(region)
                clip = config.vision_config.model_type.startswith("clip")
                patches = model.vision_model.post_layernorm(image) if clip else image
                state = (coverage[:, None] * patches).sum(0) / coverage.sum()
                state = state if clip else model.vision_model.head(state[None, None])[0]
                rows.append(model.visual_projection(state))
                continue
            prompter = model.prompter
            content, positions = prompter.token_norm(image), prompter.positions(centers)
            corners = torch.cat([prompter.positions(box[:2]), prompter.positions(box[2:])])
            term = prompter.box_fc2(F.gelu(prompter.box_fc1(corners)))
            if config.prompter_layer == "first":
                out = torch_layer(prompter.layer)(
                    torch.cat([(box_mean(prompter.positions, box) + term)[None], content + positions])[None]
                )[0]
                state = out[0] if config.region_readout == "prompt" else out.mean(0)
            else:
                by_pixels = mask is not None and config.prompter_prior
                coverage = share_of_patches(mask if by_pixels else box)
                mean = box_mean(prompter.positions, box)
                if by_pixels:
                    mean = (coverage[:, None] * positions).sum(0) / coverage.sum()
                    mean = mean / mean.norm() * positions[0].norm()
                state = read_by_loops(prompter.layer, mean + term, content, positions, coverage).float()
            rows.append(model.region_projection(model.region_norm(state)))
    return torch.stack(rows).reshape(*regions.shape[:2], -1)


FORMS = [
    {},
    {"prompter_prior": False},
    {"region_readout": "roi_align"},
    {"region_readout": "image_head"},
    {"prompter_layer": "first"},
    {"prompter_layer": "first", "region_readout": "mean"},
]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_region_features_equal_the_long_way(form, kind, vision):
    model = build_model("cloc", vision, **form)
    batch = build_batch("cloc")
    regions = batch["region_boxes"]
    if kind == "masks":
        # Blobs away from the border, so that tight boxes differ from the image.
        regions = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) > 0.8
        for slot in range(3):
            regions[:, slot, : 4 + 3 * slot] = regions[:, slot, :, 25 - 4 * slot :] = False
    features = model.get_region_features(batch["pixel_values"], **{f"region_{kind}": regions}).pooler_output
    expected = manual_region_features(model, batch["pixel_values"], regions)
    assert torch.pdist(expected[0]).min() > 1e-3
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_regions_cost_one_image_pass(form):
    model = build_model("cloc", **form)
    images = []
    model.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: images.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    batch = build_batch("cloc", counts=(9, 2))
    model.get_region_features(batch["pixel_values"], batch["region_boxes"])
    model(**batch)
    model.ground(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    assert images == [2, 2, 2]


def test_the_embedding_follows_the_box():
    model = build_model("cloc")
    batch = build_batch("cloc", counts=(1,))
    boxes = batch["region_boxes"].requires_grad_()
    features = model.get_region_features(batch["pixel_values"], boxes).pooler_output
    assert (torch.autograd.grad(features.pow(2).sum(), boxes)[0].abs() > 1e-4).all()
    moved = boxes.detach() + 0.05
    assert (model.get_region_features(batch["pixel_values"], moved).pooler_output - features).abs().max() > 1e-3


def test_padded_regions_come_back_as_zeros():
    model, batch = build_model("cloc"), build_batch("cloc")
    real = batch["region_attention_mask"].bool()
    arguments = (batch["pixel_values"], batch["region_boxes"])
    masked = model.get_region_features(*arguments, batch["region_attention_mask"]).pooler_output
    assert masked[~real].abs().max() == 0
    torch.testing.assert_close(masked[real], model.get_region_features(*arguments).pooler_output[real])


@pytest.mark.parametrize("readout", ["prompt", "roi_align"])
def test_without_grounding(readout):
    model, batch = build_model("cloc", region_readout=readout, grounding=False), build_batch("cloc")
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "box_head" in name or "text_prompt" in name]
    assert any("prompter" in name for name in names) == (readout == "prompt")
    output = model(**batch)
    assert output.pred_boxes is None and set(output.loss_parts) == {"image_text", "region_text"}
    assert not model.can_ground and build_model("cloc").can_ground and not build_model("pixclip").can_ground
    with pytest.raises(ValueError, match="config.grounding"):
        model.ground(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("readout", ["prompt", "roi_align"])
def test_ground(readout):
    model, batch = build_model("cloc", text="llama", region_readout=readout), build_batch("cloc")
    ids, mask = build_texts(5, seed=7)
    found = model.ground(batch["pixel_values"], ids, mask)
    assert found.pred_boxes.shape == (3, 5, 4) and found.scores.shape == (3, 5)
    assert (found.pred_boxes[..., 2:] > found.pred_boxes[..., :2]).all()
    assert (found.pred_boxes[0] - found.pred_boxes[1]).abs().max() > 1e-3
    regions = model.get_region_features(batch["pixel_values"], found.pred_boxes).pooler_output
    texts = model.get_text_features(ids, mask).pooler_output
    torch.testing.assert_close(found.scores, F.cosine_similarity(regions, texts[None], dim=-1), atol=1e-5, rtol=1e-5)

    states = model.text_model(input_ids=ids[1:2, : mask[1].sum()]).last_hidden_state.mean(1)
    alone = model.ground(batch["pixel_values"][:1], text_states=states)
    torch.testing.assert_close(alone.pred_boxes[0, 0], found.pred_boxes[0, 1], atol=1e-5, rtol=1e-5)
    assert type(model.ground(batch["pixel_values"], ids, mask, return_dict=False)) is tuple


def test_the_box_of_a_region_text_is_the_grounded_one():
    model, batch = build_model("cloc"), build_batch("cloc")
    output = model(**batch)
    for image in range(3):
        found = model.ground(
            batch["pixel_values"][image : image + 1],
            batch["region_input_ids"][image],
            batch["region_text_attention_mask"][image],
        )
        real = batch["region_attention_mask"][image].bool()
        torch.testing.assert_close(found.pred_boxes[0][real], output.pred_boxes[image][real], atol=1e-5, rtol=1e-5)


def test_boxes_of_the_head_follow_its_formula():
    model = build_model("cloc")
    states = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    head = model.box_head
    for box, state in zip(head(states).tolist(), states, strict=True):
        raw = head.fc2(F.gelu(head.fc1(head.norm(state)))).tolist()
        cx, cy, w, h = (1 / (1 + math.exp(-value)) for value in raw)
        assert box == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-5)


def test_heads_of_the_prompter():
    model = CLOCModel(build_config("cloc", prompter_num_attention_heads=2, prompter_intermediate_size=20))
    assert model.prompter.layer.num_heads == 2 and model.prompter.layer.fc1.out_features == 20
    model = CLOCModel(build_config("cloc"))
    assert model.prompter.layer.num_heads == HEADS and model.prompter.layer.fc1.out_features == INNER
    with pytest.raises(ValueError, match="prompter_num_attention_heads"):
        CLOCModel(build_config("cloc", prompter_num_attention_heads=5))


def test_new_layers_start_as_wide_as_intended():
    torch.manual_seed(0)
    model = CLOCModel(build_config("cloc", projection_dim=64))
    for name in (
        "visual_projection",
        "region_projection",
        "prompter.box_fc1",
        "prompter.layer.v_proj",
        "prompter.layer.out_proj",
        "prompter.layer.content_key",
        "prompter.layer.text_content_query",
        "prompter.layer.fc1",
    ):
        linear = model.get_submodule(name)
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.1), name


def test_a_new_prompt_looks_into_its_box():
    layer = CLOCModel(build_config("cloc")).prompter.layer
    for projection in (layer.position_query, layer.position_key):
        assert torch.equal(projection.weight, QUERY_GAIN * torch.eye(WIDTH))
    for projection in (layer.content_query, layer.text_position_query, layer.prompt_proj, layer.fc2):
        assert not projection.weight.any()
    assert torch.equal(layer.prior_gain, torch.ones(HEADS))
    first = CLOCModel(build_config("cloc", prompter_layer="first")).prompter.layer
    for projection in (first.q_proj, first.k_proj):
        assert torch.equal(projection.weight, QUERY_GAIN * torch.eye(WIDTH))
    torch.manual_seed(0)
    positions = FourierPositions(512, 0.5)
    box = torch.tensor([0.1, 0.2, 0.4, 0.5])
    points = torch.tensor([[0.25, 0.35], [0.75, 0.85], [0.25, 0.95], [0.95, 0.35]])
    inside, *outside = positions(points) @ positions.over_boxes(box)
    assert inside > 3 * max(outside)


def test_trained_queries_survive_saving(tmp_path):
    model = build_model("cloc")
    model.save_pretrained(tmp_path)
    layer, again = model.prompter.layer, CLOCModel.from_pretrained(tmp_path).prompter.layer
    assert not torch.equal(layer.position_query.weight, layer.position_key.weight)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_grounding_leaves_out_texts_that_several_regions_of_an_image_have():
    model = build_model("cloc")
    batch = build_batch("cloc", counts=(3,))
    batch["region_input_ids"][0, 1] = batch["region_input_ids"][0, 0]
    batch["region_text_attention_mask"][0, 1] = batch["region_text_attention_mask"][0, 0]
    output = model(**batch)
    l1 = (output.pred_boxes[0, 2] - batch["region_boxes"][0, 2]).abs().sum()
    torch.testing.assert_close(output.loss_parts["grounding_l1"], l1)
    moved = batch["region_boxes"].clone()
    moved[0, :2] = torch.tensor([0.1, 0.1, 0.9, 0.9])
    assert model(**{**batch, "region_boxes": moved}).loss_parts["grounding_l1"] == output.loss_parts["grounding_l1"]


def test_what_prompts_is_said_where_boxes_and_masks_are_given():
    model, batch = build_model("cloc"), build_batch("cloc")
    masks = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) > 0.7
    both = {**batch, "region_masks": masks}
    for call in (lambda **more: model(**both, **more), lambda **more: model.get_region_features(
        both["pixel_values"], both["region_boxes"], region_masks=masks, **more
    )):  # fmt: skip
        with pytest.raises(ValueError, match="`prompt` must be 'box' or 'mask'"):
            call()
        with pytest.raises(ValueError, match="`prompt` must be one of 'box', 'mask', got 'point'"):
            call(prompt="point")
    by_box, by_mask = (model(**both, prompt=prompt) for prompt in ("box", "mask"))
    torch.testing.assert_close(by_box.region_embeds, model(**batch).region_embeds)
    assert (by_box.region_embeds - by_mask.region_embeds).abs().max() > 1e-2
    # Whatever prompts, the grounding loss is about the boxes.
    assert by_mask.loss_parts["grounding_l1"] == by_box.loss_parts["grounding_l1"]
    for prompt, missing in (("mask", "region_masks"), ("box", "region_boxes")):
        alone = {name: value for name, value in both.items() if name != missing}
        with pytest.raises(ValueError, match=f"`{missing}` must be given"):
            model(**alone, prompt=prompt)


def test_masks_alone_train_on_their_tight_boxes():
    model, batch = build_model("cloc"), build_batch("cloc")
    masks = torch.zeros(3, 3, 32, 32, dtype=torch.bool)
    masks[:, :, 6:27, 3:29] = torch.rand(3, 3, 21, 26, generator=torch.Generator().manual_seed(4)) > 0.8
    boxes = torch.stack([torch.stack([tight_box(mask) for mask in rows]) for rows in masks])
    del batch["region_boxes"]
    alone = model(**batch, region_masks=masks)
    both = model(**batch, region_masks=masks, region_boxes=boxes, prompt="mask")
    assert alone.loss == both.loss and alone.loss_parts.keys() == both.loss_parts.keys()


def test_the_embedding_follows_the_mask_inside_one_box():
    model, batch = build_model("cloc"), build_batch("cloc", counts=(1,))
    ring, full = torch.ones(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    ring[..., 8:24, 8:24] = 0
    features = [
        model.get_region_features(batch["pixel_values"], region_masks=mask).pooler_output for mask in (ring, full)
    ]
    assert (features[0] - features[1]).abs().max() > 1e-2
    for form in ({"prompter_prior": False}, {"prompter_layer": "first"}, {"region_readout": "roi_align"}):
        boxed = build_model("cloc", **form)
        by_ring, by_full = (
            boxed.get_region_features(batch["pixel_values"], region_masks=mask).pooler_output for mask in (ring, full)
        )
        assert not boxed.config.prompts_by_coverage and torch.equal(by_ring, by_full), form


def test_a_folder_of_the_first_edition_is_refused_by_its_version_or_loads_by_name(tmp_path):
    old = build_model("cloc", prompter_layer="first")
    old.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("prompter_layer") == "first"
    saved.pop("prompter_prior")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for load in (CLOCModel, CLOCVisionModel, AutoModel, AutoConfig):
        with pytest.raises(ValueError, match=r"pixclip-hf 0\.1.*prompter_layer=\"first\""):
            load.from_pretrained(tmp_path)
    batch = build_batch("cloc")
    for load in (CLOCModel, AutoModel):
        again = load.from_pretrained(tmp_path, prompter_layer="first")
        torch.testing.assert_close(again(**batch).loss, old(**batch).loss)
    new = CLOCModel(build_config("cloc"))
    new.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["prompter_layer"] == "soft_pooling"


def test_the_mean_readout_needs_the_first_layer():
    with pytest.raises(ValueError, match="`region_readout` 'mean'"):
        build_config("cloc", region_readout="mean")
    with pytest.raises(ValueError, match="`prompter_layer` must be one of 'soft_pooling', 'first', got 'second'"):
        build_config("cloc", prompter_layer="second")
