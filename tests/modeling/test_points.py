"""CLOC's points: their prompts against the formula, points among boxes and masks, and models without them."""

import pytest
import torch
import torch.nn.functional as F
from builders import build_batch, build_config, build_model, build_texts
from transformers import AutoModel
from transformers.utils.generic import find_labels

from pixclip_hf import CLOCModel, CLOCVisionModel
from pixclip_hf.modeling.modeling_points import point_windows
from pixclip_hf.modeling.modeling_prompter import PlacedTokens
from pixclip_hf.modeling.modeling_regions import boxes_around, patch_centers

GRID = (4, 4)
LABELS = torch.tensor([[[1, -1], [1, 0], [1, 1]]]).expand(3, -1, -1)


@pytest.fixture(scope="module")
def model():
    return build_model("cloc", prompter_points=True)


@pytest.fixture(scope="module")
def batch():
    return build_batch("cloc", captions=False, region_texts=False, counts=(3, 3, 3))


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(5)
    return {"region_points": torch.rand(3, 3, 2, 2, generator=generator), "region_point_labels": LABELS}


def embed(model, batch, **regions):
    pixels = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        return model.get_region_features(**pixels, **regions).pooler_output


def bilinear(point, grid):
    """Weights of the four patch centers around a point, written out."""
    rows, columns = grid
    weights = torch.zeros(rows, columns)
    x = min(max(point[0] * columns - 0.5, 0), columns - 1)
    y = min(max(point[1] * rows - 0.5, 0), rows - 1)
    for row in range(rows):
        for column in range(columns):
            weights[row, column] = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
    return weights.flatten()


def test_the_window_of_a_point_is_bilinear():
    points = [(0.3, 0.77), (0.0, 1.0), (0.5, 0.5), (0.99, 0.01), (1 / 6, 0.25)]
    windows = point_windows(torch.tensor(points), (2, 3))
    torch.testing.assert_close(windows, torch.stack([bilinear(p, (2, 3)) for p in points]), atol=1e-6, rtol=0)
    torch.testing.assert_close(windows.sum(-1), torch.ones(5))


def of_region(prompter, points, labels, content):
    """Coverage of the patches by the points of one region, written out."""
    mask, centers = prompter.point_mask, prompter.positions(patch_centers(GRID))
    query = {}
    for label, by_position, by_content in (
        (1, mask.position_query, mask.content_query),
        (0, mask.negative_position_query, mask.negative_content_query),
    ):
        own = [p for p, k in zip(points, labels, strict=True) if k == label]
        features = sum((prompter.positions(p) for p in own), torch.zeros(32)) / max(len(own), 1)
        under = sum((bilinear(p.tolist(), GRID) @ content for p in own), torch.zeros(32)) / max(len(own), 1)
        query[label] = by_position(features), by_content(under)
    by_position, by_content = (query[1][i] - query[0][i] for i in (0, 1))
    logits = [
        (by_position @ mask.position_key(centers[n]) + by_content @ mask.content_key(content[n])) / 32**0.5
        for n in range(16)
    ]
    return 1 / (1 + torch.exp(-(torch.stack(logits) + mask.bias)))


