"""Token embeddings: the model's are those of its text tower."""

import builders
import pytest
import torch
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

both = pytest.mark.parametrize("family", builders.FAMILIES)


@pytest.mark.parametrize("text", builders.TEXT_KINDS)
@both
def test_resize(family, text, tmp_path):
    model, (ids, mask) = builders.build_model(family, text=text), builders.build_texts(3)
    expected = model.get_text_features(ids, mask).pooler_output
    resized = model.resize_token_embeddings(builders.VOCABULARY + 8)
    assert resized is model.get_input_embeddings() is model.text_model.get_input_embeddings()
    assert resized.num_embeddings == model.config.text_config.vocab_size == builders.VOCABULARY + 8
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, expected)
    new = ids.index_fill(1, torch.tensor([1]), builders.VOCABULARY + 7)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    found = loaded.get_text_features(new, mask).pooler_output
    assert torch.equal(found, model.get_text_features(new, mask).pooler_output)
    assert (found - expected).abs().max() > 1e-4


@both
def test_no_text_tower(family):
    for model in (
        builders.build_model(family, text=None),
        builders.VISION_MODELS[family](builders.build_config(family)),
    ):
        with pytest.raises(ValueError, match="resize_token_embeddings.*text tower"):
            model.resize_token_embeddings(8)
        assert model.get_input_embeddings() is None


@both
def test_neftune_adds_noise_to_texts_alone(family):
    model, batch = builders.build_model(family), builders.build_batch(family)
    expected = model(**batch)
    handle = activate_neftune(model, 5.0)
    assert torch.equal(model(**batch).text_embeds, expected.text_embeds)
    noisy = model.train()(**batch)
    assert (noisy.text_embeds - expected.text_embeds).abs().max() > 1e-3
    assert torch.equal(noisy.image_embeds, expected.image_embeds)
    deactivate_neftune(model, handle)
    assert torch.equal(model(**batch).text_embeds, expected.text_embeds)


@both
def test_embeddings_that_are_sharded_already_are_not_offered_for_sharding(family):
    model = builders.build_model(family)
    weight = model.get_input_embeddings().weight
    weight.device_mesh = object()
    assert model.get_input_embeddings() is None
