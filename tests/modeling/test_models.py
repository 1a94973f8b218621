"""What both models promise, for every kind of vision and text tower: outputs, files, padding, gradients, losses."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import (
    CONFIGS,
    FAMILIES,
    MODELS,
    TEXT_KINDS,
    VISION_KINDS,
    VISION_MODELS,
    build_batch,
    build_config,
    build_model,
    build_texts,
    contrastive_by_loops,
    loss_names,
    region_key,
    run_ranks,
    text_config,
    vision_config,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from pixclip_hf import CLOCOutput, PixCLIPOutput
from pixclip_hf.modeling import modeling_outputs
from pixclip_hf.modeling.modeling_losses import grounding_losses
from pixclip_hf.modeling.modeling_outputs import RegionVisionOutput, derived

PER_REGION = (
    "region_embeds",
    "region_text_embeds",
    "logits_per_region",
    "pred_boxes",
    "crop_embeds",
    "pooled_region_embeds",
)
# Three images by three texts look like three slots of three images.
ONE_PER_TEXT = ("logits_per_image", "logits_per_text")
close = {"atol": 2e-5, "rtol": 1e-4}

every_kind = pytest.mark.parametrize(
    "case",
    [(f, v, t) for f in FAMILIES for v in VISION_KINDS for t in TEXT_KINDS if v != "eva02" or t == "llama"],
    ids="-".join,
    indirect=True,
)
every_vision = pytest.mark.parametrize(
    "case", [(f, v, "llama") for f in FAMILIES for v in VISION_KINDS], ids="-".join, indirect=True
)
both = pytest.mark.parametrize("case", [(f, "clip", "clip_text") for f in FAMILIES], ids="-".join, indirect=True)


@pytest.fixture
def case(request):
    family, vision, text = request.param
    return SimpleNamespace(
        family=family,
        vision=vision,
        text=text,
        model=build_model(family, vision, text),
        batch=build_batch(family),
        regions=region_key(family),
        build=lambda **changes: build_model(family, vision, text, **changes),
    )


def assert_equal_outputs(output, other, **tolerance):
    assert output.keys() == other.keys()
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for name, part in (output.get("loss_parts") or {}).items():
        torch.testing.assert_close(part, other.loss_parts[name], **tolerance)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Outputs


@every_kind
def test_outputs_have_the_declared_shapes(case):
    output = case.model(**case.batch)
    shapes = {
        "loss": (),
        "region_embeds": (3, 3, 16),
        "image_embeds": (3, 16),
        "text_embeds": (3, 16),
        "region_text_embeds": (3, 3, 16),
        "logits_per_region": (3, 3, 3),
        "logits_per_image": (3, 3),
        "logits_per_text": (3, 3),
        "text_ids": (3,),
        "region_text_ids": (3, 3),
    }
    if case.family == "cloc":
        shapes["pred_boxes"] = (3, 3, 4)
    else:
        shapes |= {"crop_embeds": (3, 3, 16), "pooled_region_embeds": (3, 3, 16)}
    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
    assert set(output) - set(tensors) == {"loss_parts", "vision_model_output", "text_model_output"}
    assert set(output.loss_parts) == loss_names(case.family)
    real = case.batch["region_attention_mask"].bool()
    for name, embeds in output.items():
        if name.endswith("_embeds"):
            rows = embeds[real] if name in PER_REGION else embeds
            torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
            assert torch.pdist(rows).min() > 1e-4, name


@every_vision
def test_features_are_the_embeddings_before_normalization(case):
    output, batch = case.model(**case.batch), case.batch
    real = batch["region_attention_mask"].bool()
    pairs = [
        (case.model.get_image_features(batch["pixel_values"]), output.image_embeds),
        (case.model.get_text_features(batch["input_ids"], batch["attention_mask"]), output.text_embeds),
        (case.model.get_region_features(batch["pixel_values"], batch[case.regions]), output.region_embeds),
    ]
    for features, embeds in pairs:
        rows = features.pooler_output
        assert (rows.norm(dim=-1) - 1).abs().max() > 1e-2
        if rows.ndim == 3:
            rows, embeds = rows[real], embeds[real]
        torch.testing.assert_close(F.normalize(rows, dim=-1), embeds, **close)


@both
def test_logits_are_scaled_cosines(case):
    output = case.model(**case.batch)
    scale = case.model.get_logit_scale()
    image_scale = case.model.logit_scale()
    for i in range(3):
        for t in range(3):
            cosine = (output.image_embeds[i] * output.text_embeds[t]).sum()
            torch.testing.assert_close(output.logits_per_image[i, t], image_scale * cosine, **close)
            assert output.logits_per_text[t, i] == output.logits_per_image[i, t]
            cosine = (output.region_embeds[i, 0] * output.text_embeds[t]).sum()
            torch.testing.assert_close(output.logits_per_region[i, 0, t], scale * cosine, **close)
    if case.family == "cloc":
        assert scale != image_scale


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_output_takes_part_in_chunked_training(family):
    """Unless it says that it is derived; and what a loss reads is not."""
    output_class = {"cloc": CLOCOutput, "pixclip": PixCLIPOutput}[family]

    @dataclass
    class Output(output_class):
        new_embeds: torch.Tensor | None = None
        new_logits: torch.Tensor | None = derived()

    assert Output.representations() == (*output_class.representations(), "new_embeds")
    model, batch = build_model(family), build_batch(family)
    output = model(**{**batch, "return_loss": False})
    read = type(output)(**{name: output[name] for name in output.representations() if name in output})
    regions = (batch[region_key(family)], batch["region_attention_mask"])
    parts = model.compute_loss(read, *regions)
    assert parts.keys() == loss_names(family)
    for name, part in model.compute_loss(output, *regions).items():
        assert torch.equal(parts[name], part)


@both
def test_images_alone_and_texts_of_any_number(case):
    pixels = case.batch["pixel_values"]
    assert set(case.model(pixels).keys()) == {"image_embeds", "vision_model_output"}
    ids, mask = build_texts(5)
    output = case.model(pixels, case.batch[case.regions], input_ids=ids, attention_mask=mask)
    assert output.loss is None
    assert output.logits_per_image.shape == (3, 5) and output.logits_per_region.shape == (3, 3, 5)


@every_vision
def test_hidden_states_and_tuples(case):
    batch = case.batch
    arguments = {"get_image_features": (batch["pixel_values"],)}
    arguments["get_region_features"] = (batch["pixel_values"], batch[case.regions])
    arguments["get_text_features"] = (batch["input_ids"], batch["attention_mask"])
    for name, given in arguments.items():
        method = getattr(case.model, name)
        output = method(*given, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        as_tuple = method(*given, return_dict=False)
        assert type(as_tuple) is tuple and any(torch.equal(output.pooler_output, part) for part in as_tuple)
    output, as_tuple = case.model(**batch), case.model(**batch, return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == len(output)
    assert torch.equal(as_tuple[0], output.loss)


@both
def test_the_vision_model_returns_tuples_too(case):
    vision = VISION_MODELS[case.family](case.model.config).eval()
    given = (case.batch["pixel_values"], case.batch[case.regions])
    output, as_tuple = vision(*given), vision(*given, return_dict=False)
    assert list(output.keys()) == ["image_embeds", "region_embeds", "last_hidden_state"]
    assert type(as_tuple) is tuple and len(as_tuple) == 3


@every_vision
def test_larger_images_with_interpolated_positions(case):
    pixels = torch.randn(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    regions = torch.ones(1, 1, 48, 40) if case.family == "pixclip" else torch.tensor([[[0.1, 0.2, 0.7, 0.9]]])
    output = case.model(pixels, regions, interpolate_pos_encoding=True)
    assert output.region_embeds.shape == (1, 1, 16) and output.region_embeds.isfinite().all()


# Saving and loading


def own_fields(config):
    """A configuration without what saving notes down by itself."""
    config = {name: value for name, value in config.items() if name not in ("dtype", "architectures", "_name_or_path")}
    return {name: own_fields(value) if isinstance(value, dict) else value for name, value in config.items()}


@every_kind
def test_saving_and_loading_change_nothing(case, tmp_path):
    expected = case.model(**case.batch)
    case.model.save_pretrained(tmp_path)
    loaded, info = MODELS[case.family].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert own_fields(loaded.config.to_dict()) == own_fields(case.model.config.to_dict())
    assert loaded.state_dict().keys() == case.model.state_dict().keys()
    for name, value in case.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert_equal_outputs(loaded(**case.batch), expected, atol=0, rtol=0)


@every_kind
def test_the_vision_model_loads_from_a_full_checkpoint(case, tmp_path):
    given = (case.batch["pixel_values"], case.batch[case.regions])
    whole = case.model(*given)
    expected = RegionVisionOutput(
        image_embeds=whole.image_embeds,
        region_embeds=whole.region_embeds,
        last_hidden_state=whole.vision_model_output.last_hidden_state,
    )
    case.model.save_pretrained(tmp_path / "full")
    vision, info = VISION_MODELS[case.family].from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(vision(*given), expected, atol=0, rtol=0)
    assert not [
        name for name, _ in vision.named_parameters() if name.startswith(("text", "logit", "region_logit", "box"))
    ]
    vision.save_pretrained(tmp_path / "vision")
    again, info = VISION_MODELS[case.family].from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(again(*given), expected, atol=0, rtol=0)


@every_vision
def test_auto_model_round_trip(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MODELS[case.family]
    assert_equal_outputs(loaded(**case.batch), case.model(**case.batch), atol=0, rtol=0)


@every_vision
def test_a_part_of_a_checkpoint_loads_and_the_rest_starts_fresh(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    towers = {key: value for key, value in state.items() if key.startswith(("vision_model.", "text_model."))}
    save_file(towers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = MODELS[case.family].from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == state.keys() - towers.keys() and not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all() and value.abs().max() < 10, name
        if name in towers:
            assert torch.equal(value, towers[name])
    scale = case.model.config.logit_scale_init_value
    assert loaded.logit_scale.log_scale.item() == pytest.approx(scale)
    assert loaded(**case.batch).loss.isfinite()


@both
def test_wrong_shapes_in_a_checkpoint_are_refused(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    config = build_config(case.family, projection_dim=20)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MODELS[case.family].from_pretrained(tmp_path, config=config)


@both
def test_settings_of_a_run_are_no_configuration(case, tmp_path, caplog):
    """A folder of before has them in its configuration: they are read, warned about and dropped."""
    case.model.contrastive_tile_size = 2
    if case.family == "pixclip":
        case.model.max_regions_per_forward = 4
    case.model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert not {"contrastive_tile_size", "max_regions_per_forward"} & fields.keys()
    file.write_text(json.dumps(fields | {"contrastive_tile_size": None}))
    with caplog.at_level("WARNING", logger="pixclip_hf"):
        AutoModel.from_pretrained(tmp_path)
        assert "contrastive_tile_size" not in caplog.text
        old = {"contrastive_tile_size": 2} | ({"max_regions_per_forward": 4} if case.family == "pixclip" else {})
        file.write_text(json.dumps(fields | old))
        loaded = AutoModel.from_pretrained(tmp_path)
    for name, value in old.items():
        assert f"`{name}={value}` is ignored" in caplog.text
        assert not hasattr(loaded.config, name) and getattr(loaded, name) != value
    assert loaded.config.to_dict().keys() == case.model.config.to_dict().keys()
    assert_equal_outputs(loaded(**case.batch), case.model(**case.batch), atol=1e-6, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert not old.keys() & json.loads((tmp_path / "again" / "config.json").read_text()).keys()


# Batches and padding


@every_kind
def test_one_by_one_equals_the_batch(case):
    ids, mask = build_texts(3, seed=9, padding="left")
    batch = {name: value for name, value in case.batch.items() if not name.startswith(("region_input", "region_text"))}
    batch |= {"input_ids": ids, "attention_mask": mask}
    together = case.model(**batch)
    for image in range(3):
        one = {name: value[image : image + 1] for name, value in batch.items()}
        count = int(batch["region_attention_mask"][image].sum())
        for name in (case.regions, "region_attention_mask"):
            one[name] = one[name][:, :count]
        alone = case.model(**one)
        torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[image], **close)
        torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[image], **close)
        torch.testing.assert_close(alone.region_embeds[0], together.region_embeds[image, :count], **close)


def with_other_padding(family, batch):
    """The same real regions; other content in the padded slots, and one more of them."""
    changed = dict(batch)
    padded = ~batch["region_attention_mask"].bool()
    for name, value in batch.items():
        if name.startswith(("region", "crop")) and name != "region_attention_mask":
            value = value.clone()
            value[padded] = 0 if name == "region_masks" else 1
            changed[name] = torch.cat([value, value.flip(1)[:, :1]], dim=1)
    changed["region_attention_mask"] = F.pad(batch["region_attention_mask"], (0, 1))
    return changed


@every_kind
def test_padded_regions_change_nothing(case):
    real = case.batch["region_attention_mask"].bool()
    outputs = [case.model(**case.batch), case.model(**with_other_padding(case.family, case.batch))]
    for name in PER_REGION:
        if name in outputs[0]:
            rows = [output[name][:, :3][real] for output in outputs]
            torch.testing.assert_close(*rows, **close)
    grads = []
    for output in outputs:
        grads.append(gradients(case.model, output.loss))
    for name in outputs[0].loss_parts:
        torch.testing.assert_close(*(output.loss_parts[name] for output in outputs), **close)
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], gradient, atol=1e-4, rtol=1e-3, msg=lambda t, name=name: f"{name}: {t}"
        )


@every_vision
def test_a_batch_without_regions_has_no_region_loss(case):
    case.batch["region_attention_mask"] *= 0
    output = case.model(**case.batch)
    for name, part in output.loss_parts.items():
        assert (part > 0) if name == "image_text" else (part == 0), name
    for name, gradient in gradients(case.model, output.loss).items():
        assert gradient.isfinite().all(), name


@every_vision
@pytest.mark.parametrize("slots", [0, 2])
def test_images_without_regions_have_no_features(case, slots):
    given = (case.batch["pixel_values"], case.batch[case.regions][:, :slots], torch.zeros(3, slots))
    features = case.model.get_region_features(*given).pooler_output
    assert torch.equal(features, torch.zeros(3, slots, 16))
    assert case.model(*given).region_embeds.shape == (3, slots, 16)


@every_vision
def test_rows_of_padded_slots_are_zero(case):
    """In every output that has region slots, whatever the padding holds."""
    batch = case.batch
    padded = ~batch["region_attention_mask"].bool()
    given = (batch["pixel_values"], batch[case.regions], batch["region_attention_mask"])
    vision = VISION_MODELS[case.family](case.model.config).eval()
    outputs = [case.model(**batch), case.model.get_region_features(*given), vision(*given)]
    if case.family == "cloc":
        masks = build_batch("pixclip")["region_masks"]
        outputs += [case.model.get_region_tokens(*given), case.model(**batch, region_masks=masks, prompt="mask")]
    else:
        outputs += [case.model.get_region_features(*given, mode="pooled"), case.model(**batch, mode="pooled")]
    seen = set()
    for output in outputs:
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == padded.shape and name not in ONE_PER_TEXT:
                seen.add(name)
                assert not value[padded].any() and value[~padded].any(), name
    optional = {"pred_boxes"} if case.family == "cloc" else {"crop_embeds", "pooled_region_embeds"}
    assert {*optional, "region_embeds", "region_text_embeds", "logits_per_region", "region_text_ids"} < seen


# Gradients


def expects_no_gradient(name, text):
    # The key bias shifts all logits of a query alike, so softmax takes it out; BERT's pooler is not what is pooled.
    return name.endswith("k_proj.bias") or name.endswith("key.bias") or (text == "bert" and ".pooler." in name)


@every_kind
def test_gradients_reach_every_parameter(case):
    grads = gradients(case.model, case.model(**case.batch).loss)
    for name, parameter in case.model.named_parameters():
        if not expects_no_gradient(name, case.text):
            assert name in grads and grads[name].abs().max() > 1e-7, name
            assert grads[name].isfinite().all() and grads[name].shape == parameter.shape


@every_kind
def test_gradients_reach_no_frozen_parameter(case):
    case.model.text_model.requires_grad_(False)
    case.model.vision_model.encoder.layers[0].requires_grad_(False)
    grads = gradients(case.model, case.model(**case.batch).loss)
    frozen = {name for name, parameter in case.model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) > 20 and not frozen & grads.keys()
    trainable = {name for name, _ in case.model.named_parameters()} - frozen
    assert trainable == grads.keys()


@every_kind
def test_gradient_checkpointing_gives_equal_gradients(case):
    case.model.train()
    output = case.model(**case.batch)
    expected = gradients(case.model, output.loss)
    case.model.activation_checkpointing_enable()
    assert case.model.is_activation_checkpointing
    again = case.model(**case.batch)
    torch.testing.assert_close(again.loss, output.loss)
    got = gradients(case.model, again.loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@every_kind
def test_eager_attention_equals_sdpa(case):
    output = case.model(**case.batch)
    case.model.set_attn_implementation("eager")
    assert case.model.vision_model.config._attn_implementation == "eager"
    eager = case.model(**case.batch)
    assert_equal_outputs(eager, output, atol=1e-4, rtol=1e-4)


@both
def test_the_loss_falls_when_it_is_followed(case):
    before = case.model(**case.batch).loss
    grads = gradients(case.model, before)
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter -= 1e-3 * grads.get(name, 0)
    assert case.model(**case.batch).loss < before


# Numbers of fewer bits


@every_vision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype, tmp_path):
    case.model.save_pretrained(tmp_path)
    half = MODELS[case.family].from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    batch = {k: v.to(dtype) if k.endswith("pixel_values") else v for k, v in case.batch.items()}
    output, expected = half(**batch), case.model(**case.batch)
    real = case.batch["region_attention_mask"].bool()
    assert output.region_embeds.dtype == dtype and output.loss.dtype == torch.float32
    similarity = F.cosine_similarity(output.region_embeds.float(), expected.region_embeds, dim=-1)[real]
    assert similarity.min() > 0.98
    assert abs(output.loss - expected.loss) < 0.1 * expected.loss
    for name, value in output.items():
        value = value.last_hidden_state if name.endswith("_model_output") else value
        assert name == "loss_parts" or value.isfinite().all(), name
    for name, gradient in gradients(half, output.loss).items():
        assert gradient.isfinite().all(), name


@every_vision
def test_inputs_of_another_precision(case):
    """Pixels come in float32, whatever the model's precision."""
    half = case.model.to(torch.bfloat16)
    batch = {k: v.to(half.dtype) if k.endswith("pixel_values") else v for k, v in case.batch.items()}
    assert torch.equal(half(**case.batch).loss, half(**batch).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_another_precision(family):
    """Cached states in float16, or a language model in bfloat16 below a model in float32."""
    batch = build_batch(family, captions=False, region_texts=False)
    states = torch.randn(3, 3, 24, generator=torch.Generator().manual_seed(0)).half()
    model = build_model(family, text=None)
    torch.testing.assert_close(
        model(**batch, region_text_states=states).loss, model(**batch, region_text_states=states.float()).loss
    )
    model, batch = build_model(family, text="llama"), build_batch(family)
    expected = model(**batch).loss
    model.text_model.bfloat16()
    loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - expected) < 0.1 * expected


