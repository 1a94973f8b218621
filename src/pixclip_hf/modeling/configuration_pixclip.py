"""PixCLIP configuration."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_choices import TEXT_POOLINGS, TEXT_PROJECTIONS, check_choice, check_tile_size, check_towers
from .configuration_pipelines import SavesPipelines


@strict
class PixCLIPConfig(SavesPipelines, PreTrainedConfig):
    r"""
    Configuration of [`PixCLIPModel`] (PixCLIP, arXiv 2511.04601).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A CLIP- or SigLIP-family vision tower with a convolutional patch projection, or an `eva02_vision_model`; a
            default `clip_vision_model` when not given.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any text encoder or decoder LLM that `AutoModel` builds; a default `clip_text_model` when not given. `None`
            builds the model without a text tower: pooled states then come in as `text_states` and `text_hidden_size`
            gives their width.
        projection_dim (`int`, *optional*, defaults to 512):
            Width of the space that images, regions and texts share.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Logarithm of the initial inverse temperature.
        text_pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"last"`, `"eos"` or `"cls"`, over the real tokens.
        text_projection (`str`, *optional*, defaults to `"mlp_adapter"`):
            `"mlp_adapter"` (the released text adaptor) or `"linear"`.
        bidirectional (`bool`, *optional*, defaults to `False`):
            Turns off the causal mask of a decoder text tower.
        text_hidden_size (`int`, *optional*):
            Width of the pooled text states; read from `text_config` when there is one.
        text_model_name (`str`, *optional*):
            The text model that a configuration with `text_config=None` expects its states from.
        mask_mean, mask_std (`float`, *optional*, default to 0.5 and 0.26):
            A binary mask `m` enters the patch projection as `(m - mask_mean) / mask_std`.
        mask_bias (`bool`, *optional*, defaults to `False`):
            Gives the mask projection a bias (the EVA02 checkpoints have one).
        visual_projection_bias (`bool`, *optional*, defaults to `False`):
            Gives the image projection a bias (the EVA02 checkpoints have one).
        max_regions_per_forward (`int`, *optional*, defaults to 64):
            Most regions that one pass of the vision tower prompts when no gradients are kept; more are embedded in
            several passes. 64 of a ViT-B/16 at 224 pixels take about 0.7 GB in float32.
        mask_text_loss_weight, crop_text_loss_weight, local_global_loss_weight (`float`, *optional*, default to 1.0):
            Weights of the three training branches. Their exact form is reconstructed: see
            [`PixCLIPModel.compute_loss`].
        image_text_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the whole-image loss, computed when image captions are in the batch.
        text_similarity_threshold (`float`, *optional*):
            Texts whose cosine similarity to the positive text lies above it are no negatives. `None` takes out equal
            texts only.
        contrastive_tile_size (`int`, *optional*):
            Edge of the tiles that the contrastive losses are computed in, so that no matrix of all pairs is held; 0
            for one matrix. In tiles where a batch has many pairs when not given. The values are the same.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new layers' weights.

    Raises:
        ValueError: an unknown pooling or projection; `mask_std` or `max_regions_per_forward` below what they may be; a
            composite or unsupported tower configuration.
    """

    model_type = "pixclip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
    }
    keys_to_ignore_at_inference = ["loss_parts"]
    # What may prompt a region, the usual one first.
    prompts = ("mask",)

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = field(default_factory=lambda: {"model_type": "clip_text_model"})
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    text_pooling: str = "mean"
    text_projection: str = "mlp_adapter"
    bidirectional: bool = False
    text_hidden_size: int | None = None
    text_model_name: str | None = None
    mask_mean: float | int = 0.5
    mask_std: float | int = 0.26
    mask_bias: bool = False
    visual_projection_bias: bool = False
    max_regions_per_forward: int = 64
    mask_text_loss_weight: float | int = 1.0
    crop_text_loss_weight: float | int = 1.0
    local_global_loss_weight: float | int = 1.0
    image_text_loss_weight: float | int = 1.0
    text_similarity_threshold: float | int | None = None
    contrastive_tile_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        check_tile_size(self.contrastive_tile_size)
        check_choice("text_pooling", self.text_pooling, TEXT_POOLINGS)
        check_choice("text_projection", self.text_projection, TEXT_PROJECTIONS)
        if not self.mask_std > 0:
            raise ValueError(f"`mask_std` must be positive, got {self.mask_std}.")
        if self.max_regions_per_forward < 1:
            raise ValueError(f"`max_regions_per_forward` must be at least 1, got {self.max_regions_per_forward}.")
        super().__post_init__(**kwargs)
        check_towers(self)


__all__ = ["PixCLIPConfig"]
