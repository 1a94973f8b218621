"""PixCLIP's mask prompt: nothing at the start, everything after training; its region modes and its branches."""

import pytest
import torch
import torch.nn.functional as F
from builders import (
    FAMILIES,
    MODELS,
    VISION_KINDS,
    build_batch,
    build_config,
    build_model,
    contrastive_by_loops,
    run_ranks,
    vision_config,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from pixclip_hf import PixCLIPModel, PixCLIPVisionModel
from pixclip_hf.modeling.modeling_vision import MaskedPatchConv

both_towers = pytest.mark.parametrize("vision", VISION_KINDS)


def patch_conv(model):
    (conv,) = (module for module in model.modules() if isinstance(module, MaskedPatchConv))
    return conv


def new_model(vision="clip", **changes):
    """As a user builds it, with the mask projection untouched."""
    torch.manual_seed(0)
    return PixCLIPModel(build_config("pixclip", vision, **changes)).eval()


def plain_tower(model):
    """The tower that the weights of a model came from."""
    tower = AutoModel.from_config(model.config.vision_config).eval()
    state = {key: value for key, value in model.vision_model.state_dict().items() if ".mask_" not in key}
    tower.load_state_dict(state, strict=True)
    assert not isinstance(tower.get_input_embeddings(), MaskedPatchConv)
    return tower


def test_the_patch_projection_equals_one_convolution_over_four_channels():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 4, stride=4)
    masked = MaskedPatchConv(conv, mask_bias=True)
    nn.init.normal_(masked.mask_weight)
    nn.init.normal_(masked.mask_bias)
    four = nn.Conv2d(4, 6, 4, stride=4)
    with torch.no_grad():
        four.weight.copy_(torch.cat([conv.weight, masked.mask_weight], 1))
        four.bias.copy_(conv.bias + masked.mask_bias)
    pixels = torch.randn(2, 4, 12, 8)
    torch.testing.assert_close(masked(pixels), four(pixels), atol=1e-5, rtol=1e-5)
    assert torch.equal(masked(pixels[:, :3]), conv(pixels[:, :3]))
    assert masked.weight is conv.weight and masked.bias is conv.bias


@both_towers
@pytest.mark.parametrize("mask_bias", [False, True])
def test_a_new_model_equals_its_tower_bit_for_bit(vision, mask_bias):
    model = new_model(vision, mask_bias=mask_bias)
    tower, batch = plain_tower(model), build_batch("pixclip")
    pixels, masks = batch["pixel_values"], batch["region_masks"]
    assert patch_conv(model).mask_weight.abs().max() == 0
    assert (patch_conv(model).mask_bias is not None) == mask_bias
    expected = model.visual_projection(tower(pixel_values=pixels).pooler_output)
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)
    assert torch.equal(model.get_image_features(pixels, use_mask=False).pooler_output, expected)
    repeated = pixels.repeat_interleave(3, 0)
    expected = model.visual_projection(tower(pixel_values=repeated).pooler_output).unflatten(0, (3, 3))
    for given in (masks, torch.ones_like(masks), torch.zeros_like(masks), masks.float() * 0.3):
        assert torch.equal(model.get_region_features(pixels, given).pooler_output, expected)


