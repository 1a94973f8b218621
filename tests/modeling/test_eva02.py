"""The EVA02 tower by itself: rotary positions, sizes, files; its numbers are tested with the converted checkpoints."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from pixclip_hf import Eva02VisionConfig, Eva02VisionModel
from pixclip_hf.modeling.modeling_eva02 import rotary_tables, rotate

SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}


def build(**changes):
    torch.manual_seed(0)
    model = Eva02VisionModel(Eva02VisionConfig(**{"image_size": 32, "patch_size": 8} | SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def pixels(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (18, 2)])
def test_rotation_equals_loops(grid):
    config = Eva02VisionConfig(**SIZES, rope_grid_size=10, rope_theta=100.0)
    states = torch.randn(2, 3, 1 + grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(0))
    rotated = rotate(states, rotary_tables(config, grid))
    assert torch.equal(rotated[:, :, 0], states[:, :, 0])
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = 1 + row * grid[1] + column
            for pair in range(8):
                position = row / grid[0] if pair < 4 else column / grid[1]
                angle = torch.tensor(position * 10 * 100.0 ** (-(pair % 4) / 4))
                x, y = states[:, :, place, 2 * pair], states[:, :, place, 2 * pair + 1]
                expected = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
                found = rotated[:, :, place, 2 * pair : 2 * pair + 2]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attention_knows_distances_only():
    """Scores between patches depend on how far they lie apart, as rotary positions promise."""
    config = Eva02VisionConfig(**SIZES, rope_grid_size=6)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(config, (6, 6))
    turned = [rotate(x.expand(1, 1, 37, 16), tables)[0, 0, 1:].view(6, 6, 16) for x in (query, key)]
    scores = torch.einsum("rcd,RCd->rcRC", *turned)
    torch.testing.assert_close(scores[0, 1, 2, 5], scores[3, 0, 5, 4], atol=1e-5, rtol=1e-5)
    assert (scores[0, 1, 2, 5] - scores[0, 1, 2, 4]).abs() > 1e-3


def test_half_precision_rotates_in_full():
    tables = rotary_tables(Eva02VisionConfig(**SIZES), (4, 4))
    states = torch.randn(1, 3, 17, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(states, tables), rotate(states.float(), tables).bfloat16())


@torch.no_grad()
def test_the_defaults_are_b16():
    with torch.device("meta"):
        model = Eva02VisionModel(Eva02VisionConfig())
    # EVA02-CLIP B/16: 86 million parameters.
    assert 85e6 < sum(parameter.numel() for parameter in model.parameters()) < 87e6
    assert model.embeddings.position_embedding.weight.shape == (197, 768)


@torch.no_grad()
def test_outputs_and_attentions():
    model = build()
    output = model(pixels(32, 32), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 17, 48) and len(output.hidden_states) == 3
    torch.testing.assert_close(output.pooler_output, model.post_layernorm(output.last_hidden_state[:, 0]))
    model.set_attn_implementation("eager")
    eager = model(pixels(32, 32), output_attentions=True)
    torch.testing.assert_close(eager.last_hidden_state, output.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert [weights.shape for weights in eager.attentions] == [(2, 3, 17, 17)] * 2
    torch.testing.assert_close(eager.attentions[0].sum(-1), torch.ones(2, 3, 17))


@torch.no_grad()
def test_images_of_another_size():
    model = build()
    with pytest.raises(ValueError, match="48 x 40 pixels do not fit `image_size` 32"):
        model(pixels(48, 40))
    assert model(pixels(48, 40), interpolate_pos_encoding=True).last_hidden_state.shape == (2, 1 + 6 * 5, 48)
    same = model(pixels(32, 32), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(same, model(pixels(32, 32)).last_hidden_state)
    # Positions that rise along the columns still do on a finer grid, and the class token keeps its own.
    positions = model.embeddings.position_embedding.weight
    positions[1:] = torch.arange(4.0).repeat(4)[:, None]
    finer = model.embeddings.interpolate_pos_encoding((4, 8))
    assert torch.equal(finer[0], positions[0])
    columns = finer[1:, 0].view(4, 8)
    assert (columns.diff(dim=1) > 0).all() and torch.allclose(columns[0], columns[3])


@torch.no_grad()
def test_saves_and_loads(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Eva02VisionConfig
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is Eva02VisionModel and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(pixels(32, 32)).pooler_output, model(pixels(32, 32)).pooler_output)


def test_a_configuration_that_cannot_turn_is_refused():
    with pytest.raises(ValueError, match=r"`hidden_size` \(48\).*`num_attention_heads` \(8\)"):
        Eva02VisionConfig(**SIZES | {"num_attention_heads": 8})