@every_vision
@pytest.mark.parametrize("normalize_in_float", [False, True])
def test_autocast(case, normalize_in_float, monkeypatch):
    if normalize_in_float:
        # On CUDA, autocast runs norms in float32; on CPU it does not.
        monkeypatch.setattr(
            modeling_outputs.F,
            "normalize",
            lambda rows, plain=F.normalize, **options: plain(rows.float(), **options),
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = case.model(**case.batch)
    expected = case.model(**case.batch)
    assert abs(output.loss - expected.loss) < 0.1 * expected.loss
    for name, gradient in gradients(case.model, output.loss).items():
        assert gradient.isfinite().all(), name


# Losses


@every_kind
def test_the_loss_is_the_weighted_sum_of_its_parts(case):
    if case.family == "cloc":
        weights = {"image_text_loss_weight": 0.3, "region_text_loss_weight": 2.0, "grounding_loss_weight": 0.5}
        model = case.build(**weights, box_l1_weight=5.0, box_giou_weight=3.0)
        factors = {"image_text": 0.3, "region_text": 2.0, "grounding_l1": 2.5, "grounding_giou": 1.5}
    else:
        factors = {"mask_text": 0.3, "crop_text": 2.0, "local_global": 0.5, "image_text": 0.7}
        model = case.build(**{f"{name}_loss_weight": factor for name, factor in factors.items()})
    output, plain = model(**case.batch), case.model(**case.batch)
    assert model.loss_weights() == pytest.approx(factors) and set(output.loss_parts) == set(factors)
    torch.testing.assert_close(output.loss, sum(factors[name] * part for name, part in plain.loss_parts.items()))
    torch.testing.assert_close(plain.loss, sum(plain.loss_parts.values()))


@both
@pytest.mark.parametrize("captions", [True, False])
def test_a_weight_of_zero_drops_its_part(case, captions):
    batch = build_batch(case.family, captions=captions)
    names = {"cloc": ("region_text", "grounding", "image_text")}.get(
        case.family, ("mask_text", "crop_text", "local_global", "image_text")
    )
    for dropped in names:
        output = case.build(**{f"{dropped}_loss_weight": 0.0})(**batch)
        left = {name for name in loss_names(case.family, captions=captions) if not name.startswith(dropped)}
        assert set(output.loss_parts) == left
        output.loss.backward()


@both
def test_region_text_loss_equals_loops(case):
    # Two regions of different images share a text; so do two captions.
    batch = case.batch
    for ids, mask, places in (
        ("input_ids", "attention_mask", ((0,), (2,))),
        ("region_input_ids", "region_text_attention_mask", ((0, 1), (2, 0))),
    ):
        for name in (ids, mask):
            batch[name][places[1]] = batch[name][places[0]]
    output = case.model(**batch)
    real = batch["region_attention_mask"].bool()
    name = "region_text" if case.family == "cloc" else "mask_text"
    rows = (
        output.region_embeds[real].double(),
        output.region_text_embeds[real].double(),
        case.model.get_logit_scale(),
    )
    # Real regions in order: three of the first image, one of the second, two of the third.
    expected = contrastive_by_loops(*rows, ids=[0, 1, 2, 3, 1, 5])
    assert (expected - contrastive_by_loops(*rows)).abs() > 1e-3
    torch.testing.assert_close(output.loss_parts[name].double(), expected, atol=1e-4, rtol=1e-4)
    expected = contrastive_by_loops(
        output.image_embeds.double(), output.text_embeds.double(), case.model.logit_scale(), ids=[0, 1, 0]
    )
    torch.testing.assert_close(output.loss_parts["image_text"].double(), expected, atol=1e-4, rtol=1e-4)
    if case.family == "cloc":
        l1, giou = grounding_losses(output.pred_boxes[real], batch["region_boxes"][real])
        torch.testing.assert_close(output.loss_parts["grounding_l1"], l1)
        torch.testing.assert_close(output.loss_parts["grounding_giou"], giou)


@both
def test_the_similarity_threshold_reaches_the_loss(case):
    name = "region_text" if case.family == "cloc" else "mask_text"
    losses = []
    real = case.batch["region_attention_mask"].bool()
    texts = case.model(**case.batch).region_text_embeds[real]
    # Between the similarities of the texts: some negatives are left out, and some stay.
    alike = sorted((texts @ texts.T)[torch.ones(len(texts), len(texts)).triu(1).bool()].tolist())
    between = (alike[len(alike) // 2] + alike[len(alike) // 2 + 1]) / 2
    for threshold in (None, between, -1.0):
        output = case.build(text_similarity_threshold=threshold)(**case.batch)
        rows = (output.region_embeds[real].double(), output.region_text_embeds[real].double())
        expected = contrastive_by_loops(*rows, case.model.get_logit_scale(), threshold=threshold)
        torch.testing.assert_close(output.loss_parts[name].double(), expected, atol=1e-4, rtol=1e-4)
        losses.append(expected.item())
    assert losses[0] > losses[1] > losses[2] == 0


@every_vision
@pytest.mark.parametrize("captions", [True, False])
def test_ranks_together_equal_the_whole(case, captions):
    batch = build_batch(case.family, captions=captions)
    whole = case.model(**batch)
    expected = gradients(case.model, whole.loss)
    # Three images on two ranks of one and two; the model's own pass over the whole is reused in slices.
    output = case.model(**batch, return_loss=False)
    if case.family == "pixclip":
        output = case.model(**batch)
    bounds = ((0, 1), (1, 3))

    def on_rank(rank, gather):
        start, stop = bounds[rank]
        rows = {name: v[start:stop] for name, v in output.items() if name in output.representations()}
        own = type(output)(**rows)
        mask = batch["region_attention_mask"][start:stop]
        return case.model.compute_loss(own, batch[case.regions][start:stop], mask, gather, 2)

    ranks = run_ranks(2, on_rank)
    assert set(ranks[0]) == set(ranks[1]) == set(whole.loss_parts)
    for name, part in whole.loss_parts.items():
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, part, **close)
    total = sum(case.model.loss_weights()[name] * part / 2 for parts in ranks for name, part in parts.items())
    for name, gradient in gradients(case.model, total).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


@every_vision
def test_states_in_place_of_tokens(case):
    batch = dict(case.batch)

    def pooled(ids, mask):
        states = case.model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    expected = case.model(**batch)
    ids, mask = batch.pop("region_input_ids"), batch.pop("region_text_attention_mask")
    batch["region_text_states"] = pooled(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (3, 3))
    batch["text_states"] = pooled(batch.pop("input_ids"), batch.pop("attention_mask"))
    output = case.model(**batch)
    for name in ("text_embeds", "logits_per_image", "logits_per_region", "loss"):
        torch.testing.assert_close(output[name], expected[name], **close)
    bare = build_model(case.family, case.vision, None)
    bare.load_state_dict({k: v for k, v in case.model.state_dict().items() if not k.startswith("text_model.")})
    assert_equal_outputs(bare(**batch), output, atol=0, rtol=0)


# Arguments


@both
def test_return_loss(case):
    model, batch = case.model, case.batch
    without_region_texts = build_batch(case.family, region_texts=False)
    assert model(**batch).loss is not None
    assert model(**batch, return_loss=True).loss is not None
    silent = model(**batch, return_loss=False)
    assert silent.loss is None and silent.loss_parts is None
    assert model(**without_region_texts).loss is None
    assert set(model(**without_region_texts, return_loss=True).loss_parts) == {"image_text"}
    states = {"region_text_states": torch.randn(3, 3, 24)}
    bare = {name: batch[name] for name in ("pixel_values", case.regions, "region_attention_mask")}
    assert model(**bare, **states).loss is not None
    with pytest.raises(ValueError, match="return_loss=True.*texts"):
        model(**bare, return_loss=True)
    ids, mask = build_texts(5)
    for return_loss in (True, None):
        with pytest.raises(ValueError, match="one caption per image: got 5 texts for 3 images"):
            model(**batch | {"input_ids": ids, "attention_mask": mask}, return_loss=return_loss)
    output = model(**batch | {"input_ids": ids, "attention_mask": mask}, return_loss=False)
    assert output.logits_per_region.shape == (3, 3, 5)


@both
def test_regions_that_do_not_fit_are_refused(case):
    model, batch, name = case.model, case.batch, case.regions
    pixels, regions = batch["pixel_values"], batch[name]
    with pytest.raises(ValueError, match=f"{name}.*None"):
        model.get_region_features(pixels)
    with pytest.raises(ValueError, match=f"{name}.*None"):
        model(**{key: value for key, value in batch.items() if key != name})
    for wrong in (regions[:2], regions[:, 0], regions[..., :3], regions[..., None]):
        with pytest.raises(ValueError, match=f"{name}.*shape.*got"):
            model.get_region_features(pixels, wrong)
        with pytest.raises(ValueError, match=f"{name}.*shape.*got"):
            model(pixels, wrong)
    for wrong in (torch.ones(3, 2), torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"region_attention_mask.*\(3, 3\)"):
            model.get_region_features(pixels, regions, wrong)


@both
def test_region_texts_that_do_not_fit_are_refused(case):
    model, batch = case.model, case.batch
    with pytest.raises(ValueError, match=r"region_input_ids.*\(3, 3, …\).*\(3, 2, 9\)"):
        model(**batch | {name: batch[name][:, :2] for name in ("region_input_ids", "region_text_attention_mask")})
    tokens = ("region_input_ids", "region_text_attention_mask")
    without = {name: value for name, value in batch.items() if name not in tokens}
    with pytest.raises(ValueError, match="region_text_states"):
        model(**without, region_text_states=torch.zeros(3, 2, 24))
    with pytest.raises(ValueError, match="text_states.*24"):
        model(**without, region_text_states=torch.zeros(3, 3, 7))
    batch["region_text_attention_mask"][0, 1] = 0
    with pytest.raises(ValueError, match="region_text_attention_mask.*padding"):
        model(**batch)
    with pytest.raises(ValueError, match="input_ids.*text_states.*both"):
        model(batch["pixel_values"], input_ids=batch["input_ids"], text_states=torch.zeros(3, 24))


@both
def test_a_padded_slot_may_have_an_empty_text(case):
    case.batch["region_text_attention_mask"][1, 2] = 0
    output = case.model(**case.batch)
    assert output.loss.isfinite() and output.region_text_embeds[1, 2].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"text_pooling": "max"}, "text_pooling.*'max'"),
        ({"text_projection": "conv"}, "text_projection.*'conv'"),
        ({"vision_config": {"model_type": "clip"}}, "vision_config.*composite 'clip'"),
        ({"vision_config": vision_config("clip", image_size=30)}, r"vision_config.image_size.*30.*patch_size.*8"),
        ({"vision_config": vision_config("clip", image_size=(32, 32))}, "vision_config.image_size"),
        ({"vision_config": {"model_type": "bert"}}, "vision_config.image_size.*'bert'"),
        ({"text_config": {"model_type": "clip"}}, "text_config.*composite 'clip'"),
        ({"text_config": None}, "text_hidden_size.*text_config"),
        ({"text_hidden_size": 25}, "text_hidden_size.*25.*24"),
    ],
)
def test_a_wrong_configuration_names_its_field(family, changes, name):
    with pytest.raises(ValueError, match=name):
        build_config(family, **changes)


@pytest.mark.parametrize(
    ("changes", "name"), [({"region_readout": "max"}, "region_readout.*'prompt', 'mean', 'roi_align'")]
)
def test_a_wrong_cloc_configuration_names_its_field(changes, name):
    with pytest.raises(ValueError, match=name):
        build_config("cloc", **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_fills_in_its_towers(family):
    config = CONFIGS[family]()
    assert (
        config.vision_config.model_type == "clip_vision_model" and config.text_config.model_type == "clip_text_model"
    )
    assert config.text_hidden_size == config.text_config.hidden_size
    assert build_config(family, text="llama", bidirectional=True).text_config.is_causal is False
    assert CONFIGS[family].from_dict(config.to_dict()).to_dict() == config.to_dict()
    given = build_config(family, text_config=text_config("bert", hidden_size=12))
    assert given.text_hidden_size == 12
