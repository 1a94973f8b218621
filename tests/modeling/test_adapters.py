"""What is special about a family of towers is asked of its adapter, and of nothing else."""

import pytest
import torch
from builders import FAMILIES, MODELS, VISION_KINDS, build_batch, build_config, region_key
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from pixclip_hf.modeling.modeling_text import TEXT_ADAPTERS, TextAdapter
from pixclip_hf.modeling.modeling_vision import VISION_ADAPTERS, VisionAdapter


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    """The registries, put back afterward."""
    for registry in (VISION_ADAPTERS, TEXT_ADAPTERS):
        monkeypatch.setattr(registry, "adapters", dict(registry.adapters))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_family_is_one_adapter(family):
    """A tower with a register token behind its patches and no `post_layernorm`: the models ask where its patches are
    and how they pool."""
    calls = []

    class Tower(CLIPVisionModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            register = outputs.last_hidden_state[:, :1]
            outputs.last_hidden_state = torch.cat([outputs.last_hidden_state[:, 1:], register], dim=1)
            return outputs

    @VISION_ADAPTERS.register("clip_vision_model")
    class Adapter(VisionAdapter):
        def build(self, config):
            return Tower._from_config(config)

        def patch_tokens(self, last_hidden_state, grid):
            calls.append("patch_tokens")
            return last_hidden_state[:, : grid[0] * grid[1]]

        def pool_regions(self, tower, tokens, weights):
            calls.append("pool_regions")
            assert tokens.shape[1] == weights.shape[2] == 16
            return weights @ tokens

    model, batch = MODELS[family](build_config(family)).eval(), build_batch(family)
    assert type(model.vision_model) is Tower
    expected = model(**batch)
    assert expected.loss.isfinite()
    assert set(calls) == ({"patch_tokens"} if family == "cloc" else {"patch_tokens", "pool_regions"})
    VISION_ADAPTERS.adapters.clear()
    plain = MODELS[family](build_config(family)).eval()
    plain.load_state_dict(model.state_dict())
    given = (batch["pixel_values"], batch[region_key(family)], batch["region_attention_mask"])
    assert torch.equal(plain(*given).region_embeds, expected.region_embeds)


def test_families():
    clip, siglip, eva02 = (VISION_ADAPTERS.of(build_config("cloc", kind).vision_config) for kind in VISION_KINDS)
    assert clip.projects and eva02.projects and not siglip.projects
    assert len({type(adapter) for adapter in (clip, siglip, eva02)}) == 3


def test_a_family_that_cannot_pool_regions_says_so():
    tower = nn.Module()
    tower.config = CLIPVisionConfig()
    with pytest.raises(ValueError, match="'clip_vision_model' tower.*`post_layernorm`.*`VisionAdapter`"):
        VisionAdapter().pool_regions(tower, torch.zeros(1, 4, 8), torch.zeros(1, 1, 4))


def test_text_families():
    TEXT_ADAPTERS.adapters.clear()
    config = build_config("cloc").text_config
    assert type(TEXT_ADAPTERS.of(config)) is TextAdapter

    @TEXT_ADAPTERS.register("clip_text_model")
    class Adapter(TextAdapter):
        def is_eos(self, config, input_ids):
            return input_ids == 7

    ids = torch.tensor([[1, 7, 59]])
    assert type(TEXT_ADAPTERS.of(config)) is Adapter
    assert TEXT_ADAPTERS.of(config).is_eos(config, ids).tolist() == [[False, True, False]]
    assert TextAdapter().is_eos(config, ids).tolist() == [[False, False, True]]
