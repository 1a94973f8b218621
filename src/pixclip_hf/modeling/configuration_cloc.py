"""CLOC configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_region_text import RegionTextConfig, check_choice

REGION_READOUTS = ("prompt", "mean", "roi_align", "image_head")
# Readouts without a Prompter.
POOLED_READOUTS = ("roi_align", "image_head")
PROMPTER_LAYERS = ("soft_pooling", "first")


@strict
class CLOCConfig(RegionTextConfig):
    r"""
    Configuration of [`CLOCModel`] (Contrastive Localized Language-Image Pre-Training, arXiv 2410.02746).

    Args:
        text_pooling, text_projection (`str`, *optional*, default to `"eos"` and `"linear"`):
            These and all other fields of the towers and the text side are those of [`RegionTextConfig`].
        region_readout (`str`, *optional*, defaults to `"prompt"`):
            What a region becomes: the Prompter's output at the prompt (`"prompt"`), the mean of all output tokens of
            the first edition's layer (`"mean"`), or, without a Prompter, RoIAlign of the image tokens (`"roi_align"`)
            or their mean under the region's coverage, read by the image's own head (`"image_head"`). The paper leaves
            the readout open.
        prompter_layer (`str`, *optional*, defaults to `"soft_pooling"`):
            `"soft_pooling"` attends by position, reads content, and starts as a soft pooling of the region
            ([`CLOCPrompterLayer`]); `"first"` is plain self-attention, the layer of pixclip-hf 0.1
            ([`CLOCFirstPrompterLayer`]). A folder saved by 0.1 does not name its layer: it loads with
            `prompter_layer="first"`.
        prompter_prior (`bool`, *optional*, defaults to `True`):
            Adds the logarithm of each patch's share inside the region to the attention of region prompts, with a
            learned gain per head. Without it (the paper's layer), a mask prompts by its tight box.
        prompter_points (`bool`, *optional*, defaults to `False`):
            Builds what reads points as prompts (`CLOCPointMask`, `CLOCPointPrompts`). Needs
            `prompter_layer="soft_pooling"` and `region_readout="prompt"`. A model that is loaded with it from a folder
            without it starts these layers from new weights.
        grounding (`bool`, *optional*, defaults to `True`):
            Builds the text prompt and the box head.
        prompter_num_attention_heads (`int`, *optional*):
            Heads of the Prompter's layer; those of the vision tower when not given.
        prompter_intermediate_size (`int`, *optional*):
            Width of its feed-forward part; that of the vision tower when not given.
        position_scale (`float`, *optional*, defaults to 0.5):
            Standard deviation of the random Fourier frequencies, in cycles per half image side.
        roi_align_size (`int`, *optional*, defaults to 7):
            Bins per side of RoIAlign.
        region_text_loss_weight, grounding_loss_weight (`float`, *optional*, default to 1.0):
            Weights beside `image_text_loss_weight` (paper: L_CLIP + λ (L_region-text + L_grounding); λ is not given
            there).
        box_l1_weight, box_giou_weight (`float`, *optional*, default to 1.0):
            Weights inside the grounding loss.

    Raises:
        ValueError: as [`RegionTextConfig`]; an unknown readout or layer; points for a readout or layer that cannot
            read them; heads that do not divide the tower's width; a saved configuration of pixclip-hf 0.1 without
            `prompter_layer`.
    """

    model_type = "cloc"

    region_readout: str = "prompt"
    prompter_layer: str = "soft_pooling"
    prompter_prior: bool = True
    prompter_points: bool = False
    grounding: bool = True
    prompter_num_attention_heads: int | None = None
    prompter_intermediate_size: int | None = None
    position_scale: float | int = 0.5
    roi_align_size: int = 7
    region_text_loss_weight: float | int = 1.0
    grounding_loss_weight: float | int = 1.0
    box_l1_weight: float | int = 1.0
    box_giou_weight: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        check_choice("region_readout", self.region_readout, REGION_READOUTS)
        check_choice("prompter_layer", self.prompter_layer, PROMPTER_LAYERS)
        if self.region_readout == "mean" and self.prompter_layer != "first":
            raise ValueError(
                "`region_readout` 'mean' averages the output tokens of `prompter_layer='first'`, "
                f"got {self.prompter_layer!r}."
            )
        if self.prompter_points and (self.region_readout, self.prompter_layer) != ("prompt", "soft_pooling"):
            raise ValueError(
                "`prompter_points` needs `region_readout='prompt'` and `prompter_layer='soft_pooling'`, got "
                f"{self.region_readout!r} and {self.prompter_layer!r}."
            )
        super().__post_init__(**kwargs)
        heads = self.prompter_num_attention_heads or self.vision_config.num_attention_heads
        if self.vision_config.hidden_size % heads or self.vision_config.hidden_size % 2:
            raise ValueError(
                f"`prompter_num_attention_heads` ({heads}) must divide `vision_config.hidden_size` "
                f"({self.vision_config.hidden_size}), which must be even."
            )

    @property
    def prompts(self) -> tuple[str, ...]:  # type: ignore[override]
        """What may prompt a region, the usual one first."""
        return ("box", "mask", "point") if self.prompter_points else ("box", "mask")

    @property
    def prompts_by_coverage(self) -> bool:
        """Whether a mask prompts by its own pixels; by its tight box otherwise."""
        if self.region_readout in POOLED_READOUTS:
            return self.region_readout == "image_head"
        return self.prompter_layer != "first" and self.prompter_prior

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a saved dictionary.

        Raises:
            ValueError: it was saved by pixclip-hf 0.1, whose Prompter computes something else, and `prompter_layer` is
                not given.
        """
        # A default read into a missing field would load the weights into other math.
        if "prompter_layer" not in config_dict and "prompter_layer" not in kwargs:
            raise ValueError(
                "This CLOC configuration has no `prompter_layer`: it was saved by pixclip-hf 0.1, whose Prompter "
                'computes something else. Pass `prompter_layer="first"` to `from_pretrained` to load it as it was, or '
                "train a new model."
            )
        given = {name: kwargs.pop(name) for name in ("prompter_layer",) if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)


__all__ = ["CLOCConfig"]
