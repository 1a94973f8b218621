"""CLOC: a CLIP whose Prompter turns the image tokens into the embedding of any box, mask or point, in one image
pass."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_cloc import POOLED_READOUTS, CLOCConfig
from .modeling_gathered_loss import Gather, rows_per_rank
from .modeling_losses import grounding_losses
from .modeling_outputs import RegionTextOutput, RegionVisionOutput, set_losses, unit, vision_output, wants_loss
from .modeling_parallel import returns_loss, with_every_parameter
from .modeling_patches import ImageTokens, scale_boxes
from .modeling_points import FAR, CLOCPointMask, PointTypes
from .modeling_positions import FourierPositions
from .modeling_prompter import (
    QUERY_GAIN,
    CLOCBoxHead,
    CLOCFirstPrompterLayer,
    CLOCPrompter,
    CLOCPrompterLayer,
)
from .modeling_prompts import PromptedRegions, prompted_regions
from .modeling_region_text import (
    RegionTextModel,
    RegionTextPreTrainedModel,
    RegionTextVisionModel,
    region_text_features,
)
from .modeling_regions import boxes_around, mask_boxes, roi_align
from .modeling_slots import only_real, slots_of
from .modeling_text import ScaledLinear, build_logit_scale


@dataclass
class CLOCOutput(RegionTextOutput):
    """
    Output of [`CLOCModel`]: the fields of [`RegionTextOutput`], whose `loss_parts` are `image_text`, `region_text`,
    `grounding_l1` and `grounding_giou`, and the found boxes.

    Args:
        pred_boxes (`(B, R, 4)`): the box that each region text was found in, xyxy in [0, 1] of the processed image.
    """

    pred_boxes: Tensor | None = None


@dataclass
class CLOCGroundingOutput(ModelOutput):
    """
    Output of [`CLOCModel.ground`].

    Args:
        pred_boxes (`(B, T, 4)`): where each text lies in each image, xyxy in [0, 1] of the processed image.
        scores (`(B, T)`): cosine similarity between the text and the region embedding of its box, or the mean over
            boxes around it (`steady_scores`).
    """

    pred_boxes: Tensor | None = None
    scores: Tensor | None = None


class CLOCPreTrainedModel(RegionTextPreTrainedModel):
    """Weight initialization and what every CLOC model declares."""

    config: CLOCConfig
    config_class = CLOCConfig
    base_model_prefix = "cloc"
    _no_split_modules = [*RegionTextPreTrainedModel._no_split_modules, "CLOCPrompter", "CLOCBoxHead"]

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, CLOCPrompterLayer | CLOCFirstPrompterLayer | CLOCPointMask):
                for projection in module.identities:
                    init.copy_(projection.weight, QUERY_GAIN * torch.eye(*projection.weight.shape))
                for projection in module.zeros:
                    init.zeros_(projection.weight)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FourierPositions):
            init.normal_(module.frequencies, std=module.scale)
        elif isinstance(module, PointTypes):
            init.normal_(module.weight)
        elif isinstance(module, CLOCPointMask):
            init.constant_(module.bias, FAR)
        elif isinstance(module, CLOCPrompterLayer) and module.prior_gain is not None:
            init.ones_(module.prior_gain)


class CLOCVisionModel(CLOCPreTrainedModel, RegionTextVisionModel):
    """The image side of CLOC: vision tower, image head, Prompter and region head. Loads from any [`CLOCModel`]
    checkpoint; it embeds images, boxes and masks, and takes no text."""

    # One way to read a region: `get_region_features` takes no `mode`.
    region_modes = ()
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = [
        *(RegionTextVisionModel._keys_to_ignore_on_load_unexpected or ()),
        r"^region_logit_scale\.",
        r"^box_head\.",
    ]

    def __init__(self, config: CLOCConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.visual_projection = ScaledLinear(width, config.projection_dim, bias=False)
        prompted = config.region_readout not in POOLED_READOUTS or config.grounding
        self.prompter = CLOCPrompter(config) if prompted else None
        if config.region_readout != "image_head":
            self.region_norm = nn.LayerNorm(width)
            self.region_projection = ScaledLinear(width, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def get_region_features(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        region_masks: Tensor | None = None,
        prompt: str | None = None,
        interpolate_pos_encoding: bool = False,
        region_points: Tensor | None = None,
        region_point_labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Features of regions; all regions of an image come from one image pass.

        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            region_boxes (`(B, R, 4)`): xyxy in [0, 1] of the processed image.
            region_attention_mask (`(B, R)`, *optional*): 1 for region slots that hold a region; the others come back
                as zeros.
            region_masks (`(B, R, H, W)`): 1 inside the region. A mask prompts by its own pixels if
                `config.prompts_by_coverage` is true, and by its tight box otherwise.
            prompt: `"box"`, `"mask"` or `"point"`, which of them prompts. It may be left out where boxes or masks are
                given and not both: they then prompt the regions that have no points.
            interpolate_pos_encoding: takes images of another size than the tower's, if the tower can; sides are
                multiples of its patch size.
            region_points (`(B, R, P, 2)`): xy in [0, 1] of the processed image, for a model with
                `config.prompter_points`.
            region_point_labels (`(B, R, P)`): 1 for points on the region, 0 for points beside it, -1 for padding. A
                region with points has at least one on it.
            pixel_attention_mask (`(B, N)`), spatial_shapes (`(B, 2)`): for a tower of variable resolution, whose
                `pixel_values` are patches `(B, N, 3 * patch²)`: which of them are there, and the grid of each image. H
                and W of masks are then those of the largest image, and what lies behind a smaller one is not looked
                at.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, D)`, not normalized; `last_hidden_state`, the image
            tokens.

        Raises:
            ValueError: no regions, boxes and masks without a `prompt`, regions of another shape, points for a model
                without `config.prompter_points`, labels other than these, or a region without what prompts it.
        """
        points = region_points, region_point_labels
        regions = self._regions(
            pixel_values, spatial_shapes, region_boxes, region_attention_mask, region_masks, prompt, *points
        )
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        outputs = self._read_regions(pixel_values, regions, interpolate_pos_encoding, **patches, **kwargs)
        outputs.pooler_output = only_real(self._project_regions(outputs.pooler_output), regions.is_real)
        return outputs

    @can_return_tuple
    def get_region_tokens(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        region_masks: Tensor | None = None,
        prompt: str | None = None,
        interpolate_pos_encoding: bool = False,
        region_points: Tensor | None = None,
        region_point_labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """What the Prompter gives for each region, before the region head: one token per region for a language model,
        in the place of the visual sampler of Ferret (arXiv 2310.07704), where the CLOC paper puts it.

        Args:
            pixel_values, region_boxes, region_attention_mask, region_masks: as in [`CLOCModel.get_region_features`].
            prompt, interpolate_pos_encoding, region_points, region_point_labels: as there too.
            pixel_attention_mask, spatial_shapes: as there too.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, vision_config.hidden_size)`, zeros for padded
            regions; `last_hidden_state`, the image tokens.

        Raises:
            ValueError: as [`CLOCModel.get_region_features`].
        """
        points = region_points, region_point_labels
        regions = self._regions(
            pixel_values, spatial_shapes, region_boxes, region_attention_mask, region_masks, prompt, *points
        )
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        return self._read_regions(pixel_values, regions, interpolate_pos_encoding, **patches, **kwargs)

    def _read_regions(
        self, pixel_values: Tensor, regions: PromptedRegions, interpolate_pos_encoding: bool, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        outputs = self._run_tower(pixel_values, interpolate_pos_encoding, **kwargs)
        tokens = self._image_tokens(outputs.last_hidden_state, pixel_values, kwargs["spatial_shapes"])
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=only_real(self._region_tokens(tokens, regions), regions.is_real),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_vision_tower(self) -> PreTrainedModel:
        """The vision tower, a plain `CLIPVisionModel` or `SiglipVisionModel` of transformers, as multimodal language
        models take it: for LLaVA, `llava.model.vision_tower = cloc.get_vision_tower()`.

        It is the tower of this model and not a copy: whatever trains or moves one of the two does so to the other.
        `copy.deepcopy` makes a copy, and `save_pretrained` a folder of its own.
        """
        return self.vision_model

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        region_masks: Tensor | None = None,
        prompt: str | None = None,
        interpolate_pos_encoding: bool = False,
        region_points: Tensor | None = None,
        region_point_labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RegionVisionOutput:
        """Normalized image embeddings and, with regions, region embeddings. Arguments as in [`CLOCModel`]."""
        regions = None
        points = region_points, region_point_labels
        if any(given is not None for given in (region_boxes, region_masks, *points)):
            regions = self._regions(
                pixel_values, spatial_shapes, region_boxes, region_attention_mask, region_masks, prompt, *points
            )
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        options = {**patches, **kwargs}
        image, tokens, region_embeds = self._embed(pixel_values, regions, interpolate_pos_encoding, **options)
        return vision_output(image, region_embeds)

    def _embed(
        self, pixel_values: Tensor, regions: PromptedRegions | None, interpolate_pos_encoding: bool, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, ImageTokens, Tensor | None]:
        """The image features, the patch tokens behind them, and the normalized embeddings of the regions."""
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True}
        image = self.get_image_features(pixel_values, **kwargs)
        tokens = self._image_tokens(image.last_hidden_state, pixel_values, kwargs["spatial_shapes"])
        if regions is None:
            return image, tokens, None
        embeds = unit(self._project_regions(self._region_tokens(tokens, regions)))
        return image, tokens, only_real(embeds, regions.is_real)

    def _regions(
        self,
        pixel_values: Tensor,
        spatial_shapes: Tensor | None,
        region_boxes: Tensor | None,
        region_attention_mask: Tensor | None,
        region_masks: Tensor | None,
        prompt: str | None,
        *points: Tensor | None,
    ) -> PromptedRegions:
        size = self._mask_shape(pixel_values, region_masks, spatial_shapes)
        return prompted_regions(
            self.config, pixel_values, size, region_boxes, region_attention_mask, region_masks, prompt, *points
        )

    def _project_regions(self, states: Tensor) -> Tensor:
        if self.config.region_readout == "image_head":
            return self.visual_projection(states)
        return self.region_projection(self.region_norm(states))

    def _region_tokens(self, tokens: ImageTokens, regions: PromptedRegions) -> Tensor:
        return tokens.per_grid(
            lambda states, grid, images: self._read_prompts(states, grid, regions.on_images(images, grid, tokens))
        )

    def _read_prompts(self, states: Tensor, grid: tuple[int, int], regions: PromptedRegions) -> Tensor:
        if self.config.region_readout == "image_head":
            coverage = regions.get_coverage(grid)
            return self.vision_adapter.pool_regions(self.vision_model, states, coverage)
        points = {"points": regions.points, "point_labels": regions.point_labels}
        if regions.boxes is None and regions.masks is None:
            return self.prompter(states, grid, **points)
        if regions.boxes is None and self.config.prompts_by_coverage:
            return self.prompter(states, grid, masks=regions.masks, **points)
        boxes = regions.get_boxes()
        if self.config.region_readout == "roi_align":
            boxes = boxes.to(states.device)
            return roi_align(states, boxes, grid, self.config.roi_align_size).mean(2)
        return self.prompter(states, grid, boxes=boxes, **points)


class CLOCModel(RegionTextModel, CLOCVisionModel):
    """CLOC (arXiv 2410.02746): CLIP with a Prompter. One image pass embeds the image and any number of boxes,
    masks or points; a text prompt finds its box.

    Trained on image captions (`input_ids`) and on regions with a text each (`region_input_ids`). Of a model from two
    towers the Prompter, the region head, the box head and `region_logit_scale` start from new weights.
    """

    config: CLOCConfig

    def __init__(self, config: CLOCConfig):
        super().__init__(config)
        self.region_logit_scale = build_logit_scale(config)
        self.box_head = CLOCBoxHead(config.vision_config.hidden_size) if config.grounding else None
        self.post_init()

    @property
    def can_ground(self) -> bool:
        """Whether the model has the head that finds the box of a text: `config.grounding`."""
        return self.box_head is not None

    def get_logit_scale(self) -> Tensor:
        """Scalar: the inverse temperature between regions and texts."""
        return self.region_logit_scale()

    def get_logit_bias(self) -> Tensor | None:
        """Scalar: the bias of the logits between regions and texts; None with `contrastive_objective="softmax"`."""
        return self.region_logit_scale.get_bias()

    @can_return_tuple
    def ground(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        text_embeds: Tensor | None = None,
        steady_scores: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLOCGroundingOutput:
        """Finds the box of each text in each image.

        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            input_ids, attention_mask, position_ids (`(T, L)`), text_states: as in [`CLOCModel.get_text_features`].
            interpolate_pos_encoding, pixel_attention_mask, spatial_shapes: as in [`CLOCModel.get_region_features`].
            text_embeds (`(T, D)`): what [`CLOCModel.get_text_features`] gave, of any length, in place of the texts.
            steady_scores: averages each score over the box and five others: one of 0.8 of its sides, and the box moved
                by 0.12 of them either way. A box that lies well on its object scores the same there; one on the edge
                of it, or of another, does not. Such scores tell texts that are there better from texts that are not.

        Returns:
            [`CLOCGroundingOutput`]

        Raises:
            ValueError: the model was built with `grounding=False`, or texts and `text_embeds` are both given.
        """
        if not self.can_ground:
            raise ValueError("`ground` needs a model with `config.grounding=True`, got False.")
        if text_embeds is None:
            text_embeds = self.get_text_features(
                input_ids, attention_mask, position_ids, text_states, return_dict=True
            ).pooler_output
        elif input_ids is not None or text_states is not None:
            raise ValueError("One of `text_embeds` and `input_ids` or `text_states` must be given, got both.")
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        outputs = self._run_tower(pixel_values, interpolate_pos_encoding, **patches, **kwargs)
        tokens = self._image_tokens(outputs.last_hidden_state, pixel_values, spatial_shapes)
        text_embeds = unit(text_embeds)[None].expand(len(pixel_values), -1, -1)
        pred_boxes = self._find_boxes(tokens, text_embeds)
        scored = boxes_around(pred_boxes) if steady_scores else pred_boxes[:, :, None]
        found = PromptedRegions(scored.flatten(1, 2), None, torch.ones_like(scored[..., 0]).flatten(1).bool())
        region_embeds = unit(self._project_regions(self._region_tokens(tokens, found)))
        region_embeds = region_embeds.unflatten(1, scored.shape[1:3])
        scores = (region_embeds * text_embeds[:, :, None].to(region_embeds.device)).sum(-1).mean(-1)
        return CLOCGroundingOutput(pred_boxes=pred_boxes, scores=scores)

    @can_return_tuple
    @returns_loss
    def forward(
        self,
        pixel_values: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        region_input_ids: Tensor | None = None,
        region_text_attention_mask: Tensor | None = None,
        text_states: Tensor | None = None,
        region_text_states: Tensor | None = None,
        return_loss: bool | None = None,
        region_masks: Tensor | None = None,
        prompt: str | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        region_points: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLOCOutput:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): normalized RGB.
            region_boxes (`(B, R, 4)`): xyxy in [0, 1] of the processed image.
            region_attention_mask (`(B, R)`): 1 for real regions.
            region_masks (`(B, R, H, W)`), prompt, interpolate_pos_encoding: see [`CLOCModel.get_region_features`].
            region_points (`(B, R, P, 2)`), region_point_labels (`(B, R, P)`): see there too. The grounding loss asks
                for `region_boxes`, whatever prompts, and for the tight boxes of the masks where there are none.
            pixel_attention_mask (`(B, N)`), spatial_shapes (`(B, 2)`): see there too.
            The texts and `return_loss`: see [`RegionTextModel`].

        Returns:
            [`CLOCOutput`]

        Raises:
            ValueError: see [`RegionTextModel`] and [`CLOCModel.get_region_features`]; points alone where boxes are to
                be grounded.
        """
        # Not in the signature: `Trainer` takes any argument whose name holds "label" for targets, and evaluates no
        # loss of a batch without it.
        region_point_labels = kwargs.pop("region_point_labels", None)
        texts = input_ids if text_states is None else text_states
        region_texts = region_input_ids if region_text_states is None else region_text_states
        with_loss = wants_loss(return_loss, pixel_values, texts, region_texts)

        regions = None
        points = region_points, region_point_labels
        if any(given is not None for given in (region_texts, region_boxes, region_masks, *points)):
            regions = self._regions(
                pixel_values, spatial_shapes, region_boxes, region_attention_mask, region_masks, prompt, *points
            )
        patches: Any = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        options = {**patches, **kwargs}
        image, tokens, region_embeds = self._embed(pixel_values, regions, interpolate_pos_encoding, **options)
        output = CLOCOutput(
            image_embeds=unit(image.pooler_output), region_embeds=region_embeds, vision_model_output=image
        )
        if texts is not None:
            per_token: Any = {"position_ids": position_ids, "token_type_ids": token_type_ids}
            self._set_texts(output, input_ids, attention_mask, text_states, **per_token, **kwargs)
        if region_texts is not None:
            output.region_text_embeds, output.region_text_ids = region_text_features(
                self, regions.is_real, region_input_ids, region_text_attention_mask, region_text_states
            )
            if self.can_ground:
                found = self._find_boxes(tokens, output.region_text_embeds)
                output.pred_boxes = only_real(found, regions.is_real)
        if with_loss:
            boxes = self.loss_regions(region_boxes, region_masks, spatial_shapes)
            parts = self.compute_loss(output, boxes, region_attention_mask)
            set_losses(output, parts, self.loss_weights())
            output.loss = with_every_parameter(self, output.loss)
        # Built again because a `ModelOutput` keeps its fields in the order in which they were set: the loss is first.
        return CLOCOutput(**output)

    def loss_regions(
        self, region_boxes: Tensor | None, region_masks: Tensor | None, spatial_shapes: Tensor | None = None
    ) -> Tensor | None:
        """What [`CLOCModel.compute_loss`] takes of a batch's regions: the boxes, or the tight ones of the masks."""
        if region_boxes is not None or region_masks is None:
            return region_boxes
        boxes = mask_boxes(region_masks)
        if spatial_shapes is None:
            return boxes
        height, width = region_masks.shape[-2:]
        return scale_boxes(boxes, spatial_shapes, (height, width), self.config.vision_config.patch_size)

    def loss_weights(self) -> dict[str, float]:
        """Weight of each part of the loss."""
        config = self.config
        return {
            "image_text": config.image_text_loss_weight,
            "region_text": config.region_text_loss_weight,
            "grounding_l1": config.grounding_loss_weight * config.box_l1_weight,
            "grounding_giou": config.grounding_loss_weight * config.box_giou_weight,
        }

    def compute_loss(
        self,
        output: CLOCOutput,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        gather: Gather | None = None,
        ranks: int = 1,
    ) -> dict[str, Tensor]:
        """The parts of the loss, by name, from what the model returned (CLOC, sections 3.2 and 3.3).

        Args:
            output: what `forward` returned for this rank's batch.
            region_boxes (`(B, R, 4)`), region_attention_mask (`(B, R)`): of that batch.
            gather: returns a tensor's rows of all ranks and the index of this rank's first row among them.
            ranks: number of ranks.
        """
        losses = self._image_text_loss(output, gather, ranks)
        if output.region_text_embeds is None:
            return losses
        is_real = slots_of(output.region_embeds, region_attention_mask)
        if self.config.region_text_loss_weight:
            losses["region_text"] = self._region_text_loss(output.region_embeds, output, is_real, gather, ranks)
        if output.pred_boxes is not None and self.config.grounding_loss_weight:
            if region_boxes is None:
                raise ValueError(
                    "The grounding loss needs `region_boxes` or `region_masks` beside `region_points`, got neither."
                )
            # A text that several regions of the image have finds none of their boxes in particular.
            same = output.region_text_ids[:, :, None] == output.region_text_ids[:, None, :]
            found = is_real & ((same & is_real[:, None, :]).sum(-1) == 1)
            # A region of points among boxes has none.
            found = (found & (region_boxes[..., 2:] > region_boxes[..., :2]).all(-1).to(found.device)).flatten()
            pred_boxes = output.pred_boxes.flatten(0, 1).to(found.device)
            losses["grounding_l1"], losses["grounding_giou"] = grounding_losses(
                pred_boxes, region_boxes.flatten(0, 1), found, rows_per_rank(found, gather, ranks)
            )
        return losses

    def _find_boxes(self, tokens: ImageTokens, text_embeds: Tensor) -> Tensor:
        return tokens.per_grid(
            lambda states, grid, images: self.box_head(self.prompter(states, grid, text_embeds=text_embeds[images]))
        )


__all__ = ["CLOCModel", "CLOCOutput", "CLOCGroundingOutput", "CLOCPreTrainedModel", "CLOCVisionModel"]
