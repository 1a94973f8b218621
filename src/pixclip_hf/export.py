"""The two halves of a model as `torch.export` programs or ONNX graphs: images with their regions, and texts.

Built on the exporters of transformers. ONNX needs `pip install pixclip-hf[onnx]`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.exporters import (
    DynamoConfig,
    DynamoExporter,
    ExportedModel,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

from .modeling.configuration_region_text import check_choice
from .modeling.modeling_outputs import unit
from .modeling.modeling_pixclip import REGION_MODES
from .modeling.modeling_text import text_features

EXPORT_FORMATS = ("torch", "onnx")


class TextHalf(nn.Module):
    """The text side of a [`CLOCModel`] or [`PixCLIPModel`] by itself, its modules shared."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.config = model.config
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, text_states: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`text_embeds` `(T, D)`, L2-normalized, from tokens `(T, L)` or pooled states `(T, text_hidden_size)`."""
        states = text_features(self.text_model, self.config, input_ids, attention_mask, text_states).pooler_output
        return {"text_embeds": unit(self.text_projection(states))}


def export_image_half(
    model: PreTrainedModel, format: str = "onnx", mode: str = "prompted", opset_version: int | None = None
) -> ExportedModel:
    """Exports the image half, for any number of images and regions.

    The export takes `pixel_values` `(B, 3, H, W)` of the model's image size and `region_boxes` `(B, R, 4)` (CLOC) or
    `region_masks` `(B, R, H, W)` bool (PixCLIP), and gives `region_embeds` `(B, R, D)` and `image_embeds` `(B, D)`,
    L2-normalized. It takes no `region_attention_mask`, so the rows of padded region slots must be ignored.

    Args:
        model: a [`CLOCVisionModel`] or [`PixCLIPVisionModel`]; a whole model works too, but a `torch.export` program
            then carries its text tower along.
        format: `"onnx"`, or `"torch"` for a program of `torch.export`.
        mode: the mode of PixCLIP, see [`PixCLIPModel.get_region_features`].
        opset_version: ONNX operator set; torch chooses when None.

    Returns:
        `ExportedModel`: called with these arguments it returns the model's output (ONNX runs in ONNX Runtime);
        `save_pretrained`, `from_pretrained` and `push_to_hub` as for any model; `program` is what the format's own
        library reads.

    Raises:
        ValueError: an unknown format or mode, or a tower of variable resolution.
        ImportError: a package that the format needs is not installed.
    """
    check_choice("mode", mode, REGION_MODES)
    if model.takes_patches:
        raise ValueError("`model` must take images of one size, got one whose images have grids of their own.")
    config = model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    side, images, regions = config.image_size, Dim("images"), Dim("regions")
    sample: dict[str, Any] = {"pixel_values": torch.randn(2, config.num_channels, side, side, generator=generator)}
    shapes: dict[str, Any] = {"pixel_values": {0: images}}
    if model.config.model_type == "cloc":
        corners = torch.rand(2, 3, 2, 2, generator=generator)
        sample["region_boxes"] = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
        shapes["region_boxes"] = {0: images, 1: regions}
    else:
        sample |= {"region_masks": torch.rand(2, 3, side, side, generator=generator) > 0.5, "mode": mode}
        shapes |= {"region_masks": {0: images, 1: regions}, "mode": None}
    return _export(model, sample, shapes, format, opset_version)


def export_text_half(
    model: PreTrainedModel, format: str = "onnx", opset_version: int | None = None, int8: bool = False
) -> ExportedModel:
    """Exports the text half, for any number of texts of any length that the tower takes.

    The export takes `input_ids` and `attention_mask` `(T, L)`, padded on either side, or, of a model without a text
    tower, `text_states` `(T, text_hidden_size)`; it gives `text_embeds` `(T, D)`, L2-normalized.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`].
        format, opset_version: see [`export_image_half`].
        int8: quantizes dynamically with ONNX Runtime: weights to 7 of 8 bits with one scale per output channel, and
            activations at run time. ONNX only.

    Returns:
        `ExportedModel`: see [`export_image_half`].

    Raises:
        ValueError: an unknown format, or `int8` with a format other than ONNX.
        ImportError: a package that the format needs is not installed.
    """
    texts = Dim("texts")
    if model.text_model is None:
        generator = torch.Generator().manual_seed(0)
        sample = {"text_states": torch.randn(2, model.config.text_hidden_size, generator=generator)}
        shapes = {"text_states": {0: texts}}
    else:
        length = Dim("length", max=getattr(model.config.text_config, "max_position_embeddings", None))
        sample = {
            "input_ids": torch.ones(2, 4, dtype=torch.long),
            "attention_mask": torch.ones(2, 4, dtype=torch.long),
        }
        shapes = {name: {0: texts, 1: length} for name in sample}
    return _export(TextHalf(model), sample, shapes, format, opset_version, int8)


def _export(
    half: nn.Module,
    sample: dict[str, Any],
    shapes: dict[str, Any],
    format: str,
    opset_version: int | None,
    int8: bool = False,
) -> ExportedModel:
    check_choice("format", format, EXPORT_FORMATS)
    if int8 and format == "torch":
        raise ValueError("`int8=True` needs `format='onnx'`, got 'torch'.")
    training = {module: module.training for module in half.modules()}
    half.eval()
    try:
        if format == "torch":
            return DynamoExporter().export(half, sample, DynamoConfig(dynamic_shapes=shapes))
        # Weights of 7 bits: processors without VNNI add products of 8 bits up in 16, which overflow.
        weights = OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True)
        quantizer = OnnxRuntimeQuantizer(weights) if int8 else None
        settings = OnnxConfig(dynamic_shapes=shapes, opset_version=opset_version, quantizer=quantizer)
        return OnnxExporter().export(half, sample, settings)
    finally:
        # The modules are the caller's, which may be in the middle of its training.
        for module, flag in training.items():
            module.training = flag
