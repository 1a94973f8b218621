"""PixCLIP: a CLIP whose vision tower takes a mask, with an LLM as text tower and three training branches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_choices import check_choice
from .configuration_pixclip import PixCLIPConfig
from .modeling_batches import (
    Gather,
    at_least_one,
    check_arguments,
    gathered_contrastive_loss,
    real_slots,
    region_mask,
    region_text_features,
    rows_per_rank,
    scatter,
    set_losses,
    unit,
    wants_loss,
)
from .modeling_inherit import model_from_towers
from .modeling_losses import local_global_loss, text_ids
from .modeling_regions import mask_patch_weights
from .modeling_text import LogitScale, ScaledLinear, build_text_model, build_text_projection, text_features
from .modeling_vision import (
    MaskedPatchConv,
    add_mask_projection,
    build_vision_model,
    patch_grid,
    patch_tokens,
    pool_through_head,
)

REGION_MODES = ("prompted", "pooled")


@dataclass
class PixCLIPOutput(ModelOutput):
    """
    Output of [`PixCLIPModel`]. B images, R region slots an image, T texts, D the projection width; every embedding is
    L2-normalised; rows of padded regions are zero.

    Args:
        loss (scalar): weighted sum of `loss_parts`.
        loss_parts (`dict` of scalars): `mask_text`, `crop_text`, `local_global`, `image_text`, unweighted; those whose
            inputs are in the batch.
        logits_per_region (`(B, R, T)`), logits_per_image (`(B, T)`): scaled cosine similarities to the texts.
        region_embeds (`(B, R, D)`), image_embeds (`(B, D)`), text_embeds (`(T, D)`).
        region_text_embeds (`(B, R, D)`): embeddings of the region texts.
        crop_embeds (`(B, R, D)`): embeddings of the crops, each with its mask.
        pooled_region_embeds (`(B, R, D)`): patch features of the image pass, pooled under the masks.
        text_ids (`(T,)`), region_text_ids (`(B, R)`): identities of the texts, see [`text_ids`].
    """

    loss: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    logits_per_region: Tensor | None = None
    logits_per_image: Tensor | None = None
    region_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    region_text_embeds: Tensor | None = None
    crop_embeds: Tensor | None = None
    pooled_region_embeds: Tensor | None = None
    text_ids: Tensor | None = None
    region_text_ids: Tensor | None = None


class PixCLIPPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what every PixCLIP model declares."""

    config: PixCLIPConfig
    config_class = PixCLIPConfig
    base_model_prefix = "pixclip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def get_input_embeddings(self) -> None:
        """None: each tower has its own. Sharding asks the whole model, and would shard a part of a tower twice."""

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # The mask projection sits inside a transformers tower, whose own initialisation does not know its weight.
        for module in self.modules():
            if isinstance(module, MaskedPatchConv):
                module.reset_mask_parameters()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, LogitScale):
            init.constant_(module.log_scale, module.init_value)


