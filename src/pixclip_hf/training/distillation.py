"""A penalty on forgetting: whole images and captions stay near where the start of the training embeds them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..modeling.modeling_gathered_loss import Gather, rows_per_rank

# What a batch holds of whole images and their captions.
WHOLE_IMAGES = (
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "input_ids",
    "attention_mask",
    "text_states",
    "position_ids",
    "token_type_ids",
    "interpolate_pos_encoding",
)


def frozen_copy(model: Any) -> Any:
    """A copy of a model that does not train. What does not train in the model either is not copied: both share it."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return deepcopy(model, shared).requires_grad_(False).eval()


def distillation_loss(
    teacher: Any, output: Any, inputs: Mapping[str, Any], gather: Gather | None = None, ranks: int = 1
) -> Tensor:
    """Mean of 1 - cosine between the embeddings of whole images and those of a teacher, plus that of their captions
    (features distilled in the manner of Li and Hoiem 2017, Learning without Forgetting).

    Args:
        teacher: a [`CLOCModel`] or [`PixCLIPModel`] whose embeddings have the model's size.
        output: what the model returned for the batch, with `image_embeds` `(B, D)`.
        inputs: the batch.
        gather, ranks: as in [`PixCLIPModel.compute_loss`].

    Returns:
        Scalar.
    """
    with torch.no_grad():
        given = {name: inputs[name] for name in WHOLE_IMAGES if inputs.get(name) is not None}
        wanted = teacher(**given, return_loss=False, return_dict=True)
    means = []
    for name, ids in (("image_embeds", None), ("text_embeds", output.text_ids)):
        if (rows := output[name]) is None:
            continue
        distances = 1 - (rows * wanted[name].to(rows)).sum(-1).float()
        # An image without a caption has no identity of a text.
        real = torch.ones_like(distances, dtype=torch.bool) if ids is None else ids != 0
        means.append(torch.where(real, distances, 0).sum() / rows_per_rank(real, gather, ranks).clamp(min=1 / ranks))
    return torch.stack(means).sum()
