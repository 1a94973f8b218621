"""What both models are: two towers and a projection behind each, and texts of images and regions."""

from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_region_text import RegionTextConfig
from .modeling_gathered_loss import Gather, gathered_contrastive_loss
from .modeling_inherit import model_from_towers
from .modeling_losses import text_ids
from .modeling_outputs import RegionTextOutput, image_text_logits, scaled_similarity, unit
from .modeling_patches import ImageTokens, check_patches, extent
from .modeling_slots import at_least_one, only_real, scatter
from .modeling_text import (
    LogitScale,
    ScaledLinear,
    build_logit_scale,
    build_text_model,
    build_text_projection,
    text_features,
)
from .modeling_vision import VISION_ADAPTERS, VisionAdapter

TOWER_ARGUMENTS = {*TransformersKwargs.__annotations__, "return_dict", "use_cache"}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses what no tower takes: towers swallow any keyword, and a misspelt argument would go unnoticed.

    Raises:
        TypeError: an argument that neither the model nor its towers know.
    """
    if unknown := sorted(set(kwargs) - TOWER_ARGUMENTS):
        raise TypeError(f"Unknown arguments: {', '.join(unknown)}.")


def region_text_features(
    model: Any,
    real: Tensor,
    region_input_ids: Tensor | None,
    region_text_attention_mask: Tensor | None,
    region_text_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalized embeddings `(B, R, D)` and identities `(B, R)` of the region texts; zeros in padded slots, which
    never reach the text tower.

    Args:
        real (`(B, R)` bool): see [`real_slots`].
        region_input_ids, region_text_attention_mask (`(B, R, L)`), region_text_states (`(B, R, D_text)`): the texts.

    Raises:
        ValueError: tokens and states at once, texts for another number of regions, or a real region whose text is all
            padding.
    """
    if region_input_ids is not None and region_text_states is not None:
        raise ValueError("One of `region_input_ids` and `region_text_states` must be given, got both.")
    name = "region_text_states" if region_input_ids is None else "region_input_ids"
    texts = region_text_states if region_input_ids is None else region_input_ids
    if texts.shape[:2] != real.shape:
        raise ValueError(
            f"`{name}` must hold one text per region, shape ({', '.join(map(str, real.shape))}, …), "
            f"got {tuple(texts.shape)}."
        )
    rows = at_least_one(real)
    if not rows.any():
        empty = texts.new_zeros(*real.shape, dtype=torch.long)
        return empty[..., None].expand(*real.shape, model.config.projection_dim).to(model.dtype), empty
    if region_input_ids is None:
        ids = text_ids(texts[rows])
        states = model.get_text_features(text_states=texts[rows], return_dict=True).pooler_output
    else:
        mask = torch.ones_like(texts) if region_text_attention_mask is None else region_text_attention_mask
        if not mask[real].any(-1).all():
            raise ValueError("`region_text_attention_mask` marks the text of a real region as all padding.")
        mask = mask[rows] if rows is real else torch.ones_like(texts[rows])
        ids = text_ids(texts[rows], mask)
        states = model.get_text_features(texts[rows], mask, return_dict=True).pooler_output
    return only_real(scatter(unit(states), rows), real), scatter(ids[:, None], rows)[..., 0] * real