class PixCLIPVisionModel(PixCLIPPreTrainedModel):
    """The image side of PixCLIP: the mask-prompted vision tower and its head. Loads from any [`PixCLIPModel`]
    checkpoint; it embeds images and masks and takes no text."""

    # Ways to read a region: the values of `mode` in `get_region_features`.
    region_modes = REGION_MODES
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale\."]

    def __init__(self, config: PixCLIPConfig):
        super().__init__(config)
        self.vision_model = build_vision_model(config.vision_config)
        add_mask_projection(self.vision_model, config.mask_bias)
        self.visual_projection = ScaledLinear(
            config.vision_config.hidden_size, config.projection_dim, bias=config.visual_projection_bias
        )
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, use_mask: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Whole-image features: the region is the image, so the mask is all ones.

        Args:
            pixel_values (`(B, 3, H, W)`).
            use_mask: False leaves the mask branch out, as in the CLIP that the weights came from.

        Returns:
            `BaseModelOutputWithPooling`: the vision tower's output with `pooler_output` `(B, D)` projected, not
            normalised.
        """
        masks = torch.ones_like(pixel_values[:, 0]) if use_mask else None
        return self._encode(pixel_values, masks, **kwargs)

    @can_return_tuple
    def get_region_features(
        self,
        pixel_values: Tensor,
        region_masks: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        mode: str = "prompted",
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Region features.

        Args:
            pixel_values (`(B, 3, H, W)`).
            region_masks (`(B, R, H, W)`): 1 inside the region.
            region_attention_mask (`(B, R)`, *optional*): 1 for real regions; the others come back as zeros.
            mode: `"prompted"`, the mask enters the tower: one pass a region, sees the context; without gradients no
                more than `config.max_regions_per_forward` at a time. `"pooled"`, patch features of one image pass
                pooled under the mask and sent through the same head.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, D)`, not normalised; `last_hidden_state`, the tokens
            of the tower's passes: one row a real region (`"prompted"`; a region slot when compiled) or an image
            (`"pooled"`).

        Raises:
            ValueError: no `region_masks`, masks of another shape, or an unknown mode.
        """
        check_choice("mode", mode, REGION_MODES)
        trailing = tuple(pixel_values.shape[-2:])
        real = region_mask("region_masks", region_masks, region_attention_mask, pixel_values, trailing)
        if not real.numel():
            return BaseModelOutputWithPooling(
                pooler_output=pixel_values.new_zeros(*real.shape, self.config.projection_dim)
            )
        if mode == "pooled":
            outputs = self.get_image_features(pixel_values, **{**kwargs, "return_dict": True})
            features = self._pooled_features(outputs.last_hidden_state, pixel_values, region_masks) * real[..., None]
        elif torch.compiler.is_compiling():
            # Compiled, padded regions go through the tower too: how many are real is not known to the graph.
            images = pixel_values.repeat_interleave(real.shape[1], dim=0)
            outputs = self._encode(images, region_masks.flatten(0, 1), **kwargs)
            features = outputs.pooler_output.unflatten(0, real.shape) * real[..., None]
        else:
            rows = at_least_one(real)
            outputs = self._encode_prompted(pixel_values, region_masks, rows, **kwargs)
            features = scatter(outputs.pooler_output, rows) * real[..., None]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        region_masks: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        mode: str = "prompted",
        **kwargs: Any,
    ) -> PixCLIPOutput:
        """Normalised image embeddings and, with masks, region embeddings. Arguments as in [`PixCLIPModel`]."""
        image = self.get_image_features(pixel_values, **{**kwargs, "return_dict": True}).pooler_output
        output = PixCLIPOutput(image_embeds=unit(image))
        if region_masks is not None:
            regions = self.get_region_features(
                pixel_values, region_masks, region_attention_mask, mode, **{**kwargs, "return_dict": True}
            )
            output.region_embeds = unit(regions.pooler_output)
        # Anew, so that the fields are in their order.
        return PixCLIPOutput(**output)

    def _encode_prompted(
        self, pixel_values: Tensor, masks: Tensor, rows: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """A row a region that `rows` (B, R) marks, from as many passes as the memory bound asks for."""
        images, slots = rows.nonzero(as_tuple=True)
        # Gradients keep the activations of every part: splitting would save nothing.
        size = len(images) if torch.is_grad_enabled() else self.config.max_regions_per_forward
        parts = [
            self._encode(pixel_values[image], masks[image, slot], **kwargs)
            for image, slot in zip(images.split(size), slots.split(size), strict=True)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _encode(self, pixel_values: Tensor, masks: Tensor | None, **kwargs: Any) -> BaseModelOutputWithPooling:
        check_arguments(kwargs)
        kwargs.pop("return_dict", None)
        if masks is not None:
            scaled = (masks.to(pixel_values.dtype) - self.config.mask_mean) / self.config.mask_std
            pixel_values = torch.cat([pixel_values, scaled[:, None]], dim=1)
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def _pooled_features(self, last_hidden_state: Tensor, pixel_values: Tensor, masks: Tensor) -> Tensor:
        grid = patch_grid(self.config.vision_config, pixel_values)
        tokens = patch_tokens(last_hidden_state, grid)
        return self.visual_projection(pool_through_head(self.vision_model, tokens, mask_patch_weights(masks, grid)))


class PixCLIPModel(PixCLIPVisionModel):
    """PixCLIP (arXiv 2511.04601): a mask prompt on the image side, a language model on the text side, compared in one
    space.

    Trained on regions with a long caption each (`region_input_ids`), on their crops (`crop_pixel_values`,
    `crop_masks`) and, when image captions are given (`input_ids`), on whole images.
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: PixCLIPConfig):
        super().__init__(config)
        self.text_model = build_text_model(config)
        self.text_projection = build_text_projection(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str | None, **kwargs: Any) -> "PixCLIPModel":
        """A model that inherits its towers, and what lies behind them where it fits.

        Args:
            vision: CLIP, SigLIP or fixed-resolution SigLIP2 checkpoint (composite or vision tower alone), or a CLOC
                or PixCLIP; Hub id or folder. Its projection becomes `visual_projection` (SigLIP's, which has none,
                the identity), so that image features equal those of the checkpoint, whatever the mask.
            text: CLIP text tower (alone or in a composite), any text encoder, any decoder LLM, or a CLOC or PixCLIP,
                which says how its text tower is pooled. The projection of a CLIP or a region model becomes
                `text_projection` when that is `"linear"`; when `vision` and `text` are one checkpoint and both
                projections fit, `logit_scale` is inherited too. None builds the model without a text tower: it needs
                `text_hidden_size` and takes pooled states.
            kwargs: `dtype` of the whole model (float32 when not given; `"auto"` is that of the checkpoints, the wider
                of two), `image_size` (position embeddings are interpolated), `max_position_embeddings` (those of a
                CLIP text tower are stretched: the first 20 stay, the rest is interpolated), `revision` or
                `vision_revision` and `text_revision`, `token`, `cache_dir`, `local_files_only`, and fields of
                [`PixCLIPConfig`].

        Only the mask projection (zero) and projections that fit nothing start from new weights.

        Raises:
            ValueError: a checkpoint of another architecture; weights of a tower missing, left over or of another
                shape, listed by name; a size that the tower cannot take.
            TypeError: a field that the configuration does not have.
        """
        return model_from_towers(cls, PixCLIPConfig, vision, text, (".mask_weight", ".mask_bias"), **kwargs)

    def get_logit_scale(self) -> Tensor:
        """Scalar: the inverse temperature between regions and texts."""
        return self.logit_scale()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_states: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Text features.

        Args:
            input_ids, attention_mask (`(T, L)`): tokens, padded on either side.
            text_states (`(T, text_hidden_size)`): pooled states in place of tokens.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(T, D)`, projected, not normalised.
        """
        check_arguments(kwargs)
        outputs = text_features(self.text_model, self.config, input_ids, attention_mask, text_states, **kwargs)
        # States of a cache, or of a language model in another precision, may not have that of the projection.
        outputs.pooler_output = self.text_projection(outputs.pooler_output.to(self.dtype))
        return outputs

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        region_masks: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        crop_pixel_values: Tensor | None = None,
        crop_masks: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        region_input_ids: Tensor | None = None,
        region_text_attention_mask: Tensor | None = None,
        text_states: Tensor | None = None,
        region_text_states: Tensor | None = None,
        mode: str = "prompted",
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> PixCLIPOutput:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): normalised RGB.
            region_masks (`(B, R, H, W)`): 1 inside the region.
            region_attention_mask (`(B, R)`): 1 for real regions.
            crop_pixel_values (`(B, R, 3, h, w)`), crop_masks (`(B, R, h, w)`): crops around the regions, for the loss.
            input_ids, attention_mask (`(T, L)`): texts to compare with; for the loss, the B image captions.
            region_input_ids, region_text_attention_mask (`(B, R, L)`): a text a region, for the loss.
            text_states (`(T, text_hidden_size)`), region_text_states (`(B, R, text_hidden_size)`): pooled states in
                place of tokens.
            mode: see [`PixCLIPModel.get_region_features`].
            return_loss: True or False, or None to compute the loss when region texts are given.

        Returns:
            [`PixCLIPOutput`]; a training pass that uses no whole-image embedding leaves `image_embeds` out.

        Raises:
            ValueError: `return_loss=True` without any texts or with T other than B captions; region texts without
            masks.
        """
        texts = input_ids if text_states is None else text_states
        region_texts = region_input_ids if region_text_states is None else region_text_states
        with_loss = wants_loss(return_loss, pixel_values, texts, region_texts)
        with_crops = crop_pixel_values is not None
        kwargs["return_dict"] = True

        output, image = PixCLIPOutput(), None
        if not with_loss or texts is not None or (with_crops and self.config.local_global_loss_weight):
            image = self.get_image_features(pixel_values, **kwargs)
            output.image_embeds = unit(image.pooler_output)
        if region_masks is not None:
            regions = self.get_region_features(pixel_values, region_masks, region_attention_mask, mode, **kwargs)
            output.region_embeds = unit(regions.pooler_output)
        if texts is not None:
            features = self.get_text_features(input_ids, attention_mask, text_states, return_dict=True)
            output.text_embeds = unit(features.pooler_output)
            output.text_ids = text_ids(texts, None if input_ids is None else attention_mask)
            output.logits_per_image = self.logit_scale() * output.image_embeds @ output.text_embeds.T
            if output.region_embeds is not None:
                output.logits_per_region = self.logit_scale() * output.region_embeds @ output.text_embeds.T
        if region_texts is not None:
            trailing = tuple(pixel_values.shape[-2:])
            real = region_mask("region_masks", region_masks, region_attention_mask, pixel_values, trailing)
            output.region_text_embeds, output.region_text_ids = region_text_features(
                self, real, region_input_ids, region_text_attention_mask, region_text_states
            )
            if with_crops:
                _check_crops(crop_pixel_values, crop_masks, real)
                rows = at_least_one(real)
                crops = self._encode(crop_pixel_values[rows], crop_masks[rows], **kwargs).pooler_output
                output.crop_embeds = scatter(unit(crops), rows) * real[..., None]
            if with_crops and self.config.local_global_loss_weight and image is not None:
                pooled = self._pooled_features(image.last_hidden_state, pixel_values, region_masks)
                output.pooled_region_embeds = unit(pooled)
        if with_loss:
            set_losses(output, self.compute_loss(output, region_masks, region_attention_mask), self.loss_weights())
        # Anew, so that the fields are in their order, the loss first.
        return PixCLIPOutput(**output)

    def loss_regions(self, region_boxes: Tensor | None, region_masks: Tensor | None) -> Tensor | None:
        """What [`PixCLIPModel.compute_loss`] takes of a batch's regions: the masks."""
        return region_masks

    def loss_weights(self) -> dict[str, float]:
        """Weight of each part of the loss."""
        config = self.config
        return {
            "mask_text": config.mask_text_loss_weight,
            "crop_text": config.crop_text_loss_weight,
            "local_global": config.local_global_loss_weight,
            "image_text": config.image_text_loss_weight,
        }

    def compute_loss(
        self,
        output: PixCLIPOutput,
        region_masks: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        gather: Gather | None = None,
        ranks: int = 1,
    ) -> dict[str, Tensor]:
        """The parts of the loss, by name, from what the model returned.

        The branches are described in the paper (section 3) without their formulas; reconstructed here: InfoNCE between
        the prompted region and its text (`mask_text`), InfoNCE between its crop and the same text (`crop_text`), and
        1 - cosine between its pooled patch features and the crop's embedding (`local_global`). `image_text` is InfoNCE
        between whole images and their captions, which keeps image-level skill (Alpha-CLIP, section 3.2).

        Args:
            output: of `forward`, on this rank's batch.
            region_masks, region_attention_mask: of that batch.
            gather: returns a tensor's rows of all ranks and the index of this rank's first row among them.
            ranks: number of ranks.
        """
        losses, weights = {}, self.loss_weights()
        if output.text_embeds is not None and weights["image_text"]:
            losses["image_text"] = gathered_contrastive_loss(
                output.image_embeds,
                output.text_embeds,
                self.logit_scale(),
                output.text_ids,
                gather=gather,
                ranks=ranks,
                tile_size=self.config.contrastive_tile_size,
            )
        if output.region_text_embeds is None:
            return losses
        valid = real_slots(region_attention_mask, output.region_embeds)
        for name, embeds in (("mask_text", output.region_embeds), ("crop_text", output.crop_embeds)):
            if embeds is not None and weights[name]:
                losses[name] = gathered_contrastive_loss(
                    embeds.flatten(0, 1),
                    output.region_text_embeds.flatten(0, 1),
                    self.logit_scale(),
                    output.region_text_ids.flatten(),
                    valid,
                    similarity_threshold=self.config.text_similarity_threshold,
                    gather=gather,
                    ranks=ranks,
                    tile_size=self.config.contrastive_tile_size,
                )
        if output.pooled_region_embeds is not None:
            losses["local_global"] = local_global_loss(
                output.pooled_region_embeds.flatten(0, 1),
                output.crop_embeds.flatten(0, 1),
                valid,
                rows_per_rank(valid, gather, ranks),
            )
        return losses


def _joined(parts: list[BaseModelOutputWithPooling]) -> BaseModelOutputWithPooling:
    """Outputs of a tower on parts of a batch as its output on the batch."""
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        layered = isinstance(values[0], tuple)
        joined[name] = tuple(map(torch.cat, zip(*values, strict=True))) if layered else torch.cat(values)
    return BaseModelOutputWithPooling(**joined)


def _check_crops(crop_pixel_values: Tensor, crop_masks: Tensor | None, real: Tensor) -> None:
    shape = tuple(crop_pixel_values.shape)
    if len(shape) != 5 or shape[:2] != real.shape:
        raise ValueError(
            f"`crop_pixel_values` must hold one crop a region, shape ({', '.join(map(str, real.shape))}, 3, h, w), "
            f"got {shape}."
        )
    expected = (*shape[:2], *shape[3:])
    if crop_masks is None or tuple(crop_masks.shape) != expected:
        given = None if crop_masks is None else tuple(crop_masks.shape)
        raise ValueError(f"`crop_masks` must have shape {expected} as `crop_pixel_values`, got {given}.")


__all__ = ["PixCLIPModel", "PixCLIPOutput", "PixCLIPPreTrainedModel", "PixCLIPVisionModel"]
