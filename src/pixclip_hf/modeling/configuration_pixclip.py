"""PixCLIP configuration."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_region_text import RegionTextConfig, check_choice

LOCAL_GLOBAL_OBJECTIVES = ("cosine", "contrastive")


@strict
class PixCLIPConfig(RegionTextConfig):
    r"""
    Configuration of [`PixCLIPModel`] (PixCLIP, arXiv 2511.04601).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            As in [`RegionTextConfig`]; the tower needs a convolutional patch projection, which takes the mask.
        text_pooling, text_projection (`str`, *optional*, default to `"mean"` and `"mlp_adapter"`):
            These and all other fields of the towers and the text side are those of [`RegionTextConfig`].
        mask_mean, mask_std (`float`, *optional*, default to 0.5 and 0.26):
            A binary mask `m` enters the patch projection as `(m - mask_mean) / mask_std`.
        mask_bias (`bool`, *optional*, defaults to `False`):
            Gives the mask projection a bias (the EVA02 checkpoints have one).
        visual_projection_bias (`bool`, *optional*, defaults to `False`):
            Gives the image projection a bias (the EVA02 checkpoints have one).
        mask_text_loss_weight, crop_text_loss_weight, local_global_loss_weight (`float`, *optional*, default to 1.0):
            Weights of the three training branches. Their exact form is reconstructed: see
            [`PixCLIPModel.compute_loss`].
        local_global_objective (`str`, *optional*, defaults to `"cosine"`):
            How the third branch compares a region's pooled features with its crop: `"cosine"`, or `"contrastive"`,
            among the crops of the whole batch, which also teaches what tells one crop from another.

    Raises:
        ValueError: as [`RegionTextConfig`]; `mask_std` is not positive; an unknown `local_global_objective`.
    """

    model_type = "pixclip"
    prompts = ("mask",)
    default_text_pooling = "mean"
    dropped_fields: ClassVar[dict[str, str]] = RegionTextConfig.dropped_fields | {
        "max_regions_per_forward": "the model's attribute of that name"
    }

    text_projection: str = "mlp_adapter"
    mask_mean: float | int = 0.5
    mask_std: float | int = 0.26
    mask_bias: bool = False
    visual_projection_bias: bool = False
    mask_text_loss_weight: float | int = 1.0
    crop_text_loss_weight: float | int = 1.0
    local_global_loss_weight: float | int = 1.0
    local_global_objective: str = "cosine"

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.mask_std > 0:
            raise ValueError(f"`mask_std` must be positive, got {self.mask_std}.")
        check_choice("local_global_objective", self.local_global_objective, LOCAL_GLOBAL_OBJECTIVES)
        super().__post_init__(**kwargs)


__all__ = ["PixCLIPConfig"]
