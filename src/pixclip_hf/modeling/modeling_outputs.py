"""What the models return, and the similarities and the loss in it."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


def derived() -> Any:
    """A field of a [`RegionTextOutput`] that is computed from the others: no loss may read it."""
    return field(default=None, metadata={"derived": True})


@dataclass
class RegionTextOutput(ModelOutput):
    """
    What both models return. B images, R region slots per image, T texts, D the projection width; every embedding is
    L2-normalized; rows of padded region slots are zero in every field.

    Every field is a representation: rows of images or texts, which a batch that is passed in chunks joins again before
    the loss. What is none says so with [`derived`].

    Args:
        loss (scalar): weighted sum of `loss_parts`.
        loss_parts (`dict` of scalars): the parts by name, unweighted; those whose inputs are in the batch.
        logits_per_region (`(B, R, T)`), logits_per_image (`(B, T)`), logits_per_text (`(T, B)`): scaled cosine
            similarities to the texts.
        region_embeds (`(B, R, D)`), image_embeds (`(B, D)`), text_embeds (`(T, D)`).
        region_text_embeds (`(B, R, D)`): embeddings of the region texts.
        text_ids (`(T,)`), region_text_ids (`(B, R)`): identities of the texts, see [`text_ids`]; 0 for rows without.
        vision_model_output, text_model_output (`BaseModelOutputWithPooling`): what the towers returned for the images
            and the texts, with `hidden_states` and `attentions` where they were asked for; `pooler_output` is
            projected.
    """

    loss: Tensor | None = derived()
    loss_parts: dict[str, Tensor] | None = derived()
    logits_per_region: Tensor | None = derived()
    logits_per_image: Tensor | None = derived()
    logits_per_text: Tensor | None = derived()
    region_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    region_text_embeds: Tensor | None = None
    text_ids: Tensor | None = None
    region_text_ids: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = derived()
    text_model_output: BaseModelOutputWithPooling | None = derived()

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in their order; those that are outputs themselves as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())

    @classmethod
    def representations(cls) -> tuple[str, ...]:
        """Names of the fields that a loss may read."""
        return tuple(entry.name for entry in fields(cls) if not entry.metadata.get("derived"))


@dataclass
class RegionVisionOutput(ModelOutput):
    """
    What the vision models return; shapes as in [`RegionTextOutput`].

    Args:
        image_embeds (`(B, D)`), region_embeds (`(B, R, D)`): L2-normalized; rows of padded region slots are zero.
        last_hidden_state (`(B, N, width)`): the vision tower's tokens of the images.
        hidden_states, attentions (tuples, one entry per layer): the tower's, where they were asked for.
    """

    image_embeds: Tensor | None = None
    region_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def unit(embeds: Tensor) -> Tensor:
    """L2-normalized along the last dimension; zeros stay zeros in every precision."""
    return F.normalize(embeds, dim=-1, eps=torch.finfo(embeds.dtype).tiny)


def vision_output(image: BaseModelOutputWithPooling, region_embeds: Tensor | None) -> RegionVisionOutput:
    """What a vision model returns, from its image features and the normalized embeddings of its regions."""
    return RegionVisionOutput(
        image_embeds=unit(image.pooler_output),
        region_embeds=region_embeds,
        last_hidden_state=image.last_hidden_state,
        hidden_states=image.hidden_states,
        attentions=image.attentions,
    )


def scaled_similarity(logit_scale: Tensor, logit_bias: Tensor | None, embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Logits `(..., T)` of embeddings `(..., D)` to texts `(T, D)`, on the device of the embeddings."""
    return _to_logits(embeds @ text_embeds.to(embeds.device).T, logit_scale, logit_bias)


def image_text_logits(logit_scale: Tensor, logit_bias: Tensor | None, embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Logits `(B, T)` of images `(B, D)` to texts `(T, D)`, by the operations of CLIP and SigLIP in their order: equal
    inputs give equal bits."""
    return _to_logits(text_embeds.to(embeds.device) @ embeds.T, logit_scale, logit_bias).T


def _to_logits(similarities: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    logits = similarities * logit_scale.to(similarities.device)
    return logits if logit_bias is None else logits + logit_bias.to(similarities.device)


def wants_loss(
    return_loss: bool | None, pixel_values: Tensor, texts: Tensor | None, region_texts: Tensor | None
) -> bool:
    """Whether to compute the loss: as asked, or when there are region texts.

    Args:
        return_loss: what the caller asked for.
        texts, region_texts: token ids or states of the image captions and of the region texts.

    Raises:
        ValueError: a loss is asked for without any texts, or there is not one caption per image.
    """
    if return_loss is None:
        return_loss = region_texts is not None
    if not return_loss:
        return False
    if region_texts is None and texts is None:
        raise ValueError(
            "`return_loss=True` needs texts: `region_input_ids` or `region_text_states` with their regions, or "
            "`input_ids` or `text_states` with one caption per image."
        )
    if texts is not None and len(texts) != len(pixel_values):
        raise ValueError(
            f"For the loss `input_ids` or `text_states` must hold one caption per image: got {len(texts)} texts for "
            f"{len(pixel_values)} images. Pass `return_loss=False` to compare with any texts."
        )
    return True


def set_losses(output: Any, parts: dict[str, Tensor], weights: dict[str, float]) -> None:
    """Puts the parts of a loss and their weighted sum into a model's output."""
    if not parts:
        raise ValueError(
            f"No part of the loss can be computed: inputs are missing or their weight is 0, of {weights}."
        )
    output.loss_parts = parts
    device = next(iter(parts.values())).device
    output.loss = sum(weights[name] * part.to(device) for name, part in parts.items())
