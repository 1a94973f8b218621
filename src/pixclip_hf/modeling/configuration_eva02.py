"""EVA02-CLIP vision tower configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class Eva02VisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eva02VisionModel`] (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389). The defaults are
    those of EVA02-CLIP B/16 at 224 pixels.

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the tokens.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Width inside the gated feed-forward part.
        num_hidden_layers, num_attention_heads (`int`, *optional*, default to 12):
            Blocks, and heads per block.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        image_size, patch_size (`int`, *optional*, default to 224 and 16):
            Sides in pixels.
        rope_grid_size (`int`, *optional*, defaults to 16):
            Patches per side of the grid that the rotary positions were made for; any other grid is stretched over it.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary frequencies.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Added to the variance in layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new weights.

    Raises:
        ValueError: a width that the heads do not divide, or heads whose width is no multiple of 4 (two axes of pairs).
    """

    model_type = "eva02_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    rope_grid_size: int = 16
    rope_theta: float | int = 10000.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of 4 x `num_attention_heads` "
                f"({self.num_attention_heads}): each head turns pairs of channels along two axes."
            )
        super().__post_init__(**kwargs)


__all__ = ["Eva02VisionConfig"]