@both_towers
def test_the_tower_keeps_its_own_initialization(vision):
    torch.manual_seed(3)
    tower = AutoModel.from_config(build_config("pixclip", vision).vision_config)
    torch.manual_seed(3)
    model = PixCLIPModel(build_config("pixclip", vision))
    state = {key: value for key, value in model.vision_model.state_dict().items() if ".mask_" not in key}
    assert set(state) == set(tower.state_dict())
    for key, value in tower.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds garbage."""
    counts = {"filled": 0}

    def poisoned(original):
        def create(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(7.7)
                counts["filled"] += 1
            return tensor

        return create

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return counts


@both_towers
@pytest.mark.parametrize("model_class", [PixCLIPModel, PixCLIPVisionModel])
def test_a_checkpoint_without_the_mask_projection_gets_zeros(vision, model_class, tmp_path, poison):
    model = new_model(vision, mask_bias=True)
    expected = model.get_image_features(build_batch("pixclip")["pixel_values"]).pooler_output
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if ".mask_" not in key}
    assert len(state) - len(kept) == 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    poison["filled"] = 0
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert poison["filled"] > 0 and {key.rsplit(".", 1)[1] for key in info["missing_keys"]} == {
        "mask_weight",
        "mask_bias",
    }
    conv = patch_conv(loaded)
    assert conv.mask_weight.abs().max() == 0 and conv.mask_bias.abs().max() == 0
    assert torch.equal(loaded.get_image_features(build_batch("pixclip")["pixel_values"]).pooler_output, expected)


@both_towers
@pytest.mark.parametrize("mask_bias", [False, True])
def test_a_trained_mask_projection_survives_saving(vision, mask_bias, tmp_path):
    model = build_model("pixclip", vision, mask_bias=mask_bias)
    model.save_pretrained(tmp_path)
    for model_class in (PixCLIPModel, PixCLIPVisionModel):
        loaded = patch_conv(model_class.from_pretrained(tmp_path))
        assert torch.equal(loaded.mask_weight, patch_conv(model).mask_weight) and loaded.mask_weight.abs().max() > 0
        if mask_bias:
            assert torch.equal(loaded.mask_bias, patch_conv(model).mask_bias) and loaded.mask_bias.abs().max() > 0


@both_towers
def test_after_training_the_mask_decides(vision):
    model, batch = build_model("pixclip", vision), build_batch("pixclip")
    pixels, masks = batch["pixel_values"], batch["region_masks"]
    features = model.get_region_features(pixels, masks).pooler_output
    assert min(torch.pdist(image).min() for image in features) > 1e-3
    one_pixel = masks.clone()
    one_pixel[0, 0, 3, 3] ^= True
    changed = model.get_region_features(pixels, one_pixel).pooler_output - features
    assert changed[0, 0].abs().max() > 1e-5 and changed[1:].abs().max() == 0
    whole = model.get_region_features(pixels, torch.ones_like(masks[:, :1])).pooler_output[:, 0]
    torch.testing.assert_close(whole, model.get_image_features(pixels).pooler_output)
    assert (model.get_image_features(pixels, use_mask=False).pooler_output - whole).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_the_mask_enters_scaled(dtype):
    model = build_model("pixclip", mask_mean=0.4, mask_std=0.2)
    batch = build_batch("pixclip")
    entering = []
    patch_conv(model).register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model.get_region_features(batch["pixel_values"], batch["region_masks"].to(dtype), batch["region_attention_mask"])
    real = batch["region_attention_mask"].bool()
    expected = torch.where(batch["region_masks"][real], torch.tensor(3.0), torch.tensor(-2.0))
    torch.testing.assert_close(entering[0][:, 3], expected)
    assert torch.equal(entering[0][:, :3], batch["pixel_values"][real.nonzero()[:, 0]])


def test_the_default_scaling_is_that_of_alpha_clip():
    config = build_config("pixclip")
    assert (1 - config.mask_mean) / config.mask_std == pytest.approx(1.923, abs=1e-3)


@both_towers
def test_pooled_features_equal_the_long_way(vision):
    model, batch = build_model("pixclip", vision), build_batch("pixclip")
    masks = batch["region_masks"]
    masks[0, 1] = False
    masks[0, 1, 9, 30] = True
    tokens = model.get_image_features(batch["pixel_values"]).last_hidden_state
    tower, rows = model.vision_model, []
    for image, image_masks in zip(tokens, masks, strict=True):
        for mask in image_masks:
            total, count = 0, 0
            for row in range(32):
                for column in range(32):
                    if mask[row, column]:
                        patch = image[(vision != "siglip") + row // 8 * 4 + column // 8]
                        total = total + (tower.post_layernorm(patch) if vision != "siglip" else patch)
                        count += 1
            state = total / count
            if vision == "siglip":
                attention, head = tower.head.attention, tower.head
                value = attention.in_proj_weight[64:] @ state + attention.in_proj_bias[64:]
                state = attention.out_proj(value)
                state = state + head.mlp(head.layernorm(state))
            rows.append(model.visual_projection(state))
    features = model.get_region_features(batch["pixel_values"], masks, mode="pooled").pooler_output
    torch.testing.assert_close(features.flatten(0, 1), torch.stack(rows), atol=1e-4, rtol=1e-4)
    assert torch.pdist(features[0]).min() > 1e-3


def test_what_each_mode_costs():
    model, batch = build_model("pixclip"), build_batch("pixclip")
    images = []
    patch_conv(model).register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    arguments = (batch["pixel_values"], batch["region_masks"], batch["region_attention_mask"])
    prompted = model.get_region_features(*arguments)
    pooled = model.get_region_features(*arguments, mode="pooled")
    assert images == [6, 3]
    real = batch["region_attention_mask"].bool()
    for output in (prompted, pooled):
        assert output.pooler_output.shape == (3, 3, 16)
        assert output.pooler_output[~real].abs().max() == 0 and output.pooler_output[real].abs().max() > 0
    assert (prompted.pooler_output - pooled.pooler_output).abs().max() > 1e-3
    assert (len(prompted.last_hidden_state), len(pooled.last_hidden_state)) == (6, 3)


def test_many_regions_are_prompted_in_parts():
    model, batch = build_model("pixclip"), build_batch("pixclip")
    assert model.max_regions_per_forward == 64
    model.max_regions_per_forward = 4
    rows = []
    patch_conv(model).register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    arguments = (batch["pixel_values"], batch["region_masks"], batch["region_attention_mask"])
    whole = model.get_region_features(*arguments, output_hidden_states=True)
    with torch.no_grad():
        parts = model.get_region_features(*arguments, output_hidden_states=True)
        pooled = model.get_region_features(*arguments, mode="pooled")
    # With gradients in one pass, without them in parts, pooled in one pass per image.
    assert rows == [6, 4, 2, 3] and len(pooled.pooler_output) == 3
    for name in ("pooler_output", "last_hidden_state", "hidden_states"):
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-5)
    assert torch.pdist(parts.pooler_output[0]).min() > 1e-3
    with pytest.raises(ValueError, match="`max_regions_per_forward`.*0"):
        model.max_regions_per_forward = 0


def test_forward_takes_the_mode():
    model, batch = build_model("pixclip"), build_batch("pixclip", region_texts=False, captions=False)
    for mode in ("prompted", "pooled"):
        features = model.get_region_features(batch["pixel_values"], batch["region_masks"], mode=mode).pooler_output
        expected = F.normalize(features, dim=-1)
        arguments = (batch["pixel_values"], batch["region_masks"])
        torch.testing.assert_close(model(*arguments, mode=mode).region_embeds, expected, atol=1e-5, rtol=1e-4)
        vision = PixCLIPVisionModel(model.config).eval()
        vision.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(vision(*arguments, mode=mode).region_embeds, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="mode.*'prompted', 'pooled'.*'both'"):
        model.get_region_features(batch["pixel_values"], batch["region_masks"], mode="both")


def test_crops_are_embedded_as_regions():
    model, batch = build_model("pixclip"), build_batch("pixclip")
    output = model(**batch)
    for b, r in batch["region_attention_mask"].nonzero().tolist():
        crop, mask = batch["crop_pixel_values"][b, r][None], batch["crop_masks"][b, r][None, None]
        features = model.get_region_features(crop, mask).pooler_output[0, 0]
        torch.testing.assert_close(output.crop_embeds[b, r], F.normalize(features, dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("captions", [True, False])
def test_loss_parts_follow_the_batch(crops, captions):
    model, batch = build_model("pixclip"), build_batch("pixclip", crops, captions)
    parts = model(**batch).loss_parts
    features = model.get_region_features(batch["pixel_values"], batch["region_masks"]).pooler_output
    texts = model.get_text_features(
        batch["region_input_ids"].flatten(0, 1), batch["region_text_attention_mask"].flatten(0, 1)
    ).pooler_output
    real = batch["region_attention_mask"].bool()
    scale = model.logit_scale().detach()
    regions, texts = (F.normalize(rows, dim=-1).detach().double() for rows in (features[real], texts[real.flatten()]))
    expected = {"mask_text": contrastive_by_loops(regions, texts, scale)}
    if captions:
        images = F.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
        captions = F.normalize(
            model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output, dim=-1
        )
        expected["image_text"] = contrastive_by_loops(images.double(), captions.double(), scale)
    if crops:
        crop_features = model.get_region_features(
            batch["crop_pixel_values"].flatten(0, 1), batch["crop_masks"].flatten(0, 1)[:, None]
        ).pooler_output.unflatten(0, (3, 3))[:, :, 0]
        crop_rows = F.normalize(crop_features[real], dim=-1).detach().double()
        expected["crop_text"] = contrastive_by_loops(crop_rows, texts, scale)
        pooled = model.get_region_features(batch["pixel_values"], batch["region_masks"], mode="pooled").pooler_output
        expected["local_global"] = (1 - F.cosine_similarity(pooled[real].double(), crop_rows, dim=-1)).mean()
    assert set(parts) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name].item(), value.item(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_third_branch_may_contrast_pooled_regions_with_all_crops(ranks):
    model, batch = build_model("pixclip", local_global_objective="contrastive"), build_batch("pixclip", captions=False)
    batch["region_input_ids"][2, 1] = batch["region_input_ids"][0, 0]
    batch["region_text_attention_mask"][2, 1] = batch["region_text_attention_mask"][0, 0]
    output = model(**batch)
    real, scale = batch["region_attention_mask"].bool(), model.logit_scale()
    rows = [unit[real].detach().double() for unit in (output.pooled_region_embeds, output.crop_embeds)]
    rows[0].requires_grad_()
    expected = contrastive_by_loops(*rows, scale, ids=output.region_text_ids[real])
    assert not torch.allclose(expected, contrastive_by_loops(*rows, scale))

    def on_rank(rank, gather):
        output = model(**batch)
        output.pooled_region_embeds.retain_grad()
        output.crop_embeds.retain_grad()
        parts = model.compute_loss(output, batch["region_masks"], batch["region_attention_mask"], gather, ranks)
        return output, parts["local_global"]

    if ranks == 1:
        output, loss = on_rank(0, None)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(output.pooled_region_embeds.grad[real].double(), rows[0].grad, atol=1e-5, rtol=1e-3)
        assert output.crop_embeds.grad is None
    else:
        twice = [torch.cat([part, part]) for part in rows]
        ids = output.region_text_ids[real].repeat(2)
        expected = contrastive_by_loops(*twice, scale, ids=ids)
        loss = torch.stack([loss for _, loss in run_ranks(2, on_rank)]).mean()
    torch.testing.assert_close(loss.item(), expected.item(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", ["cosine", "contrastive"])
def test_the_third_branch_trains_the_whole_image_only(objective):
    weights = {f"{name}_loss_weight": 0.0 for name in ("mask_text", "crop_text", "image_text")}
    model = build_model("pixclip", local_global_objective=objective, **weights)
    batch = build_batch("pixclip")
    batch["pixel_values"].requires_grad_()
    batch["crop_pixel_values"].requires_grad_()
    output = model(**batch)
    assert set(output.loss_parts) == {"local_global"}
    output.loss.backward()
    assert batch["pixel_values"].grad.abs().max() > 0
    assert batch["crop_pixel_values"].grad is None or batch["crop_pixel_values"].grad.abs().max() == 0


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"crop_masks": None}, "crop_masks"),
        ({"crop_masks": torch.ones(3, 3, 16, 16)}, "crop_masks"),
        ({"crop_pixel_values": torch.zeros(3, 2, 3, 32, 32)}, "crop_pixel_values"),
    ],
)
def test_crops_that_do_not_fit_are_refused(changed, name):
    with pytest.raises(ValueError, match=name):
        build_model("pixclip")(**build_batch("pixclip") | changed)


def test_the_objective_of_the_third_branch_is_one_of_two():
    with pytest.raises(ValueError, match="`local_global_objective` must be one of 'cosine', 'contrastive', got 'l2'"):
        build_config("pixclip", local_global_objective="l2")


def test_mask_std_must_be_positive():
    with pytest.raises(ValueError, match="mask_std"):
        build_config("pixclip", mask_std=0.0)


def test_a_tower_without_patches_is_refused():
    no_tower = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "patch_size": 8}
    for family in FAMILIES:
        with pytest.raises(ValueError, match="vision_config.image_size.*bert"):
            build_config(family, vision_config=no_tower)
        with pytest.raises(ValueError, match="`vision_config` must describe a vision tower, got 'bert'"):
            MODELS[family](build_config(family, vision_config=no_tower | {"image_size": 32, "num_hidden_layers": 1}))


def test_a_tower_without_pooling_head_is_refused():
    config = build_config("pixclip", vision_config=vision_config("siglip", vision_use_head=False))
    with pytest.raises(ValueError, match="vision_use_head"):
        PixCLIPModel(config)


def test_the_visual_projection_starts_as_wide_as_intended():
    model = new_model(projection_dim=64)
    assert model.visual_projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
