"""What the towers return arrives through `forward`, and arguments reach them or are refused."""

import builders
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

both = pytest.mark.parametrize("family", builders.FAMILIES)
kinds = pytest.mark.parametrize("vision, text", [("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")])
ASKED = {"output_hidden_states": True, "output_attentions": True}


@kinds
@both
def test_hidden_states_and_attentions(family, vision, text):
    model, batch = builders.build_model(family, vision, text), builders.build_batch(family)
    model.set_attn_implementation("eager")
    plain, output = model(**batch), model(**batch, **ASKED)
    pixels, ids, mask = (batch[name] for name in ("pixel_values", "input_ids", "attention_mask"))
    alone = {
        "vision": model.get_image_features(pixels, **ASKED),
        "text": model.get_text_features(ids, mask, **ASKED),
    }
    for side, expected in alone.items():
        found = output[f"{side}_model_output"]
        assert len(found.hidden_states) == 3 and len(found.attentions) == 2
        for name in ("hidden_states", "attentions"):
            assert all(map(torch.equal, found[name], expected[name]))
            assert name not in plain[f"{side}_model_output"]
        assert torch.equal(found.pooler_output, expected.pooler_output)
    torch.testing.assert_close(output.loss, plain.loss)

    model.config.output_hidden_states = True
    model.vision_model.config.output_hidden_states = model.text_model.config.output_hidden_states = True
    assert len(model(**batch).text_model_output.hidden_states) == 3


@kinds
@both
def test_the_vision_models_give_the_towers_states(family, vision, text):
    model = builders.VISION_MODELS[family](builders.build_config(family, vision, text)).eval()
    model.set_attn_implementation("eager")
    batch = builders.build_batch(family)
    pixels, regions = batch["pixel_values"], batch[builders.region_key(family)]
    output, expected = model(pixels, regions, **ASKED), model.get_image_features(pixels, **ASKED)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) >= 2 and all(map(torch.equal, output[name], expected[name]))


@both
def test_tuples_all_the_way_down(family):
    model, batch = builders.build_model(family), builders.build_batch(family)
    output, as_tuple = model(**batch, **ASKED), model(**batch, **ASKED, return_dict=False)
    assert len(as_tuple) == len(output)
    for value, (name, expected) in zip(as_tuple, output.items(), strict=True):
        if isinstance(expected, BaseModelOutputWithPooling):
            assert type(value) is tuple and torch.equal(value[0], expected.last_hidden_state), name
        elif name != "loss_parts":
            assert torch.equal(value, expected), name
    model.config.return_dict = False
    assert type(model(**batch)) is tuple and type(model.get_text_features(batch["input_ids"])) is tuple


@kinds
@both
def test_position_ids_reach_the_text_tower(family, vision, text):
    model, batch = builders.build_model(family, vision, text), builders.build_batch(family)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    plain = model.get_text_features(ids, mask).pooler_output
    counted = torch.arange(ids.shape[1])[None]
    torch.testing.assert_close(model.get_text_features(ids, mask, counted).pooler_output, plain)
    moved = model.get_text_features(ids, mask, position_ids=counted * 3).pooler_output
    assert (moved - plain).abs().max() > 1e-3
    # Of left-padded texts the positions move with their tokens.
    left_ids, left_mask = builders.build_texts(3, seed=2, padding="left")
    left = (left_mask.cumsum(-1) - 1).clamp(min=0) * 3
    torch.testing.assert_close(model.get_text_features(left_ids, left_mask, left).pooler_output, moved)
    torch.testing.assert_close(model(**batch, position_ids=counted * 3).text_model_output.pooler_output, moved)


@both
def test_arguments_are_used_or_refused(family):
    model, batch = builders.build_model(family), builders.build_batch(family, captions=False)
    with pytest.raises(TypeError, match="output_hidden_state"):
        model(**batch, output_hidden_state=True)
    with pytest.raises(TypeError, match="interpolate_pos_encoding"):
        model.get_text_features(*builders.build_texts(2), interpolate_pos_encoding=True)
    larger = batch | {"pixel_values": torch.randn(3, 3, 48, 48)}
    if family == "pixclip":
        larger |= {"region_masks": torch.ones(3, 3, 48, 48), "return_loss": False}
        larger |= {"crop_pixel_values": None, "crop_masks": None}
    with pytest.raises(ValueError, match="48"):
        model(**larger)
    output = model(**larger, interpolate_pos_encoding=True)
    assert output.region_embeds.isfinite().all() and output.region_embeds.abs().sum() > 0
