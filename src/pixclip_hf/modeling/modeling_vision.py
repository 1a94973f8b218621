"""Vision towers of both models: one adapter per family, and the patch projection that takes a mask."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_eva02 import Eva02VisionConfig
from .configuration_region_text import PATCH_TOWERS
from .modeling_adapters import AdapterRegistry
from .modeling_eva02 import Eva02VisionModel
from .modeling_patches import ImageTokens
from .modeling_regions import mask_patch_weights, weighted_mean


class MaskBranch:
    """A patch projection's branch for the mask, which starts at zero."""

    mask_weight: nn.Parameter
    mask_bias: nn.Parameter | None

    def reset_mask_parameters(self) -> None:
        """Zeroes the mask branch, unless it was loaded."""
        init.zeros_(self.mask_weight)
        if self.mask_bias is not None:
            init.zeros_(self.mask_bias)


class MaskedPatchConv(MaskBranch, nn.Conv2d):
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
        # The tower's parameters move over as they are: initialized, loaded or on the meta device.
        self.weight, self.bias = conv.weight, conv.bias
        self._is_hf_initialized = getattr(conv, "_is_hf_initialized", False)
        self.mask_weight = nn.Parameter(torch.zeros_like(conv.weight[:, :1]))
        self.mask_bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0])) if mask_bias else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) pixels or (N, 4, H, W) pixels and scaled mask to (N, width, H / patch, W / patch)."""
        channels = self.in_channels
        if pixel_values.shape[1] == channels:
            return super().forward(pixel_values)
        embeds = super().forward(pixel_values[:, :channels])
        return embeds + F.conv2d(pixel_values[:, channels:], self.mask_weight, self.mask_bias, stride=self.stride)


class MaskedPatchLinear(MaskBranch, nn.Linear):
    """[`MaskedPatchConv`] for a tower that takes its patches as rows: `(..., 3 * patch²)` pixels, which the scaled
    mask of each patch, `patch²` more, may follow."""

    def __init__(self, linear: nn.Linear, mask_bias: bool = False):
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        self.weight, self.bias = linear.weight, linear.bias
        self._is_hf_initialized = getattr(linear, "_is_hf_initialized", False)
        self.mask_weight = nn.Parameter(torch.zeros_like(linear.weight[:, : linear.in_features // 3]))
        self.mask_bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0])) if mask_bias else None

    def forward(self, patches: Tensor) -> Tensor:
        """(..., 3 * patch²) or (..., 4 * patch²) to (..., width)."""
        pixels = self.in_features
        if patches.shape[-1] == pixels:
            return super().forward(patches)
        embeds = super().forward(patches[..., :pixels])
        return embeds + F.linear(patches[..., pixels:], self.mask_weight, self.mask_bias)


def replace_module(tower: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another one, wherever that is in a tower."""
    for module in tower.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
                return


