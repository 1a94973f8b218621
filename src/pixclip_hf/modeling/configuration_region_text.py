"""What the configurations of both models share: towers, text side and losses, and checks that name a wrong value."""

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .configuration_eva02 import Eva02VisionConfig
from .configuration_pipelines import SavesPipelines

logger = logging.get_logger(__name__)

# Here and not only in the package, so that a folder's own code knows the tower too.
AutoConfig.register(Eva02VisionConfig.model_type, Eva02VisionConfig, exist_ok=True)

TEXT_POOLINGS = ("mean", "last", "eos", "cls", "tower")
TEXT_PROJECTIONS = ("linear", "mlp_adapter")
CONTRASTIVE_OBJECTIVES = ("softmax", "sigmoid")
EQUAL_TEXTS = ("left_out", "positive")
# Text towers that pool their tokens themselves, and read the padding behind a text too.
SELF_POOLING_TEXT_TOWERS = ("siglip_text_model", "siglip2_text_model")

# Vision towers that take images of any aspect as rows of patches, in place of a square.
PATCH_TOWERS = ("siglip2_vision_model",)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` naming the field, its value and the choices, unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def pooled_width(text_config: Any) -> int:
    """Width of the pooled states of a text tower: that of its tokens, or of the head it pools them with."""
    pools_itself = text_config.model_type in SELF_POOLING_TEXT_TOWERS
    return text_config.projection_size if pools_itself else text_config.hidden_size


@strict
class RegionTextConfig(SavesPipelines, PreTrainedConfig):
    r"""
    What [`CLOCConfig`] and [`PixCLIPConfig`] share.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A vision tower of the CLIP, SigLIP, DINOv2, DINOv3 or ViT family, or an `eva02_vision_model`; a default
            `clip_vision_model` when not given. A `siglip2_vision_model` takes images of any aspect.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any text encoder or decoder LLM that `AutoModel` builds; a default `clip_text_model` when not given. `None`
            builds the model without a text tower: pooled states then come in as `text_states` and `text_hidden_size`
            gives their width.
        projection_dim (`int`, *optional*, defaults to 512):
            Width of the space that images, regions and texts share.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Logarithm of the initial inverse temperature.
        contrastive_objective (`str`, *optional*, defaults to `"softmax"`):
            What every contrastive part of the loss is: `"softmax"` compares a pair with all others (InfoNCE; CLIP);
            `"sigmoid"` decides about each pair by itself (SigLIP, arXiv 2303.15343). With a sigmoid, logits have a
            learned bias, and the inverse temperature is not bounded by CLIP's 100.
        logit_bias_init_value (`float`, *optional*, defaults to -10.0):
            Initial bias of the logits, with `contrastive_objective="sigmoid"`.
        equal_texts (`str`, *optional*, defaults to `"left_out"`):
            What an image or region and another one's equal text are to each other: with `"left_out"`, neither a
            positive nor a negative pair; with `"positive"`, a positive one, which takes a sigmoid.
        text_pooling (`str`, *optional*):
            `"mean"`, `"last"`, `"eos"` or `"cls"`, over the real tokens. `"tower"` is what SigLIP's text towers pool
            by themselves, and their default; they take no other.
        text_projection (`str`, *optional*):
            `"linear"`, or `"mlp_adapter"` (the released text adapter of PixCLIP).
        bidirectional (`bool`, *optional*, defaults to `False`):
            Turns off the causal mask of a decoder text tower.
        text_hidden_size (`int`, *optional*):
            Width of the pooled text states; read from `text_config` when there is one.
        text_model_name (`str`, *optional*):
            The text model that a configuration with `text_config=None` expects its states from.
        image_text_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the whole-image loss, computed when image captions are in the batch.
        text_similarity_threshold (`float`, *optional*):
            Texts whose cosine similarity to the positive text is above this value are not used as negatives. `None`
            leaves out equal texts only: a text tower that starts from random weights puts all texts close together,
            and a threshold would then leave out half of the true negatives or more.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new layers' weights.

    Raises:
        ValueError: an unknown pooling, projection or objective; a pooling that the text tower does not have; equal
            texts as positives of a softmax; a composite or unsupported tower configuration; no text tower and no
            `text_hidden_size`.
    """

    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
    }
    # What `Trainer` does not gather for predictions: scalars, what the towers gave, and logits of as many regions and
    # texts as a batch has, which cannot be padded along both.
    keys_to_ignore_at_inference = ["loss_parts", "logits_per_region", "vision_model_output", "text_model_output"]
    # What may prompt a region, the usual one first.
    prompts: ClassVar[tuple[str, ...]] = ()
    # Of text towers that do not pool themselves.
    default_text_pooling: ClassVar[str] = "eos"
    # Fields of earlier versions that are settings of a run, not of a model, and what took their place.
    dropped_fields: ClassVar[dict[str, str]] = {
        "contrastive_tile_size": "the model's attribute of that name, or the training argument"
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = field(default_factory=lambda: {"model_type": "clip_text_model"})
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    contrastive_objective: str = "softmax"
    logit_bias_init_value: float | int = -10.0
    equal_texts: str = "left_out"
    text_pooling: str | None = None
    text_projection: str = "linear"
    bidirectional: bool = False
    text_hidden_size: int | None = None
    text_model_name: str | None = None
    image_text_loss_weight: float | int = 1.0
    text_similarity_threshold: float | int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_pooling is not None:
            check_choice("text_pooling", self.text_pooling, TEXT_POOLINGS)
        check_choice("text_projection", self.text_projection, TEXT_PROJECTIONS)
        check_choice("contrastive_objective", self.contrastive_objective, CONTRASTIVE_OBJECTIVES)
        check_choice("equal_texts", self.equal_texts, EQUAL_TEXTS)
        if self.equal_texts == "positive" and self.contrastive_objective == "softmax":
            raise ValueError("`equal_texts='positive'` needs `contrastive_objective='sigmoid'`, got 'softmax'.")
        for name, instead in self.dropped_fields.items():
            # None was the default, which takes nothing away.
            if (value := kwargs.pop(name, None)) is not None:
                logger.warning(
                    f"`{name}={value}` is ignored, since it is no longer a field of the configuration: set {instead}."
                )
        super().__post_init__(**kwargs)
        # Auto classes that know two models for a configuration look through these.
        self.architectures = getattr(self, "architectures", None) or []
        self._check_vision()
        self._check_text()

    def _check_vision(self) -> None:
        """Raises `ValueError` unless `vision_config` describes a tower with a square patch grid, or with any."""
        vision = self.vision_config
        if hasattr(vision, "vision_config"):
            raise ValueError(
                f"`vision_config` must be the configuration of a vision tower, got the composite "
                f"{vision.model_type!r}: pass its `vision_config`."
            )
        if vision.model_type in PATCH_TOWERS:
            return
        for name in ("image_size", "patch_size"):
            value = getattr(vision, name, None)
            if not isinstance(value, int):
                raise ValueError(
                    f"`vision_config.{name}` must be an int, got {value!r} in a {vision.model_type!r} configuration."
                )
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"`vision_config.image_size` ({vision.image_size}) must be a multiple of its `patch_size` "
                f"({vision.patch_size})."
            )

    def _check_text(self) -> None:
        """Checks `text_config`, and fills `text_pooling` and `text_hidden_size`."""
        text = self.text_config
        if text is None:
            self.text_pooling = self.text_pooling or self.default_text_pooling
            if not self.text_hidden_size:
                raise ValueError("`text_hidden_size` must be given when `text_config` is None, got None.")
            return
        if getattr(text, "text_config", None) is not None:
            raise ValueError(
                f"`text_config` must be the configuration of a text tower, got the composite {text.model_type!r}: "
                "pass its `text_config`."
            )
        pools_itself = text.model_type in SELF_POOLING_TEXT_TOWERS
        self.text_pooling = self.text_pooling or ("tower" if pools_itself else self.default_text_pooling)
        if (self.text_pooling == "tower") != pools_itself:
            raise ValueError(
                f"`text_pooling` must be 'tower' for towers that pool themselves, and for no others: got "
                f"{self.text_pooling!r} for {text.model_type!r}."
            )
        width = pooled_width(text)
        if self.text_hidden_size not in (None, width):
            name = "projection_size" if pools_itself else "hidden_size"
            raise ValueError(
                f"`text_hidden_size` ({self.text_hidden_size}) contradicts `text_config.{name}` ({width})."
            )
        self.text_hidden_size = width
        if self.bidirectional:
            text.is_causal = False


__all__ = ["RegionTextConfig"]
