"""CLOC: a CLIP whose Prompter turns the image tokens into the embedding of any box, in one image pass."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_cloc import CLOCConfig
from .modeling_batches import (
    Gather,
    check_arguments,
    gathered_contrastive_loss,
    real_slots,
    region_mask,
    region_text_features,
    rows_per_rank,
    set_losses,
    unit,
    wants_loss,
)
from .modeling_inherit import model_from_towers
from .modeling_losses import grounding_losses, text_ids
from .modeling_prompter import QUERY_GAIN, CLOCBoxHead, CLOCPrompter, CLOCPrompterLayer, FourierPositions
from .modeling_regions import roi_align
from .modeling_text import LogitScale, ScaledLinear, build_text_model, build_text_projection, text_features
from .modeling_vision import build_vision_model, patch_grid, patch_tokens


@dataclass
class CLOCOutput(ModelOutput):
    """
    Output of [`CLOCModel`]. B images, R region slots an image, T texts, D the projection width; every embedding is
    L2-normalised; rows of padded regions mean nothing.

    Args:
        loss (scalar): weighted sum of `loss_parts`.
        loss_parts (`dict` of scalars): `image_text`, `region_text`, `grounding_l1`, `grounding_giou`, unweighted.
        logits_per_region (`(B, R, T)`), logits_per_image (`(B, T)`): scaled cosine similarities to the texts.
        region_embeds (`(B, R, D)`), image_embeds (`(B, D)`), text_embeds (`(T, D)`).
        region_text_embeds (`(B, R, D)`): embeddings of the region texts.
        pred_boxes (`(B, R, 4)`): the box that each region text was found in, xyxy in [0, 1] of the processed image.
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
    pred_boxes: Tensor | None = None
    text_ids: Tensor | None = None
    region_text_ids: Tensor | None = None


@dataclass
class CLOCGroundingOutput(ModelOutput):
    """
    Output of [`CLOCModel.ground`].

    Args:
        pred_boxes (`(B, T, 4)`): where each text lies in each image, xyxy in [0, 1] of the processed image.
        scores (`(B, T)`): cosine similarity between the text and the region embedding of its box.
    """

    pred_boxes: Tensor | None = None
    scores: Tensor | None = None


class ImageTokens(NamedTuple):
    """Patch tokens (B, N, D) of an image pass: as they leave the tower, placed for the Prompter, and their grid."""

    raw: Tensor
    placed: Tensor | None
    grid: tuple[int, int]


class CLOCPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what every CLOC model declares."""

    config: CLOCConfig
    config_class = CLOCConfig
    base_model_prefix = "cloc"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLOCPrompterLayer"]

    def get_input_embeddings(self) -> None:
        """None: each tower has its own. Sharding asks the whole model, and would shard a part of a tower twice."""

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, CLOCPrompterLayer):
                for projection in (module.q_proj, module.k_proj):
                    init.copy_(projection.weight, QUERY_GAIN * torch.eye(*projection.weight.shape))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, FourierPositions):
            init.normal_(module.frequencies, std=module.scale)
        elif isinstance(module, LogitScale):
            init.constant_(module.log_scale, module.init_value)


class CLOCVisionModel(CLOCPreTrainedModel):
    """The image side of CLOC: vision tower, image head, Prompter and region head. Loads from any [`CLOCModel`]
    checkpoint; it embeds images and boxes and takes no text."""

    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.", r"^text_projection\.", r"^logit_scale\.", r"^region_logit_scale\.", r"^box_head\.",
    ]  # fmt: skip

    def __init__(self, config: CLOCConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.vision_model = build_vision_model(config.vision_config)
        self.visual_projection = ScaledLinear(width, config.projection_dim, bias=False)
        prompted = config.region_readout != "roi_align" or config.grounding
        self.prompter = CLOCPrompter(config) if prompted else None
        self.region_norm = nn.LayerNorm(width)
        self.region_projection = ScaledLinear(width, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Image features.

        Args:
            pixel_values (`(B, 3, H, W)`).

        Returns:
            `BaseModelOutputWithPooling`: the vision tower's output with `pooler_output` `(B, D)` projected, not
            normalised.
        """
        check_arguments(kwargs)
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_region_features(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Region features, all regions of an image from one image pass.

        Args:
            pixel_values (`(B, 3, H, W)`).
            region_boxes (`(B, R, 4)`): xyxy in [0, 1] of the processed image.
            region_attention_mask (`(B, R)`, *optional*): 1 for real regions; the others come back as zeros.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, D)`, not normalised; `last_hidden_state`, the image
            tokens.

        Raises:
            ValueError: no `region_boxes`, or boxes of another shape.
        """
        kwargs["return_dict"] = True
        outputs = self.get_region_tokens(pixel_values, region_boxes, region_attention_mask, **kwargs)
        mask = region_mask("region_boxes", region_boxes, region_attention_mask, pixel_values, trailing=(4,))
        outputs.pooler_output = self._project_regions(outputs.pooler_output) * mask[..., None]
        return outputs

    @can_return_tuple
    def get_region_tokens(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """What the Prompter gives for each box, before the region head: a token a region for a language model, in the
        place of the visual sampler of Ferret (arXiv 2310.07704), where the CLOC paper puts it.

        Args:
            pixel_values, region_boxes, region_attention_mask: as in [`CLOCModel.get_region_features`].

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(B, R, vision_config.hidden_size)`, zeros for padded
            regions; `last_hidden_state`, the image tokens.

        Raises:
            ValueError: no `region_boxes`, or boxes of another shape.
        """
        mask = region_mask("region_boxes", region_boxes, region_attention_mask, pixel_values, trailing=(4,))
        check_arguments(kwargs)
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        tokens = self._image_tokens(outputs.last_hidden_state, pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._region_tokens(tokens, region_boxes) * mask[..., None],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_vision_tower(self) -> PreTrainedModel:
        """The vision tower, a plain `CLIPVisionModel` or `SiglipVisionModel` of transformers, as multimodal language
        models take it: for LLaVA, `llava.model.vision_tower = cloc.get_vision_tower()`.

        It is the tower of this model and no copy: the weights are shared, and so is what trains or moves them.
        `copy.deepcopy` it where that is not wanted, `save_pretrained` it for a folder of its own.
        """
        return self.vision_model

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CLOCOutput:
        """Normalised image embeddings and, with boxes, region embeddings. Arguments as in [`CLOCModel`]."""
        # Anew, so that the fields are in their order.
        return CLOCOutput(**self._embed(pixel_values, region_boxes, region_attention_mask, **kwargs)[0])

    def _embed(
        self, pixel_values: Tensor, region_boxes: Tensor | None, region_attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[CLOCOutput, ImageTokens]:
        image = self.get_image_features(pixel_values, **{**kwargs, "return_dict": True})
        tokens = self._image_tokens(image.last_hidden_state, pixel_values)
        output = CLOCOutput(image_embeds=unit(image.pooler_output))
        if region_boxes is not None:
            region_mask("region_boxes", region_boxes, region_attention_mask, pixel_values, trailing=(4,))
            output.region_embeds = unit(self._region_features(tokens, region_boxes))
        return output, tokens

    def _image_tokens(self, last_hidden_state: Tensor, pixel_values: Tensor) -> ImageTokens:
        grid = patch_grid(self.config.vision_config, pixel_values)
        raw = patch_tokens(last_hidden_state, grid)
        return ImageTokens(raw, None if self.prompter is None else self.prompter.place(raw, grid), grid)

    def _region_features(self, tokens: ImageTokens, boxes: Tensor) -> Tensor:
        return self._project_regions(self._region_tokens(tokens, boxes))

    def _project_regions(self, states: Tensor) -> Tensor:
        return self.region_projection(self.region_norm(states))

    def _region_tokens(self, tokens: ImageTokens, boxes: Tensor) -> Tensor:
        readout = self.config.region_readout
        if readout == "roi_align":
            return roi_align(tokens.raw, boxes, tokens.grid, self.config.roi_align_size).mean(2)
        if readout == "mean":
            return self.prompter.layer.read_all(self.prompter.box_prompts(boxes), tokens.placed).mean(2)
        return self.prompter.layer(self.prompter.box_prompts(boxes), tokens.placed)


class CLOCModel(CLOCVisionModel):
    """CLOC (arXiv 2410.02746): CLIP with a Prompter. One image pass embeds the image and any number of boxes; a text
    prompt finds its box.

    Trained on image captions (`input_ids`) and on boxes with a text each (`region_input_ids`).
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: CLOCConfig):
        super().__init__(config)
        self.text_model = build_text_model(config)
        self.text_projection = build_text_projection(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.region_logit_scale = LogitScale(config.logit_scale_init_value)
        self.box_head = CLOCBoxHead(config.vision_config.hidden_size) if config.grounding else None
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str | None, **kwargs: Any) -> "CLOCModel":
        """A model that inherits its towers, and what lies behind them where it fits.

        Args:
            vision: CLIP, SigLIP or fixed-resolution SigLIP2 checkpoint (composite or vision tower alone), Hub id or
                folder. Its projection becomes `visual_projection` (SigLIP's, which has none, the identity), so that
                image features equal those of the checkpoint.
            text: CLIP text tower (alone or in a composite), any text encoder, or any decoder LLM. The projection of a
                CLIP becomes `text_projection` when that is `"linear"`; when `vision` and `text` are one CLIP and both
                projections fit, `logit_scale` is inherited too. None builds the model without a text tower: it needs
                `text_hidden_size` and takes pooled states.
            kwargs: `dtype` of the whole model (float32 when not given; `"auto"` is that of the checkpoints, the wider
                of two), `image_size` (position embeddings are interpolated), `max_position_embeddings` (those of a
                CLIP text tower are stretched: the first 20 stay, the rest is interpolated), `revision` or
                `vision_revision` and `text_revision`, `token`, `cache_dir`, `local_files_only`, and fields of
                [`CLOCConfig`].

        Only the Prompter, the region head, the box head, `region_logit_scale` and projections that fit nothing start
        from new weights.

        Raises:
            ValueError: a checkpoint of another architecture; weights of a tower missing, left over or of another
                shape, listed by name; a size that the tower cannot take.
            TypeError: a field that the configuration does not have.
        """
        return model_from_towers(cls, CLOCConfig, vision, text, (), **kwargs)

    def get_logit_scale(self) -> Tensor:
        """Scalar: the inverse temperature between regions and texts."""
        return self.region_logit_scale()

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
    def ground(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_states: Tensor | None = None,
        **kwargs: Any,
    ) -> CLOCGroundingOutput:
        """Finds the box of each text in each image.

        Args:
            pixel_values (`(B, 3, H, W)`).
            input_ids, attention_mask (`(T, L)`), text_states: as in [`CLOCModel.get_text_features`].

        Returns:
            [`CLOCGroundingOutput`]

        Raises:
            ValueError: the model was built with `grounding=False`.
        """
        if self.box_head is None:
            raise ValueError("`ground` needs a model with `config.grounding=True`, got False.")
        texts = self.get_text_features(input_ids, attention_mask, text_states, return_dict=True).pooler_output
        check_arguments(kwargs)
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        tokens = self._image_tokens(outputs.last_hidden_state, pixel_values)
        text_embeds = unit(texts)[None].expand(len(pixel_values), -1, -1)
        pred_boxes = self._find_boxes(tokens, text_embeds)
        region_embeds = unit(self._region_features(tokens, pred_boxes))
        return CLOCGroundingOutput(pred_boxes=pred_boxes, scores=(region_embeds * text_embeds).sum(-1))

    @can_return_tuple
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
        **kwargs: Any,
    ) -> CLOCOutput:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): normalised RGB.
            region_boxes (`(B, R, 4)`): xyxy in [0, 1] of the processed image.
            region_attention_mask (`(B, R)`): 1 for real regions.
            input_ids, attention_mask (`(T, L)`): texts to compare with; for the loss, the B image captions.
            region_input_ids, region_text_attention_mask (`(B, R, L)`): a text a region, for the loss.
            text_states (`(T, text_hidden_size)`), region_text_states (`(B, R, text_hidden_size)`): pooled states in
                place of tokens.
            return_loss: True or False, or None to compute the loss when region texts are given.

        Returns:
            [`CLOCOutput`]

        Raises:
            ValueError: `return_loss=True` without any texts or with T other than B captions; region texts without
            boxes.
        """
        texts = input_ids if text_states is None else text_states
        region_texts = region_input_ids if region_text_states is None else region_text_states
        with_loss = wants_loss(return_loss, pixel_values, texts, region_texts)

        output, tokens = self._embed(pixel_values, region_boxes, region_attention_mask, **kwargs)
        if texts is not None:
            features = self.get_text_features(input_ids, attention_mask, text_states, return_dict=True)
            output.text_embeds = unit(features.pooler_output)
            output.text_ids = text_ids(texts, None if input_ids is None else attention_mask)
            output.logits_per_image = self.logit_scale() * output.image_embeds @ output.text_embeds.T
            if output.region_embeds is not None:
                output.logits_per_region = self.region_logit_scale() * output.region_embeds @ output.text_embeds.T
        if region_texts is not None:
            real = region_mask("region_boxes", region_boxes, region_attention_mask, pixel_values, trailing=(4,))
            output.region_text_embeds, output.region_text_ids = region_text_features(
                self, real, region_input_ids, region_text_attention_mask, region_text_states
            )
            if self.box_head is not None:
                output.pred_boxes = self._find_boxes(tokens, output.region_text_embeds)
        if with_loss:
            parts = self.compute_loss(output, region_boxes, region_attention_mask)
            set_losses(output, parts, self.loss_weights())
        # Anew, so that the fields are in their order, the loss first.
        return CLOCOutput(**output)

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
            output: of `forward`, on this rank's batch.
            region_boxes, region_attention_mask: of that batch.
            gather: returns a tensor's rows of all ranks and the index of this rank's first row among them.
            ranks: number of ranks.
        """
        losses = {}
        if output.text_embeds is not None and self.config.image_text_loss_weight:
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
        if self.config.region_text_loss_weight:
            losses["region_text"] = gathered_contrastive_loss(
                output.region_embeds.flatten(0, 1),
                output.region_text_embeds.flatten(0, 1),
                self.region_logit_scale(),
                output.region_text_ids.flatten(),
                valid,
                similarity_threshold=self.config.text_similarity_threshold,
                gather=gather,
                ranks=ranks,
                tile_size=self.config.contrastive_tile_size,
            )
        if output.pred_boxes is not None and self.config.grounding_loss_weight:
            # A text that several regions of the image have finds none of their boxes in particular.
            same = output.region_text_ids[:, :, None] == output.region_text_ids[:, None, :]
            repeats = (same & valid.view(same.shape[:2])[:, None, :]).sum(-1).flatten()
            found = valid & (repeats == 1)
            losses["grounding_l1"], losses["grounding_giou"] = grounding_losses(
                output.pred_boxes.flatten(0, 1), region_boxes.flatten(0, 1), found, rows_per_rank(found, gather, ranks)
            )
        return losses

    def _find_boxes(self, tokens: ImageTokens, text_embeds: Tensor) -> Tensor:
        return self.box_head(self.prompter.layer(self.prompter.text_prompt(text_embeds), tokens.placed))


__all__ = ["CLOCModel", "CLOCOutput", "CLOCGroundingOutput", "CLOCPreTrainedModel", "CLOCVisionModel"]