def test_point_prompts_equal_their_formula(points):
    model = build_model("cloc", prompter_points=True)
    prompter, head = model.prompter, model.prompter.point_prompt
    tokens = prompter.place(torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)), GRID)
    tokens = PlacedTokens(*(rows.detach() for rows in tokens))
    own = prompter.point_prompts(points["region_points"], LABELS, tokens, GRID)
    weights = dict(prompter.point_mask.named_parameters())
    aim = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((own.coverage * aim).sum(), list(weights.values()), retain_graph=True)
    regions = [
        [of_region(prompter, points["region_points"][b, r], LABELS[b, r], tokens.content[b]) for r in range(3)]
        for b in range(3)
    ]
    coverage = torch.stack([torch.stack(rows) for rows in regions])
    torch.testing.assert_close(own.coverage, coverage, atol=1e-5, rtol=1e-4)
    wanted = torch.autograd.grad((coverage * aim).sum(), list(weights.values()))
    for name, grad, other in zip(weights, grads, wanted, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(grad, other, atol=1e-4, rtol=1e-3)
    for b in range(3):
        for r in range(3):
            mean = own.coverage[b, r] @ prompter.positions(patch_centers(GRID))
            torch.testing.assert_close(own.positions[b, r], F.normalize(mean, dim=-1) * 4, atol=1e-5, rtol=1e-4)
            kept = [(p, int(k)) for p, k in zip(points["region_points"][b, r], LABELS[b, r], strict=True) if k >= 0]
            said = [
                prompter.positions(p) + head.types.weight[k] + head.content_proj(bilinear(p, GRID) @ tokens.content[b])
                for p, k in kept
            ]
            encoded = [head.fc2(F.gelu(head.fc1(rows))) for rows in said]
            torch.testing.assert_close(own.refinement[b, r], sum(encoded) / len(encoded), atol=1e-5, rtol=1e-4)


def test_every_part_of_a_point_reaches_the_embedding(model, batch, points):
    base = embed(model, batch, **points)
    moved = points["region_points"].clone()
    moved[:, 1, 1] = 1 - moved[:, 1, 1]  # the negative point of the second region
    changed = (embed(model, batch, **points | {"region_points": moved}) - base).abs().amax(-1)
    assert changed[:, 1].min() > 1e-4 and changed[:, [0, 2]].max() == 0
    flipped = LABELS.clone()
    flipped[:, 1, 1] = 1
    assert (
        (embed(model, batch, **points | {"region_point_labels": flipped}) - base).abs().amax(-1)[:, 1] > 1e-4
    ).all()


def test_padding_of_points_changes_nothing(model, batch, points):
    padded = {
        "region_points": F.pad(points["region_points"], (0, 0, 0, 2), value=0.3),
        "region_point_labels": F.pad(LABELS, (0, 2), value=-1),
    }
    torch.testing.assert_close(embed(model, batch, **padded), embed(model, batch, **points), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_points_among_boxes_or_masks(model, batch, points, kind):
    regions = {"region_boxes": batch["region_boxes"]}
    if kind == "mask":
        regions = {"region_masks": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)) > 0.5}
    labels = LABELS.clone()
    labels[:, 1] = -1
    mixed = embed(model, batch, **regions, region_points=points["region_points"], region_point_labels=labels)
    alone = {"point": embed(model, batch, **points), kind: embed(model, batch, **regions)}
    torch.testing.assert_close(mixed[:, 1], alone[kind][:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[:, ::2], alone["point"][:, ::2], atol=1e-5, rtol=1e-5)
    for prompt, wanted in alone.items():
        assert torch.equal(embed(model, batch, **regions, **points, prompt=prompt), wanted)
    assert (alone["point"] - alone[kind]).abs().max() > 1e-3


def test_points_train_with_the_boxes_of_their_regions(points):
    model = build_model("cloc", prompter_points=True)
    batch = build_batch("cloc", counts=(3, 3, 3))
    output = model(**batch, **points)
    output.loss.backward()
    assert set(output.loss_parts) == {"image_text", "region_text", "grounding_l1", "grounding_giou"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    used = [name for name, p in model.named_parameters() if "point" in name and p.grad.abs().max() > 0]
    assert len(used) == 6 + 7
    del batch["region_boxes"]
    with pytest.raises(ValueError, match="grounding loss needs `region_boxes` or `region_masks`"):
        model(**batch, **points)


def test_a_trainer_finds_no_targets_among_the_arguments():
    assert find_labels(CLOCModel) == []


def test_regions_without_a_box_are_not_grounded(model, points):
    batch = build_batch("cloc", counts=(3, 3, 3))
    boxes, labels = batch.pop("region_boxes").clone(), LABELS.clone()
    boxes[:, 1] = 0
    labels[:, ::2] = -1
    with torch.no_grad():
        output = model(**batch, region_boxes=boxes, **points | {"region_point_labels": labels})
        real = torch.tensor([[1, 0, 1]] * 3)
        alone = model.compute_loss(output, boxes + real.logical_not()[..., None] * torch.tensor([0, 0, 1.0, 1]), real)
        everywhere = model.compute_loss(output, boxes.clamp(min=0.1) + torch.tensor([0, 0, 0.1, 0.1]))
    for name in ("grounding_l1", "grounding_giou"):
        torch.testing.assert_close(output.loss_parts[name], alone[name])
        assert abs(everywhere[name] - alone[name]) > 1e-3


def test_a_new_soft_mask_lies_around_its_positive_points():
    torch.manual_seed(0)
    prompter = CLOCModel(build_config("cloc", prompter_points=True)).prompter
    assert not any(projection.weight.any() for projection in prompter.point_mask.zeros)
    assert 0.8 < prompter.point_prompt.types.weight.std() < 1.2
    grid = (8, 8)
    tokens = prompter.place(torch.randn(1, 64, 32), grid)
    corners = torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    with torch.no_grad():
        one = prompter.point_prompts(corners[:1][None, None], torch.tensor([[[1]]]), tokens, grid).coverage[0, 0]
        less = prompter.point_prompts(corners[None, None], torch.tensor([[[1, 0]]]), tokens, grid).coverage[0, 0]
    far = (patch_centers(grid) - corners[0]).norm(dim=-1) > 0.6
    assert one.argmax() == 0 and one.max() > 5 * one[far].max()
    assert less[-1] < one[-1] / 5


def test_folders_with_and_without_points(tmp_path, model, batch, points):
    model.save_pretrained(tmp_path / "with")
    loaded = AutoModel.from_pretrained(tmp_path / "with")
    assert loaded.config.prompts == ("box", "mask", "point")
    assert torch.equal(embed(loaded, batch, **points), embed(model, batch, **points))
    vision = CLOCVisionModel.from_pretrained(tmp_path / "with")
    assert torch.equal(embed(vision, batch, **points), embed(model, batch, **points))

    plain = build_model("cloc")
    assert plain.config.prompts == ("box", "mask")
    plain.save_pretrained(tmp_path / "without")
    grown, info = CLOCModel.from_pretrained(tmp_path / "without", prompter_points=True, output_loading_info=True)
    wanted = {name for name, _ in grown.named_parameters() if ".point_" in name}
    assert len(wanted) == 6 + 7
    assert set(info["missing_keys"]) == wanted and not info["unexpected_keys"]
    boxes = {"region_boxes": batch["region_boxes"]}
    assert torch.equal(embed(grown, batch, **boxes), embed(plain, batch, **boxes))
    assert not any(projection.weight.any() for projection in grown.prompter.point_mask.zeros)


def test_models_without_points_refuse_them(batch, points):
    plain = build_model("cloc")
    boxes = {"region_boxes": batch["region_boxes"]}
    with pytest.raises(ValueError, match="`region_points` needs a CLOC with `config.prompter_points=True`, got False"):
        embed(plain, batch, **boxes, **points)
    with pytest.raises(ValueError, match="`prompt` must be one of 'box', 'mask', got 'point'"):
        embed(plain, batch, **boxes, prompt="point")
    for changes in ({"region_readout": "roi_align"}, {"prompter_layer": "first"}):
        with pytest.raises(ValueError, match="`prompter_points` needs `region_readout='prompt'`"):
            build_config("cloc", prompter_points=True, **changes)


BAD = [
    (lambda p, k: {"region_points": p}, "`region_point_labels` must be given"),
    (lambda p, k: {"region_point_labels": k}, "`region_points` must be given"),
    (lambda p, k: {"region_points": p[..., 0], "region_point_labels": k}, r"`region_points` must have shape"),
    (lambda p, k: {"region_points": p, "region_point_labels": k[..., :1]}, r"got \(3, 3, 2, 2\) and \(3, 3, 1\)"),
    (lambda p, k: {"region_points": p, "region_point_labels": k + 1}, r"must be 1, 0 or -1 \(padding\), got"),
    (
        lambda p, k: {"region_points": p, "region_point_labels": k.clamp(max=0)},
        r"labels\[0, 0\]` must hold a positive",
    ),
    (lambda p, k: {"region_points": p[:, :2], "region_point_labels": k[:, :2], "boxes": True}, "as many region slots"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_points(model, batch, points, change, message):
    arguments = change(points["region_points"], LABELS)
    if arguments.pop("boxes", False):
        arguments["region_boxes"] = batch["region_boxes"]
    with pytest.raises(ValueError, match=message):
        embed(model, batch, **arguments)


def test_steady_scores_are_means_over_boxes_around(model, batch):
    ids, mask = build_texts(4)
    arguments = {"pixel_values": batch["pixel_values"], "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        plain, steady = (model.ground(**arguments, steady_scores=on) for on in (False, True))
        texts = F.normalize(model.get_text_features(ids, mask).pooler_output, dim=-1)
        assert torch.equal(plain.pred_boxes, steady.pred_boxes)
        known = model.ground(batch["pixel_values"], text_embeds=5 * texts)
        torch.testing.assert_close(known.pred_boxes, plain.pred_boxes)
    around = boxes_around(plain.pred_boxes)
    assert torch.allclose(around[:, :, 0], plain.pred_boxes.clamp(0, 1))
    own = F.normalize(embed(model, batch, region_boxes=plain.pred_boxes), dim=-1)
    embeds = F.normalize(embed(model, batch, region_boxes=around.flatten(1, 2)), dim=-1).unflatten(1, (4, 6))
    cosines = (embeds * texts[:, None]).sum(-1)
    torch.testing.assert_close(plain.scores, (own * texts).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steady.scores, cosines.mean(-1), atol=1e-5, rtol=1e-5)
    assert (steady.scores - plain.scores).abs().max() > 1e-4
    with pytest.raises(ValueError, match="One of `text_embeds` and `input_ids` or `text_states` must be given"):
        model.ground(**arguments, text_embeds=texts)


def test_boxes_around_a_box():
    around = boxes_around(torch.tensor([0.2, 0.4, 0.6, 0.5]))
    wanted = [[0.2, 0.4, 0.6, 0.5], [0.24, 0.41, 0.56, 0.49], [0.152, 0.4, 0.552, 0.5], [0.248, 0.4, 0.648, 0.5],
              [0.2, 0.388, 0.6, 0.488], [0.2, 0.412, 0.6, 0.512]]  # fmt: skip
    torch.testing.assert_close(around, torch.tensor(wanted))
    assert boxes_around(torch.tensor([0.0, 0.0, 1.0, 1.0])).max() == 1