class RegionTextPreTrainedModel(PreTrainedModel):
    """Weight initialization and what every region model declares."""

    config: RegionTextConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Parts whose modules work on one device; the towers bring their own.
    _no_split_modules: set[str] | list[str] | None = ["MLPAdapter"]

    @property
    def can_ground(self) -> bool:
        """Whether the model finds the box of a text in an image: see [`CLOCModel.ground`]."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A registration is for the class that it names: saving a subclass from elsewhere would copy its module and die
        # on what that imports. Sharding makes subclasses too, which are the same class in other clothes.
        if not cls.__module__.startswith("torch."):
            cls._auto_class = None

    def post_init(self) -> None:
        super().post_init()
        # Sharding refuses names that the model does not have, and towers name the parts of their whole family.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def get_input_embeddings(self) -> nn.Embedding | None:
        """None: there are no token embeddings on the image side."""

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts token embeddings into the text tower.

        Raises:
            ValueError: there is no text tower.
        """
        self._text_tower("set_input_embeddings").set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the token embeddings of the text tower; arguments as in `PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: there is no text tower.
        """
        return self._text_tower("resize_token_embeddings").resize_token_embeddings(*args, **kwargs)

    def _text_tower(self, method: str) -> PreTrainedModel:
        text_model = getattr(self, "text_model", None)
        if text_model is None:
            raise ValueError(f"`{method}` needs a text tower, and this {type(self).__name__} has none.")
        return text_model

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # Each tower by itself first: in the custom code that this model is to it, transformers passes over modules
        # without weights of their own, such as CLIP's MLPs, which initialize those of their layers.
        for tower in self.children():
            if isinstance(tower, PreTrainedModel):
                tower.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, LogitScale):
            module.reset_parameters()


class RegionTextVisionModel(RegionTextPreTrainedModel):
    """The image side: a vision tower and the projection behind it, which the subclass sets as `visual_projection`.
    Loads from any checkpoint of the whole model."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = [
        r"^text_model\.",
        r"^text_projection\.",
        r"^logit_scale\.",
    ]

    def __init__(self, config: RegionTextConfig):
        super().__init__(config)
        self.vision_model = self.vision_adapter.build(config.vision_config)

    @property
    def vision_adapter(self) -> VisionAdapter:
        """What is special about the vision tower's family."""
        return VISION_ADAPTERS.of(self.config.vision_config)

    @property
    def takes_patches(self) -> bool:
        """Whether images of any aspect enter as rows of patches, with their `spatial_shapes`."""
        return self.vision_adapter.takes_patches

    def _mask_shape(
        self, pixel_values: Tensor, region_masks: Tensor | None, spatial_shapes: Tensor | None
    ) -> tuple[int, ...]:
        """(H, W) that the masks of a batch must have: where images differ, at least that of the canvas of all."""
        if not self.takes_patches:
            return tuple(pixel_values.shape[-2:])
        if spatial_shapes is None:
            raise ValueError(
                f"`spatial_shapes` must be given for a {self.config.vision_config.model_type!r} tower, got None."
            )
        canvas = extent(spatial_shapes, self.config.vision_config.patch_size)
        if region_masks is None or region_masks.ndim < 2:
            return canvas
        given = tuple(region_masks.shape[-2:])
        return given if given[0] >= canvas[0] and given[1] >= canvas[1] else canvas

    def _image_tokens(
        self, last_hidden_state: Tensor, pixel_values: Tensor, spatial_shapes: Tensor | None
    ) -> ImageTokens:
        config = self.config.vision_config
        return self.vision_adapter.image_tokens(config, last_hidden_state, pixel_values, spatial_shapes)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Image features.

        Args:
            pixel_values (`(B, 3, H, W)`).
            interpolate_pos_encoding: takes images of another size than the tower's, if the tower can; sides are
                multiples of its patch size.
            pixel_attention_mask (`(B, N)`), spatial_shapes (`(B, 2)`): for a tower of variable resolution, whose
                `pixel_values` are patches `(B, N, 3 * patch²)`: which of them are there, and the grid of each image.

        Returns:
            `BaseModelOutputWithPooling`: the vision tower's output with `pooler_output` `(B, D)` projected, not
            normalized.
        """
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        return self._encode(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **patches, **kwargs)

    def _encode(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The tower's output, its pooled states projected."""
        outputs = self._run_tower(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def _run_tower(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        check_arguments(kwargs)
        patches = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        kwargs |= check_patches(self.takes_patches, self.config.vision_config.model_type, patches)
        # No vision tower has a key-value cache, and the text tower's is never used: see `encode_text`.
        kwargs.pop("use_cache", None)
        # A tower that takes patches interpolates its positions to every image.
        if interpolate_pos_encoding and not self.takes_patches:
            patch = self.config.vision_config.patch_size
            if pixel_values.shape[-2] % patch or pixel_values.shape[-1] % patch:
                # No patch would cover the rest, and boxes and masks would lie beside their patches.
                raise ValueError(
                    f"`pixel_values` must have sides that are multiples of the patch size {patch}, got "
                    f"{tuple(pixel_values.shape[-2:])}."
                )
        if interpolate_pos_encoding and not self.vision_adapter.takes_any_size:
            # Not every family of towers has the argument.
            kwargs["interpolate_pos_encoding"] = True
        outputs = self.vision_model(pixel_values=pixel_values, **(kwargs | {"return_dict": True}))
        outputs.pooler_output = self.vision_adapter.pooled_image(outputs)
        return outputs


class RegionTextModel(RegionTextVisionModel):
    """The whole model: beside the image side a text tower, or none, and a projection behind it.

    The `forward` of both models takes texts alike:

    - `input_ids`, `attention_mask`, `position_ids`, `token_type_ids` (`(T, L)`): texts to compare with; for the loss,
      the B image captions. A row whose mask is all padding (or whose state is all zeros, below) is no text: its image
      has no caption. What is returned of it is zeros, and no loss counts it.
    - `region_input_ids`, `region_text_attention_mask` (`(B, R, L)`): one text per region, for the loss.
    - `text_states` (`(T, text_hidden_size)`), `region_text_states` (`(B, R, text_hidden_size)`): pooled states in
      place of tokens.
    - `return_loss`: True or False, or None to compute the loss when region texts are given. `ValueError` for True
      without any texts, or with T other than B captions, and for region texts without regions.
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    # Endings of the names of the vision tower's weights that a checkpoint of the tower cannot have.
    new_vision_weights: ClassVar[tuple[str, ...]] = ()
    _contrastive_tile_size: int | None = None

    def __init__(self, config: RegionTextConfig):
        super().__init__(config)
        self.text_model = build_text_model(config)
        self.text_projection = build_text_projection(config)
        self.logit_scale = build_logit_scale(config)

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The token embeddings of the text tower: None without one, and where they are sharded already, as a part of
        the tower's embeddings, when accelerate asks for them to shard them by themselves."""
        embeddings = None if self.text_model is None else self.text_model.get_input_embeddings()
        return None if hasattr(getattr(embeddings, "weight", None), "device_mesh") else embeddings

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str | None, **kwargs: Any) -> Self:
        """A model that inherits its towers, and what lies behind them where it fits.

        Args:
            vision: CLIP, SigLIP or SigLIP2 checkpoint (composite or vision tower alone), DINOv2, DINOv3 or ViT, or a
                CLOC or PixCLIP; Hub id or folder. Its projection becomes `visual_projection` (the identity where the
                family has none: SigLIP, DINO, ViT), so that image features equal those of the checkpoint; those of a
                ViT are its class token.
            text: CLIP or SigLIP text tower (alone or in a composite), any text encoder, any decoder LLM, or a CLOC or
                PixCLIP, which says how its text tower is pooled. The projection of a CLIP or a region model becomes
                `text_projection` when that is `"linear"`; that of a SigLIP is the identity, and `"linear"` its
                default. When `vision` and `text` are one checkpoint, its `contrastive_objective` is the default, and
                if both projections fit, `logit_scale` is inherited with its bias. None builds the model without a text
                tower: it needs `text_hidden_size` and takes pooled states.
            kwargs: `dtype` of the whole model (float32 when not given; `"auto"` is that of the checkpoints, the wider
                of two), `image_size` (position embeddings are interpolated), `max_position_embeddings` (those of a
                CLIP text tower are stretched: the first 20 stay, the rest is interpolated), `revision` or
                `vision_revision` and `text_revision`, `token`, `cache_dir`, `local_files_only`, and fields of the
                model's configuration.

        Only what no tower has, and projections that fit nothing, start from new weights: see the model's class.

        Raises:
            ValueError: a checkpoint of another architecture; weights of a tower missing, left over or of another
                shape, listed by name; a size that the tower cannot take.
            TypeError: a field that the configuration does not have.
        """
        return model_from_towers(cls, vision, text, cls.new_vision_weights, **kwargs)

    @property
    def contrastive_tile_size(self) -> int | None:
        """Edge of the tiles in which the contrastive losses are computed, so that no matrix of all pairs is held; 0
        computes one matrix. None, the default, uses tiles where a batch has many pairs. The values are the same. This
        is a setting of the run and is not saved."""
        return self._contrastive_tile_size

    @contrastive_tile_size.setter
    def contrastive_tile_size(self, value: int | None) -> None:
        if value is not None and value < 0:
            raise ValueError(f"`contrastive_tile_size` must not be negative, got {value}.")
        self._contrastive_tile_size = value

    def get_logit_scale(self) -> Tensor:
        """Scalar: the inverse temperature between regions and texts."""
        return self.logit_scale()

    def get_logit_bias(self) -> Tensor | None:
        """Scalar: the bias of the logits between regions and texts; None with `contrastive_objective="softmax"`."""
        return self.logit_scale.get_bias()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        text_states: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Text features.

        Args:
            input_ids, attention_mask (`(T, L)`): tokens, padded on either side.
            position_ids (`(T, L)`): their positions; counted from the first real token when not given.
            token_type_ids (`(T, L)`): the segments that BERT's tokenizers return.
            text_states (`(T, text_hidden_size)`): pooled states in place of tokens.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(T, D)`, projected, not normalized.
        """
        check_arguments(kwargs)
        per_token: Any = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        outputs = text_features(
            self.text_model, self.config, input_ids, attention_mask, text_states, **per_token, **kwargs
        )
        # States of a cache, or of a language model in another precision, may not have that of the projection.
        outputs.pooler_output = self.text_projection(outputs.pooler_output.to(self.dtype))
        return outputs

    def _set_texts(
        self,
        output: RegionTextOutput,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        text_states: Tensor | None,
        **kwargs: Any,
    ) -> None:
        """Puts the texts into an output that holds the images and regions: embeddings, identities and logits; zeros
        for rows that hold no text."""
        is_text = None
        if text_states is not None:
            is_text = (text_states != 0).any(-1)
        elif attention_mask is not None:
            is_text = attention_mask.bool().any(-1)
            # A tower must see something; what it gives for it is left out below.
            attention_mask = torch.where(is_text[:, None], attention_mask, 1)
        features = self.get_text_features(
            input_ids, attention_mask, text_states=text_states, **(kwargs | {"return_dict": True})
        )
        output.text_model_output = features
        output.text_embeds = unit(features.pooler_output)
        if text_states is None:
            output.text_ids = text_ids(input_ids, attention_mask)
        else:
            output.text_ids = text_ids(text_states)
        if is_text is not None:
            output.text_embeds = only_real(output.text_embeds, is_text)
            output.text_ids = output.text_ids * is_text
        output.logits_per_image = image_text_logits(
            self.logit_scale(), self.logit_scale.get_bias(), output.image_embeds, output.text_embeds
        )
        output.logits_per_text = output.logits_per_image.T
        if output.region_embeds is not None:
            output.logits_per_region = scaled_similarity(
                self.get_logit_scale(), self.get_logit_bias(), output.region_embeds, output.text_embeds
            )

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the weights, the configuration and the code that it names; see `PreTrainedModel.save_pretrained`."""
        if self.is_remote_code():
            # Of one registration only one auto class is named.
            code = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            named = {"AutoModelForZeroShotImageClassification": code}
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | named
        super().save_pretrained(save_directory, *args, **kwargs)

    def _image_text_loss(self, output: RegionTextOutput, gather: Gather | None, ranks: int) -> dict[str, Tensor]:
        """The part `image_text`, where the output has captions and the part a weight."""
        if output.text_embeds is None or not self.config.image_text_loss_weight:
            return {}
        loss = gathered_contrastive_loss(
            output.image_embeds,
            output.text_embeds,
            self.logit_scale(),
            output.text_ids,
            # Padding has no identity: see `_set_texts`.
            output.text_ids != 0,
            gather=gather,
            ranks=ranks,
            tile_size=self.contrastive_tile_size,
            logit_bias=self.logit_scale.get_bias(),
            equal_texts=self.config.equal_texts,
        )
        return {"image_text": loss}

    def _region_text_loss(
        self, embeds: Tensor, output: RegionTextOutput, is_real: Tensor, gather: Gather | None, ranks: int
    ) -> Tensor:
        """The contrastive loss between embeddings (B, R, D) of the regions and the region texts of an output."""
        return gathered_contrastive_loss(
            embeds.flatten(0, 1),
            output.region_text_embeds.flatten(0, 1),
            self.get_logit_scale(),
            output.region_text_ids.flatten(),
            is_real.flatten(),
            similarity_threshold=self.config.text_similarity_threshold,
            gather=gather,
            ranks=ranks,
            tile_size=self.contrastive_tile_size,
            logit_bias=self.get_logit_bias(),
            equal_texts=self.config.equal_texts,
        )
