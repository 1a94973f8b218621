"""The EVA02-CLIP vision tower, which the public PixCLIP weights need."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eva02 import Eva02VisionConfig


def rotary_tables(config: Eva02VisionConfig, grid: tuple[int, int], device: Any = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2-D rotary positions (EVA-02, arXiv 2303.11331, section 2; EVA-CLIP's interpolation).

    Half of a head's channels turn with the row, half with the column, each in neighboring pairs. A grid of another
    size than `config.rope_grid_size` is stretched over it.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Two tensors `(rows * columns, head width)`, float32.
    """
    half = config.hidden_size // config.num_attention_heads // 2
    steps = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = config.rope_theta**-steps
    # A position divided before it is multiplied, and an angle for each axis: the order of the public code's rounding.
    rows, columns = (
        (torch.arange(side, dtype=torch.float32, device=device) / side * config.rope_grid_size)[:, None]
        * frequencies.repeat_interleave(2)
        for side in grid
    )
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1).flatten(
        0, 1
    )
    return angles.cos(), angles.sin()


def rotate(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the patch tokens `(B, heads, 1 + N, head width)` by their positions; the class token stays."""
    cos, sin = tables
    patches = states[:, :, 1:].float()
    pairs = patches.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([states[:, :, :1], (patches * cos + turned * sin).to(states.dtype)], dim=2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by its formula: `(B, heads, N, d)` to `(B, N, heads, d)`, with the weights `(B, heads, N, N)`."""
    weights = (query @ key.transpose(-1, -2)) * scaling
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Eva02VisionEmbeddings(nn.Module):
    """Patches, the class token in front of them, and learned positions; attribute names as in CLIP's tower."""

    def __init__(self, config: Eva02VisionConfig):
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.side = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2 + 1, config.hidden_size)

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> Tensor:
        """Positions `(1 + rows * columns, width)` of another grid, bicubic."""
        # Looked up and not read, so that a hook that brings the weights from elsewhere is passed.
        positions = self.position_embedding(torch.arange(self.side**2 + 1, device=self.class_embedding.device))
        if grid == (self.side, self.side):
            return positions
        patches = positions[1:].T.unflatten(-1, (self.side, self.side))[None]
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([positions[:1], patches[0].flatten(1).T])

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) to (B, 1 + rows * columns, width)."""
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"`pixel_values` of {height} x {width} pixels do not fit `image_size` {self.image_size}: pass "
                "`interpolate_pos_encoding=True`."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = torch.cat(
            [self.class_embedding.expand(patches.shape[0], 1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        return tokens + self.interpolate_pos_encoding((patches.shape[-2], patches.shape[-1]))


class Eva02VisionAttention(nn.Module):
    """Attention with rotary positions, keys without bias, and a LayerNorm over the heads' joined output."""

    is_causal = False

    def __init__(self, config: Eva02VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention(
            self,
            rotate(query, position_embeddings),
            rotate(key, position_embeddings),
            value,
            None,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.out_proj(self.inner_norm(attended.reshape(*shape, -1))), weights


class Eva02VisionMLP(nn.Module):
    """SwiGLU with a LayerNorm before its last projection."""

    def __init__(self, config: Eva02VisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.inner_norm(gated))


class Eva02VisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: Eva02VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Eva02VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02VisionMLP(config)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), position_embeddings, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Eva02VisionEncoder(nn.Module):
    """The layers in turn."""

    def __init__(self, config: Eva02VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Eva02VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, **kwargs)
        return hidden_states


class Eva02VisionModel(PreTrainedModel):
    """The vision tower of EVA02-CLIP (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389), without the projection
    behind it."""

    config: Eva02VisionConfig
    config_class = Eva02VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Eva02VisionEmbeddings", "Eva02VisionLayer"]
    _input_embed_layer = "patch_embedding"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Eva02VisionLayer, "attentions": Eva02VisionAttention}

    def __init__(self, config: Eva02VisionConfig):
        super().__init__(config)
        self.embeddings = Eva02VisionEmbeddings(config)
        self.encoder = Eva02VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Eva02VisionEmbeddings):
            init.normal_(module.class_embedding, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            interpolate_pos_encoding: takes images of another size than `config.image_size`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(B, 1 + patches, width)`, the tokens of the last layer,
            class token first; `pooler_output` `(B, width)`, the class token after the final LayerNorm. The patch
            feature map of the public code is `post_layernorm(last_hidden_state[:, 1:])`.

        Raises:
            ValueError: images of another size without `interpolate_pos_encoding`.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        height, width = pixel_values.shape[-2:]
        grid = height // self.config.patch_size, width // self.config.patch_size
        tables = rotary_tables(self.config, grid, hidden_states.device)
        hidden_states = self.encoder(hidden_states, tables, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


__all__ = ["Eva02VisionModel"]
