"""CLOC configuration."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_choices import TEXT_POOLINGS, TEXT_PROJECTIONS, check_choice, check_tile_size, check_towers
from .configuration_pipelines import SavesPipelines

REGION_READOUTS = ("prompt", "mean", "roi_align")
PROMPTER_LAYERS = ("soft_pooling", "first")


@strict
class CLOCConfig(SavesPipelines, PreTrainedConfig):
    r"""
    Configuration of [`CLOCModel`] (Contrastive Localized Language-Image Pre-Training, arXiv 2410.02746).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A CLIP- or SigLIP-family vision tower or an `eva02_vision_model`; a default `clip_vision_model` when not
            given.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any text model that `AutoModel` builds; a default `clip_text_model` when not given. `None` builds the model
            without a text tower: pooled states then come in as `text_states` and `text_hidden_size` gives their width.
        projection_dim (`int`, *optional*, defaults to 512):
            Width of the space that images, regions and texts share.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Logarithm of the initial inverse temperature, of the image-text and of the region-text loss.
        text_pooling (`str`, *optional*, defaults to `"eos"`):
            `"mean"`, `"last"`, `"eos"` or `"cls"`, over the real tokens.
        text_projection (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"mlp_adapter"`.
        bidirectional (`bool`, *optional*, defaults to `False`):
            Turns off the causal mask of a decoder text tower.
        text_hidden_size (`int`, *optional*):
            Width of the pooled text states; read from `text_config` when there is one.
        text_model_name (`str`, *optional*):
            The text model that a configuration with `text_config=None` expects its states from.
        region_readout (`str`, *optional*, defaults to `"prompt"`):
            What a region becomes: the Prompter's output at the prompt (`"prompt"`), the mean of all output tokens of
            the first edition's layer (`"mean"`), or RoIAlign of the image tokens without a Prompter (`"roi_align"`).
            The paper leaves the readout open.
        prompter_layer (`str`, *optional*, defaults to `"soft_pooling"`):
            `"soft_pooling"` looks by position, reads content, and starts as a soft pooling of the region
            ([`CLOCPrompterLayer`]); `"first"` is plain self-attention, the layer of pixclip-hf 0.1
            ([`CLOCFirstPrompterLayer`]). A folder saved by 0.1 does not name its layer: it loads with
            `prompter_layer="first"`.
        prompter_prior (`bool`, *optional*, defaults to `True`):
            Adds the logarithm of each patch's share inside the region to the attention of region prompts, with a
            learned gain per head. Without it (the paper's layer), a mask prompts by its tight box.
        grounding (`bool`, *optional*, defaults to `True`):
            Builds the text prompt and the box head.
        prompter_num_attention_heads (`int`, *optional*):
            Heads of the Prompter's layer; those of the vision tower when not given.
        prompter_intermediate_size (`int`, *optional*):
            Width of its feed-forward part; that of the vision tower when not given.
        position_scale (`float`, *optional*, defaults to 0.5):
            Standard deviation of the random Fourier frequencies, in cycles per half image side.
        roi_align_size (`int`, *optional*, defaults to 7):
            Bins a side of RoIAlign.
        image_text_loss_weight, region_text_loss_weight, grounding_loss_weight (`float`, *optional*, default to 1.0):
            Weights of the three losses (paper: L_CLIP + λ (L_region-text + L_grounding); λ is not given there).
        box_l1_weight, box_giou_weight (`float`, *optional*, default to 1.0):
            Weights inside the grounding loss.
        text_similarity_threshold (`float`, *optional*):
            Texts whose cosine similarity to the positive text lies above it are no negatives. `None` takes out equal
            texts only: a text tower that starts from random weights puts all texts close together, and a threshold
            would then take out true negatives, half of all of them and more.
        contrastive_tile_size (`int`, *optional*):
            Edge of the tiles that the contrastive losses are computed in, so that no matrix of all pairs is held; 0
            for one matrix. In tiles where a batch has many pairs when not given. The values are the same.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new layers' weights.

    Raises:
        ValueError: an unknown readout, layer, pooling or projection; a composite or unsupported tower configuration;
            a saved configuration of pixclip-hf 0.1 without `prompter_layer`.
    """

    model_type = "cloc"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
    }
    keys_to_ignore_at_inference = ["loss_parts"]
    # What may prompt a region, the usual one first.
    prompts = ("box", "mask")

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = field(default_factory=lambda: {"model_type": "clip_text_model"})
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    text_pooling: str = "eos"
    text_projection: str = "linear"
    bidirectional: bool = False
    text_hidden_size: int | None = None
    text_model_name: str | None = None
    region_readout: str = "prompt"
    prompter_layer: str = "soft_pooling"
    prompter_prior: bool = True
    grounding: bool = True
    prompter_num_attention_heads: int | None = None
    prompter_intermediate_size: int | None = None
    position_scale: float | int = 0.5
    roi_align_size: int = 7
    image_text_loss_weight: float | int = 1.0
    region_text_loss_weight: float | int = 1.0
    grounding_loss_weight: float | int = 1.0
    box_l1_weight: float | int = 1.0
    box_giou_weight: float | int = 1.0
    text_similarity_threshold: float | int | None = None
    contrastive_tile_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        check_tile_size(self.contrastive_tile_size)
        check_choice("text_pooling", self.text_pooling, TEXT_POOLINGS)
        check_choice("text_projection", self.text_projection, TEXT_PROJECTIONS)
        check_choice("region_readout", self.region_readout, REGION_READOUTS)
        check_choice("prompter_layer", self.prompter_layer, PROMPTER_LAYERS)
        if self.region_readout == "mean" and self.prompter_layer != "first":
            raise ValueError(
                "`region_readout` 'mean' averages the output tokens of `prompter_layer='first'`, "
                f"got {self.prompter_layer!r}."
            )
        super().__post_init__(**kwargs)
        check_towers(self)
        heads = self.prompter_num_attention_heads or self.vision_config.num_attention_heads
        if self.vision_config.hidden_size % heads or self.vision_config.hidden_size % 2:
            raise ValueError(
                f"`prompter_num_attention_heads` ({heads}) must divide `vision_config.hidden_size` "
                f"({self.vision_config.hidden_size}), which must be even."
            )

    @property
    def prompts_by_coverage(self) -> bool:
        """Whether a mask prompts by its own pixels; by its tight box otherwise."""
        return self.region_readout != "roi_align" and self.prompter_layer != "first" and self.prompter_prior

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
