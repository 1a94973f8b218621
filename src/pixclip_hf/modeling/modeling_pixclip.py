"""PixCLIP: a CLIP whose vision tower takes a mask, with an LLM as text tower and three training branches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_pixclip import PixCLIPConfig
from .configuration_region_text import check_choice
from .modeling_gathered_loss import Gather, gathered_contrastive_loss, rows_per_rank
from .modeling_losses import local_global_loss
from .modeling_outputs import RegionTextOutput, RegionVisionOutput, set_losses, unit, vision_output, wants_loss
from .modeling_parallel import returns_loss, with_every_parameter
from .modeling_patches import patches_of_masks
from .modeling_region_text import (
    RegionTextModel,
    RegionTextPreTrainedModel,
    RegionTextVisionModel,
    check_arguments,
    region_text_features,
)
from .modeling_slots import at_least_one, only_real, real_slots, scatter, slots_of
from .modeling_text import ScaledLinear
from .modeling_vision import MaskBranch

REGION_MODES = ("prompted", "pooled")


@dataclass
class PixCLIPOutput(RegionTextOutput):
    """
    Output of [`PixCLIPModel`]: the fields of [`RegionTextOutput`], whose `loss_parts` are `mask_text`, `crop_text`,
    `local_global` and `image_text`, and what the second and third branch compare.

    Args:
        crop_embeds (`(B, R, D)`): embeddings of the crops, each with its mask.
        pooled_region_embeds (`(B, R, D)`): patch features of the image pass, pooled under the masks.
    """

    crop_embeds: Tensor | None = None
    pooled_region_embeds: Tensor | None = None


class PixCLIPPreTrainedModel(RegionTextPreTrainedModel):
    """Weight initialization and what every PixCLIP model declares."""

    config: PixCLIPConfig
    config_class = PixCLIPConfig
    base_model_prefix = "pixclip"

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # The mask projection sits inside a transformers tower, whose own initialization does not know its weight.
        for module in self.modules():
            if isinstance(module, MaskBranch):
                module.reset_mask_parameters()
        super().initialize_weights()


class PixCLIPVisionModel(PixCLIPPreTrainedModel, RegionTextVisionModel):
    """The image side of PixCLIP: the mask-prompted vision tower and its head. Loads from any [`PixCLIPModel`]
    checkpoint; it embeds images and masks and takes no text."""

    # Ways to read a region: the values of `mode` in `get_region_features`.
    region_modes = REGION_MODES
    _max_regions_per_forward = 64

    def __init__(self, config: PixCLIPConfig):
        super().__init__(config)
        self.vision_adapter.add_mask_projection(self.vision_model, config.mask_bias)
        self.visual_projection = ScaledLinear(
            config.vision_config.hidden_size, config.projection_dim, bias=config.visual_projection_bias
        )
        self.post_init()

    @property
    def max_regions_per_forward(self) -> int:
        """The most regions that one pass of the vision tower takes when no gradients are kept, 64 by default; more
        regions are embedded in several passes. 64 regions of a ViT-B/16 at 224 pixels take about 0.7 GB in float32.
        This is a setting of the run and is not saved."""
        return self._max_regions_per_forward

    @max_regions_per_forward.setter
    def max_regions_per_forward(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"`max_regions_per_forward` must be at least 1, got {value}.")
        self._max_regions_per_forward = value

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        use_mask: bool = True,
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Whole-image features: the region is the image, so the mask is all ones.

        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            use_mask: False leaves the mask branch out, as in the CLIP that the weights came from.
            interpolate_pos_encoding: takes images of another size than the tower's, if the tower can; sides are
                multiples of its patch size.
            pixel_attention_mask (`(B, N)`), spatial_shapes (`(B, 2)`): for a tower of variable resolution, whose
                `pixel_values` are patches `(B, N, 3 * patch²)`: which of them are there, and the grid of each image.

        Returns:
            `BaseModelOutputWithPooling`: the vision tower's output with `pooler_output` `(B, D)` projected, not
            normalized.
        """
        masks = None
        if use_mask:
            # Not `len`, which an export takes for a constant.
            size = self._mask_shape(pixel_values, None, spatial_shapes)
            masks = pixel_values.new_ones(pixel_values.shape[0], *size)
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, **patches}
        return self._encode(pixel_values, masks, **kwargs)

    @can_return_tuple
    def get_region_features(
        self,
        pixel_values: Tensor,
        region_masks: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        mode: str = "prompted",
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Region features.

        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            region_masks (`(B, R, H, W)`): 1 inside the region.
            region_attention_mask (`(B, R)`, *optional*): 1 for region slots that hold a region; the others come back
                as zeros.
            mode: with `"prompted"` the mask enters the tower, which takes one pass per region and sees the context;
                without gradients it takes no more than `max_regions_per_forward` regions at a time. With `"pooled"`
                the patch features of one image pass are pooled under the mask and sent through the same head.
            interpolate_pos_encoding, pixel_attention_mask, spatial_shapes: see [`PixCLIPModel.get_image_features`].
                With a tower of variable resolution, H and W of the masks are those of the largest image, and what lies
                behind a smaller one is not looked at.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, D)`, not normalized; `last_hidden_state`, the tokens
            of the tower's passes: one row per region (`"prompted"`; one per region slot when compiled) or per image
            (`"pooled"`).

        Raises:
            ValueError: no `region_masks`, masks of another shape, or an unknown mode.
        """
        check_choice("mode", mode, REGION_MODES)
        trailing = self._mask_shape(pixel_values, region_masks, spatial_shapes)
        real = real_slots("region_masks", region_masks, region_attention_mask, pixel_values, trailing)
        if not real.numel():
            return BaseModelOutputWithPooling(
                pooler_output=pixel_values.new_zeros(*real.shape, self.config.projection_dim)
            )
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True}
        patches = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        if mode == "pooled":
            outputs = self.get_image_features(pixel_values, **patches, **kwargs)
            features = self._pooled_features(outputs.last_hidden_state, pixel_values, region_masks, spatial_shapes)
        elif torch.compiler.is_compiling():
            # Compiled, padded regions go through the tower too: how many are real is not known to the graph.
            inputs = {"pixel_values": pixel_values, **patches}
            each = {name: None if value is None else value.repeat_interleave(real.shape[1], 0)
                    for name, value in inputs.items()}  # fmt: skip
            outputs = self._encode(masks=region_masks.flatten(0, 1), **each, **kwargs)
            features = outputs.pooler_output.unflatten(0, real.shape)
        else:
            rows = at_least_one(real)
            outputs = self._encode_prompted(pixel_values, region_masks, rows, patches, **kwargs)
            features = scatter(outputs.pooler_output, rows)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=only_real(features, real),
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
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RegionVisionOutput:
        """Normalized image embeddings and, with masks, region embeddings. Arguments as in [`PixCLIPModel`]."""
        options: Any = {
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "return_dict": True,
        }
        image = self.get_image_features(pixel_values, **(kwargs | options))
        region_embeds = None
        if region_masks is not None:
            regions = self.get_region_features(pixel_values, region_masks, region_attention_mask, mode, **options)
            region_embeds = unit(regions.pooler_output)
        return vision_output(image, region_embeds)

    def _encode_prompted(
        self, pixel_values: Tensor, masks: Tensor, rows: Tensor, patches: dict[str, Tensor | None], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """A row for each region that `rows` (B, R) marks, from as many passes as the memory bound asks for."""
        images, slots = rows.nonzero(as_tuple=True)
        # Gradients keep the activations of every part: splitting would save nothing.
        size = len(images) if torch.is_grad_enabled() else self.max_regions_per_forward
        parts = [
            self._encode(
                pixel_values[image],
                masks[image, slot],
                **{name: value if value is None else value[image] for name, value in patches.items()},
                **kwargs,
            )
            for image, slot in zip(images.split(size), slots.split(size), strict=True)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _encode(self, pixel_values: Tensor, masks: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The tower's output under masks (N, H, W), or without the mask branch; its pooled states projected."""
        if masks is not None:
            masks = masks.to(pixel_values)
            if self.takes_patches:
                patch, shapes = self.config.vision_config.patch_size, kwargs["spatial_shapes"]
                masks = patches_of_masks(masks, shapes, patch, pixel_values.shape[1])
            scaled = (masks - self.config.mask_mean) / self.config.mask_std
            if self.takes_patches:
                pixel_values = torch.cat([pixel_values, scaled], dim=-1)
            else:
                pixel_values = torch.cat([pixel_values, scaled[:, None]], dim=1)
        return super()._encode(pixel_values, **kwargs)

    def _pooled_features(
        self, last_hidden_state: Tensor, pixel_values: Tensor, masks: Tensor, spatial_shapes: Tensor | None
    ) -> Tensor:
        tokens = self._image_tokens(last_hidden_state, pixel_values, spatial_shapes)
        return self.visual_projection(self.vision_adapter.pool_masks(self.vision_model, tokens, masks))


class PixCLIPModel(RegionTextModel, PixCLIPVisionModel):
    """PixCLIP (arXiv 2511.04601): a mask prompt on the image side, a language model on the text side, compared in one
    space.

    It trains on regions with a long caption each (`region_input_ids`), on their crops (`crop_pixel_values`,
    `crop_masks`) and, when image captions are given (`input_ids`), on whole images. In a model made of two towers the
    mask projection starts at zero, so that the image features equal those of its CLIP, whatever the mask.
    """

    config: PixCLIPConfig
    new_vision_weights = (".mask_weight", ".mask_bias")

    def __init__(self, config: PixCLIPConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    @returns_loss
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
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PixCLIPOutput:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            region_masks (`(B, R, H, W)`): 1 inside the region.
            region_attention_mask (`(B, R)`): 1 for region slots that hold a region.
            crop_pixel_values (`(B, R, 3, h, w)`), crop_masks (`(B, R, h, w)`): crops around the regions, for the loss.
            mode: see [`PixCLIPModel.get_region_features`].
            interpolate_pos_encoding, pixel_attention_mask, spatial_shapes: see [`PixCLIPModel.get_image_features`];
                the crops of a tower of variable resolution are squares, `(B, R, N, 3 * patch²)`.
            The texts and `return_loss`: see [`RegionTextModel`].

        Returns:
            [`PixCLIPOutput`]; a training pass that uses no whole-image embedding leaves `image_embeds` out. The
            `vision_model_output` is that of the image pass.

        Raises:
            ValueError: see [`RegionTextModel`]; crops that do not fit the regions.
        """
        check_arguments(kwargs)
        texts = input_ids if text_states is None else text_states
        region_texts = region_input_ids if region_text_states is None else region_text_states
        with_loss = wants_loss(return_loss, pixel_values, texts, region_texts)
        with_crops = crop_pixel_values is not None

        options: Any = {
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "return_dict": True,
        }
        output, image = PixCLIPOutput(), None
        if not with_loss or texts is not None or (with_crops and self.config.local_global_loss_weight):
            image = self.get_image_features(pixel_values, **(kwargs | options))
            output.image_embeds, output.vision_model_output = unit(image.pooler_output), image
        if region_masks is not None:
            regions = self.get_region_features(pixel_values, region_masks, region_attention_mask, mode, **options)
            output.region_embeds = unit(regions.pooler_output)
        if texts is not None:
            per_token: Any = {"position_ids": position_ids, "token_type_ids": token_type_ids}
            self._set_texts(output, input_ids, attention_mask, text_states, **per_token, **kwargs)
        if region_texts is not None:
            trailing = self._mask_shape(pixel_values, region_masks, spatial_shapes)
            is_real = real_slots("region_masks", region_masks, region_attention_mask, pixel_values, trailing)
            output.region_text_embeds, output.region_text_ids = region_text_features(
                self, is_real, region_input_ids, region_text_attention_mask, region_text_states
            )
            if with_crops:
                rows = at_least_one(is_real)
                crop_options: dict[str, Any]
                if self.takes_patches:
                    crop_options = _crop_patches(crop_pixel_values, crop_masks, rows, self.config.vision_config)
                else:
                    _check_crops(crop_pixel_values, crop_masks, is_real)
                    crop_options = {"interpolate_pos_encoding": interpolate_pos_encoding}
                crops = self._encode(crop_pixel_values[rows], crop_masks[rows], **crop_options).pooler_output
                output.crop_embeds = only_real(scatter(unit(crops), rows), is_real)
            if with_crops and self.config.local_global_loss_weight and image is not None:
                pooled = self._pooled_features(image.last_hidden_state, pixel_values, region_masks, spatial_shapes)
                output.pooled_region_embeds = only_real(unit(pooled), is_real)
        if with_loss:
            set_losses(output, self.compute_loss(output, region_masks, region_attention_mask), self.loss_weights())
            output.loss = with_every_parameter(self, output.loss)
        # Built again because a `ModelOutput` keeps its fields in the order in which they were set: the loss is first.
        return PixCLIPOutput(**output)

    def loss_regions(
        self, region_boxes: Tensor | None, region_masks: Tensor | None, spatial_shapes: Tensor | None = None
    ) -> Tensor | None:
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

        The paper (section 3) describes the branches without formulas. They are reconstructed as InfoNCE between
        the prompted region and its text (`mask_text`), InfoNCE between its crop and the same text (`crop_text`), and
        1 - cosine between its pooled patch features and the crop's embedding (`local_global`). `image_text` is InfoNCE
        between whole images and their captions, which keeps image-level skill (Alpha-CLIP, section 3.2). With
        `contrastive_objective="sigmoid"`, SigLIP's loss takes the place of InfoNCE.

        Args:
            output: what `forward` returned for this rank's batch.
            region_masks (`(B, R, H, W)`), region_attention_mask (`(B, R)`): the regions of that batch.
            gather: returns a tensor's rows of all ranks and the index of this rank's first row among them.
            ranks: number of ranks.
        """
        losses, weights = self._image_text_loss(output, gather, ranks), self.loss_weights()
        if output.region_text_embeds is None:
            return losses
        is_real = slots_of(output.region_embeds, region_attention_mask)
        for name, embeds in (("mask_text", output.region_embeds), ("crop_text", output.crop_embeds)):
            if embeds is not None and weights[name]:
                losses[name] = self._region_text_loss(embeds, output, is_real, gather, ranks)
        if output.pooled_region_embeds is None:
            return losses
        if self.config.local_global_objective == "contrastive":
            losses["local_global"] = gathered_contrastive_loss(
                output.pooled_region_embeds.flatten(0, 1),
                output.crop_embeds.detach().flatten(0, 1),
                self.get_logit_scale(),
                # Crops of equal text look alike, and are still not each other's.
                output.region_text_ids.flatten(),
                is_real.flatten(),
                gather=gather,
                ranks=ranks,
                tile_size=self.contrastive_tile_size,
                logit_bias=self.get_logit_bias(),
            )
        else:
            losses["local_global"] = local_global_loss(
                output.pooled_region_embeds.flatten(0, 1).to(is_real.device),
                output.crop_embeds.flatten(0, 1).to(is_real.device),
                is_real.flatten(),
                rows_per_rank(is_real.flatten(), gather, ranks),
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


def _crop_patches(patches: Tensor, masks: Tensor | None, rows: Tensor, config: Any) -> dict[str, Tensor]:
    """The grid of the crops `(B, R, N, 3 * patch²)` that `rows` (B, R) marks, which all have that of their masks
    `(B, R, h, w)`, and which of their patches are there."""
    if masks is None or masks.shape[:2] != rows.shape or patches.shape[:2] != rows.shape:
        given = tuple(None if part is None else tuple(part.shape) for part in (patches, masks))
        raise ValueError(
            f"`crop_pixel_values` and `crop_masks` must hold one crop per region, {tuple(rows.shape)}, got {given}."
        )
    high, wide = (side // config.patch_size for side in masks.shape[-2:])
    if patches.shape[2] < high * wide:
        raise ValueError(
            f"`crop_pixel_values` must hold the {high * wide} patches of `crop_masks`, got {tuple(patches.shape)}."
        )
    count = int(rows.sum())
    shapes = torch.tensor([[high, wide]], device=patches.device).expand(count, 2)
    there = (torch.arange(patches.shape[2], device=patches.device) < high * wide).long()
    return {"spatial_shapes": shapes, "pixel_attention_mask": there.expand(count, -1)}


def _check_crops(crop_pixel_values: Tensor, crop_masks: Tensor | None, real: Tensor) -> None:
    shape = tuple(crop_pixel_values.shape)
    if len(shape) != 5 or shape[:2] != real.shape:
        raise ValueError(
            f"`crop_pixel_values` must hold one crop per region, shape ({', '.join(map(str, real.shape))}, 3, h, w), "
            f"got {shape}."
        )
    expected = (*shape[:2], *shape[3:])
    if crop_masks is None or tuple(crop_masks.shape) != expected:
        given = None if crop_masks is None else tuple(crop_masks.shape)
        raise ValueError(f"`crop_masks` must have shape {expected} as `crop_pixel_values`, got {given}.")


__all__ = ["PixCLIPModel", "PixCLIPOutput", "PixCLIPPreTrainedModel", "PixCLIPVisionModel"]