class MaskedPatchEmbeddings(nn.Module):
    """Takes the place of a patch embedding that refuses a fourth channel (ViT, DINOv2); its weights keep their names.

    Args:
        embeddings: the module in question, with its convolution as `projection`.
        mask_bias: see [`MaskedPatchConv`].
    """

    def __init__(self, embeddings: nn.Module, mask_bias: bool):
        super().__init__()
        # What the tower asks of it.
        self.num_patches, self.image_size = embeddings.num_patches, embeddings.image_size
        self.patch_size, self.num_channels = embeddings.patch_size, embeddings.num_channels
        conv: Any = embeddings.projection
        self.projection = MaskedPatchConv(conv, mask_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) pixels, or (N, 4, H, W) pixels and scaled mask, to (N, patches, width), row by row."""
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class VisionAdapter:
    """What is special about a family of vision towers. This class describes CLIP's kind; subclasses describe others.

    Its towers take patches through one convolution, put class and register tokens in front of the patch tokens, keep
    their positions in one table, and pool their class token through `post_layernorm`. A family that is not registered
    is treated as one of this kind. To add one, register a subclass with `VISION_ADAPTERS.register` in this file.
    """

    # Learned positions in the tower's state, a row per token.
    positions: ClassVar[str] = "embeddings.position_embedding.weight"
    # Whether positions are interpolated with a low-pass filter where the grid shrinks, as the tower does on the fly.
    antialias: ClassVar[bool] = False
    # Whether the tower takes images of any size without being asked to interpolate.
    takes_any_size: ClassVar[bool] = False
    # Name of the class of transformers that keeps the projection behind a tower that was saved alone.
    with_projection: ClassVar[str | None] = None
    # Starts of the names of weights that a checkpoint may lack, since nothing here is computed with them.
    optional_weights: ClassVar[tuple[str, ...]] = ()
    # Whether the family projects what its towers pool; without, its features are the pooled states themselves.
    projects: ClassVar[bool] = True
    # Whether images keep their aspect and enter as rows of patches, with their own grid each.
    takes_patches: ClassVar[bool] = False

    def build(self, config: Any) -> PreTrainedModel:
        """The tower of a vision configuration, with new weights.

        Raises:
            ValueError: a configuration of something else than a vision tower, or one that the family knows and the
                models cannot use.
        """
        tower: PreTrainedModel = AutoModel.from_config(config)
        if tower.main_input_name != "pixel_values":
            raise ValueError(
                f"`vision_config` must describe a vision tower, got {config.model_type!r}, which takes "
                f"`{tower.main_input_name}`."
            )
        return tower

    def add_mask_projection(self, tower: PreTrainedModel, mask_bias: bool) -> None:
        """Puts a [`MaskedPatchConv`] in place of the tower's own patch convolution.

        Raises:
            ValueError: the tower has no convolutional patch projection.
        """
        conv = tower.get_input_embeddings()
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(
                f"`vision_config` must describe a tower with a convolutional patch projection, got "
                f"{tower.config.model_type!r}, whose patches enter through {type(conv).__name__}."
            )
        replace_module(tower, conv, MaskedPatchConv(conv, mask_bias))

    def patch_grid(self, config: Any, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches that the tower cuts `pixel_values` (..., H, W) into."""
        return pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size

    def patch_tokens(self, last_hidden_state: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patch tokens `(B, rows * columns, width)` of a tower's output, row by row, without the class and
        register tokens in front of them."""
        return last_hidden_state[:, -grid[0] * grid[1] :]

    def image_tokens(
        self, config: Any, last_hidden_state: Tensor, pixel_values: Tensor, spatial_shapes: Tensor | None = None
    ) -> ImageTokens:
        """The patch tokens of a tower's output and their grid, from what went into the tower."""
        grid = self.patch_grid(config, pixel_values)
        return ImageTokens(self.patch_tokens(last_hidden_state, grid), grid, config.patch_size)

    def pooled_image(self, outputs: BaseModelOutputWithPooling) -> Tensor:
        """`(B, width)`: what represents the whole image in a tower's output."""
        return outputs.pooler_output

    def pool_regions(self, tower: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
        """Pools patch tokens under region weights, as the tower pools a whole image.

        CLIP normalizes its class token on the way out: here each patch token is normalized, then averaged.

        Args:
            tokens (`(B, N, width)`): patch tokens, as in the tower's `last_hidden_state`.
            weights (`(B, R, N)`): see [`mask_patch_weights`].

        Returns:
            `(B, R, width)`: what the tower's `pooler_output` is for a whole image.

        Raises:
            ValueError: the tower has no `post_layernorm`.
        """
        if not hasattr(tower, "post_layernorm"):
            raise ValueError(
                f"Regions cannot be pooled in a {tower.config.model_type!r} tower, which has no `post_layernorm`: its "
                "family needs a `VisionAdapter` of its own."
            )
        return weighted_mean(tower.post_layernorm(tokens), weights)

    def pool_masks(self, tower: PreTrainedModel, tokens: ImageTokens, masks: Tensor) -> Tensor:
        """[`VisionAdapter.pool_regions`] under masks `(B, R, H, W)`: `(B, R, width)`."""

        def read(states: Tensor, grid: tuple[int, int], images: Any) -> Tensor:
            weights = mask_patch_weights(tokens.masks_on(images, grid, masks), grid)
            return self.pool_regions(tower, states, weights)

        return tokens.per_grid(read)

    def feed_forward_width(self, config: Any) -> int:
        """Width inside the feed-forward layers of the tower, which a Prompter takes over."""
        return config.intermediate_size

    def whole_image_size(self, config: Any) -> int:
        """Side in pixels of the largest image that the tower sees completely."""
        # The so400m SigLIP towers at 384 pixels cut 27 patches of 14 and never see the last 6 pixels.
        return config.image_size // config.patch_size * config.patch_size

    def resize_positions(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """Interpolates the position embeddings of a square patch grid, bicubic as transformers' towers do on the fly.

        Args:
            weight (`(side * side, width)` or `(1, side * side, width)`): rows for tokens in front of the patches, of
                which there may be some, stay.
            shape: of the result, counted alike.
        """
        if weight.shape == shape:
            return weight
        rows = weight.reshape(-1, weight.shape[-1])
        old_side, new_side = math.isqrt(len(rows)), math.isqrt(shape[-2])
        first = len(rows) - old_side**2
        grid = rows[first:].float().T.reshape(1, -1, old_side, old_side)
        size = (new_side, new_side)
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=self.antialias)
        return torch.cat([rows[:first], grid.flatten(2)[0].T.to(weight.dtype)]).reshape(shape)


VISION_ADAPTERS = AdapterRegistry(VisionAdapter())


@VISION_ADAPTERS.register("clip_vision_model")
class CLIPVisionAdapter(VisionAdapter):
    """CLIP."""

    with_projection = "CLIPVisionModelWithProjection"


@VISION_ADAPTERS.register("siglip_vision_model")
class SiglipVisionAdapter(VisionAdapter):
    """SigLIP, and SigLIP2 of fixed resolution: no class token, attention pooling, and no projection behind it."""

    projects = False

    def build(self, config: Any) -> PreTrainedModel:
        """The tower, with its pooling head.

        Raises:
            ValueError: a configuration without that head.
        """
        if config.vision_use_head is False:
            raise ValueError(
                "`vision_config.vision_use_head` must be True, got False: image embeddings need that head."
            )
        return super().build(config)

    def pool_regions(self, tower: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mean of patch tokens under region weights, through the head; shapes as in [`VisionAdapter.pool_regions`].

        SigLIP's tokens leave the tower normalized, and its attention pooling over one averaged token is the value
        projection and the MLP.
        """
        pooled = weighted_mean(tokens, weights)
        return tower.head(pooled.flatten(0, 1)[:, None]).unflatten(0, pooled.shape[:2])


@VISION_ADAPTERS.register(*PATCH_TOWERS)
class NaFlexVisionAdapter(SiglipVisionAdapter):
    """SigLIP 2 of variable resolution (NaFlex): patches as rows, positions interpolated to the grid of each image."""

    takes_patches = True

    def add_mask_projection(self, tower: PreTrainedModel, mask_bias: bool) -> None:
        """Puts a [`MaskedPatchLinear`] in place of the tower's own patch projection."""
        linear = tower.get_input_embeddings()
        replace_module(tower, linear, MaskedPatchLinear(linear, mask_bias))

    def image_tokens(
        self, config: Any, last_hidden_state: Tensor, pixel_values: Tensor, spatial_shapes: Tensor | None = None
    ) -> ImageTokens:
        """The tokens of a tower's output, all of which are patches, with the grid of each image."""
        assert spatial_shapes is not None  # the tower took them
        return ImageTokens(last_hidden_state, spatial_shapes, config.patch_size)

    def whole_image_size(self, config: Any) -> int:
        """Side in pixels of the square of as many patches as the tower has positions for."""
        return math.isqrt(config.num_patches) * config.patch_size


@VISION_ADAPTERS.register(Eva02VisionConfig.model_type)
class Eva02VisionAdapter(VisionAdapter):
    """EVA02-CLIP, whose tower is part of this package."""

    def build(self, config: Any) -> PreTrainedModel:
        """The tower, with new weights."""
        # Code that came with a repository holds this configuration twice, once for the model's configuration and once
        # for the model: `AutoModel`'s mapping by class would know only one of them.
        return Eva02VisionModel._from_config(config)


class ViTKindAdapter(VisionAdapter):
    """Towers whose tokens leave normalized, with a class token and a patch embedding that counts channels."""

    positions = "embeddings.position_embeddings"
    projects = False

    def add_mask_projection(self, tower: PreTrainedModel, mask_bias: bool) -> None:
        """Puts [`MaskedPatchEmbeddings`] in place of the tower's own."""
        embeddings: Any = tower.embeddings
        embeddings.patch_embeddings = MaskedPatchEmbeddings(embeddings.patch_embeddings, mask_bias)

    def pool_regions(self, tower: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mean of patch tokens under region weights; shapes as in [`VisionAdapter.pool_regions`]."""
        return weighted_mean(tokens, weights)


@VISION_ADAPTERS.register("vit")
class ViTVisionAdapter(ViTKindAdapter):
    """A plain ViT, whose class token represents the image.

    The pooling layer behind it is left out: most checkpoints were trained without one.
    """

    optional_weights = ("pooler.",)

    def build(self, config: Any) -> PreTrainedModel:
        """The tower, with new weights and without its pooling layer."""
        return AutoModel.from_config(config, add_pooling_layer=False)

    def pooled_image(self, outputs: BaseModelOutputWithPooling) -> Tensor:
        """`(B, width)`: the class token."""
        return outputs.last_hidden_state[:, 0]


@VISION_ADAPTERS.register("dinov2")
class Dinov2VisionAdapter(ViTKindAdapter):
    """DINOv2."""

    takes_any_size = True

    def feed_forward_width(self, config: Any) -> int:
        """Width inside the feed-forward layers of the tower; those with SwiGLU, which are narrower, keep the ratio."""
        return config.hidden_size * config.mlp_ratio


@VISION_ADAPTERS.register("dinov2_with_registers")
class Dinov2WithRegistersVisionAdapter(Dinov2VisionAdapter):
    """DINOv2 with register tokens between the class token and the patches."""

    antialias = True


@VISION_ADAPTERS.register("dinov3_vit")
class Dinov3VisionAdapter(VisionAdapter):
    """DINOv3: a class token, register tokens, rotary positions of any grid."""

    takes_any_size = True
    projects = False

    def pool_regions(self, tower: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mean of patch tokens under region weights, which leave the tower normalized; shapes as in
        [`VisionAdapter.pool_regions`]."""
        return weighted_mean(tokens, weights)
