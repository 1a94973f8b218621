"""Vision towers of both models: building them, reading their tokens, and the patch projection that takes a mask."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .configuration_eva02 import Eva02VisionConfig
from .modeling_eva02 import Eva02VisionModel
from .modeling_regions import weighted_mean


class MaskedPatchConv(nn.Conv2d):
    """A patch projection whose input may carry a scaled mask as a fourth channel (PixCLIP; Alpha-CLIP's second
    convolution).

    `weight` and `bias` are the tower's own. `mask_weight` (and `mask_bias`, if asked for) start at zero; with three
    input channels the mask branch is left out. The two convolutions are added rather than fused, so that with a zero
    `mask_weight` the output equals the plain projection bit for bit.
    """

    def __init__(self, conv: nn.Conv2d, mask_bias: bool = False):
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding")}
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            **geometry,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        # The tower's parameters move over as they are: initialised, loaded or on the meta device.
        self.weight, self.bias = conv.weight, conv.bias
        self._is_hf_initialized = getattr(conv, "_is_hf_initialized", False)
        self.mask_weight = nn.Parameter(torch.zeros_like(conv.weight[:, :1]))
        self.mask_bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0])) if mask_bias else None

    def reset_mask_parameters(self) -> None:
        """Zeroes the mask branch, unless it was loaded."""
        init.zeros_(self.mask_weight)
        if self.mask_bias is not None:
            init.zeros_(self.mask_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) pixels or (N, 4, H, W) pixels and scaled mask to (N, width, H / patch, W / patch)."""
        channels = self.in_channels
        if pixel_values.shape[1] == channels:
            return super().forward(pixel_values)
        embeds = super().forward(pixel_values[:, :channels])
        return embeds + F.conv2d(pixel_values[:, channels:], self.mask_weight, self.mask_bias, stride=self.stride)


def build_vision_model(vision_config: Any) -> PreTrainedModel:
    """The tower of a vision configuration: ours, or by `AutoModel`.

    Raises:
        ValueError: a SigLIP-family tower without its pooling head.
    """
    if getattr(vision_config, "vision_use_head", True) is False:
        raise ValueError("`vision_config.vision_use_head` must be True, got False: image embeddings need that head.")
    if vision_config.model_type == Eva02VisionConfig.model_type:
        # Code that came with a repository holds this configuration twice, once for the model's configuration and once
        # for the model: a mapping by class would know only one of them.
        return Eva02VisionModel._from_config(vision_config)
    return AutoModel.from_config(vision_config)


def add_mask_projection(vision_model: PreTrainedModel, mask_bias: bool) -> None:
    """Puts a [`MaskedPatchConv`] in place of the tower's own patch convolution.

    Raises:
        ValueError: the tower has no convolutional patch projection.
    """
    conv = vision_model.get_input_embeddings()
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(
            f"`vision_config` must describe a tower with a convolutional patch projection, got "
            f"{vision_model.config.model_type!r}, whose patches enter through {type(conv).__name__}."
        )
    for module in vision_model.modules():
        for name, child in module.named_children():
            if child is conv:
                setattr(module, name, MaskedPatchConv(conv, mask_bias))
                return


def patch_grid(vision_config: Any, pixel_values: Tensor) -> tuple[int, int]:
    """(rows, columns) of patches that the tower cuts `pixel_values` (..., H, W) into."""
    return pixel_values.shape[-2] // vision_config.patch_size, pixel_values.shape[-1] // vision_config.patch_size


def patch_tokens(last_hidden_state: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patch tokens `(B, rows * columns, width)` of a tower's output, without the class token in front of them."""
    return last_hidden_state[:, -grid[0] * grid[1] :]


def pool_through_head(vision_model: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean of patch tokens under region weights, through the tower's own pooling head.

    CLIP normalises its class token on the way out: here each patch token is normalised, then averaged. SigLIP's tokens
    leave the tower normalised, and its attention pooling over one averaged token is the value projection and the MLP.

    Args:
        tokens (`(B, N, width)`): patch tokens, as in the tower's `last_hidden_state`.
        weights (`(B, R, N)`): see [`mask_patch_weights`].

    Returns:
        `(B, R, width)`: what the tower's `pooler_output` is for a whole image.
    """
    head = getattr(vision_model, "head", None)
    if head is None:
        tokens = vision_model.post_layernorm(tokens)
    pooled = weighted_mean(tokens, weights)
    return pooled if head is None else head(pooled.flatten(0, 1)[:, None]).unflatten(0, pooled.shape[:2])
