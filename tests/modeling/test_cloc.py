"""CLOC's Prompter against the full self-attention layer of torch, its readouts, positions and grounding."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import build_batch, build_config, build_model, build_texts, shake
from torch import nn

from pixclip_hf import CLOCModel
from pixclip_hf.modeling.modeling_prompter import QUERY_GAIN, CLOCPrompterLayer, FourierPositions

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
    return shake(CLOCPrompterLayer(WIDTH, HEADS, INNER))


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
    added = prompter.place(tokens, (4, 4)) - prompter.token_norm(tokens)
    seen = []
    hook = prompter.box_fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # Corners on the centres of patches 1 (row 0, column 1) and 11 (row 2, column 3).
    prompter.box_prompts(torch.tensor([[[0.375, 0.125, 0.875, 0.625]]]))
    hook.remove()
    torch.testing.assert_close(seen[0][0, 0], torch.cat([added[0, 1], added[0, 11]]), atol=1e-5, rtol=1e-5)


def test_a_non_square_image_keeps_its_geometry():
    model = build_model("cloc")
    tokens = torch.zeros(1, 6, WIDTH)
    added = model.prompter.place(tokens, (2, 3)) - model.prompter.token_norm(tokens)
    centers = torch.tensor([[(c + 0.5) / 3, (r + 0.5) / 2] for r in range(2) for c in range(3)])
    torch.testing.assert_close(added[0], model.prompter.positions(centers), atol=1e-6, rtol=1e-5)


def box_mean(positions, box, steps=400):
    """The features averaged over a fine grid of points of a box, at the length of one point's features."""
    share = (torch.arange(steps) + 0.5) / steps
    x, y = (box[k] + (box[k + 2] - box[k]) * share for k in (0, 1))
    mean = positions(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).mean((0, 1))
    return mean / mean.norm() * positions(torch.zeros(2)).norm()


def manual_region_features(model, pixel_values, boxes, readout):
    """From the tower's output on, one image and one box at a time."""
    states = model.vision_model(pixel_values=pixel_values).last_hidden_state
    tokens = states[:, 1:] if model.config.vision_config.model_type.startswith("clip") else states
    assert tokens.shape[1] == 16
    rows = []
    for image, image_boxes in zip(tokens, boxes, strict=True):
        for box in image_boxes:
            if readout == "roi_align":
                cells = 14
                steps = (torch.arange(cells) + 0.5) / cells
                grid = image.T.reshape(1, WIDTH, 4, 4)
                x, y = (box[k] + (box[k + 2] - box[k]) * steps for k in (0, 1))
                at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] * 2 - 1
                state = F.grid_sample(grid, at, padding_mode="border", align_corners=False).mean((2, 3))[0]
            else:
                prompter = model.prompter
                centers = torch.tensor([[(c + 0.5) / 4, (r + 0.5) / 4] for r in range(4) for c in range(4)])
                placed = prompter.token_norm(image) + prompter.positions(centers)
                corners = torch.cat([prompter.positions(box[:2]), prompter.positions(box[2:])])
                prompt = box_mean(prompter.positions, box) + prompter.box_fc2(F.gelu(prompter.box_fc1(corners)))
                out = torch_layer(prompter.layer)(torch.cat([prompt[None], placed])[None])[0]
                state = out[0] if readout == "prompt" else out.mean(0)
            rows.append(model.region_projection(model.region_norm(state)))
    return torch.stack(rows).reshape(*boxes.shape[:2], -1)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("readout", ["prompt", "mean", "roi_align"])
def test_region_features_equal_the_long_way(readout, vision):
    model = build_model("cloc", vision, region_readout=readout)
    batch = build_batch("cloc")
    features = model.get_region_features(batch["pixel_values"], batch["region_boxes"]).pooler_output
    expected = manual_region_features(model, batch["pixel_values"], batch["region_boxes"], readout)
    assert torch.pdist(expected[0]).min() > 1e-3
    torch.testing.assert_close(features, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("readout", ["prompt", "mean", "roi_align"])
def test_regions_cost_one_image_pass(readout):
    model = build_model("cloc", region_readout=readout)
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
        "prompter.layer.fc2",
    ):
        linear = model.get_submodule(name)
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.1), name


def test_a_new_prompt_looks_into_its_box():
    layer = CLOCModel(build_config("cloc")).prompter.layer
    for projection in (layer.q_proj, layer.k_proj):
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
    assert not torch.equal(layer.q_proj.weight, layer.k_proj.weight)
    assert torch.equal(layer.q_proj.weight, again.q_proj.weight)


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
