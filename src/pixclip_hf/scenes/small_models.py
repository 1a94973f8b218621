"""Small models that learn the scenes on a CPU, from random weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_cloc import CLOCConfig
from ..modeling.configuration_pixclip import PixCLIPConfig
from ..modeling.modeling_cloc import CLOCModel
from ..modeling.modeling_pixclip import PixCLIPModel
from ..processing.image_processing_region import RegionImageProcessor
from ..processing.processing_cloc import CLOCProcessor
from ..processing.processing_pixclip import PixCLIPProcessor

# Configuration, model and processor.
MODEL_CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "cloc": (CLOCConfig, CLOCModel, CLOCProcessor),
    "pixclip": (PixCLIPConfig, PixCLIPModel, PixCLIPProcessor),
}


def small_model(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int = 64,
    vision_model_type: str = "clip_vision_model",
    **fields: Any,
) -> tuple[CLOCModel | PixCLIPModel, CLOCProcessor | PixCLIPProcessor]:
    """A model of about a million parameters and its processor: patches of 8 pixels, four vision and two text layers.

    Args:
        model_type: `"cloc"` or `"pixclip"`.
        tokenizer: its vocabulary, special tokens and `model_max_length` shape the text tower.
        image_size: side of the images in pixels, a multiple of 8.
        vision_model_type: `"clip_vision_model"`, where a class token is the image, or `"siglip_vision_model"`, whose
            pooling head reads the patches.
        fields: fields of the model's configuration, in place of this function's own.

    Raises:
        ValueError: an unknown `model_type`.
    """
    if model_type not in MODEL_CLASSES:
        raise ValueError(f"`model_type` must be one of {', '.join(map(repr, MODEL_CLASSES))}, got {model_type!r}.")
    config_class, model_class, processor_class = MODEL_CLASSES[model_type]
    # CLOC reads phrases, PixCLIP paragraphs.
    text_width = 64 if model_type == "cloc" else 128
    own: dict[str, Any] = {
        "vision_config": {
            "model_type": vision_model_type,
            "num_hidden_layers": 4,
            "image_size": image_size,
            "patch_size": 8,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "hidden_act": "relu",
        },
        "text_config": {
            "model_type": "clip_text_model",
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "hidden_size": text_width,
            "intermediate_size": 3 * text_width,
            "num_attention_heads": 4,
            "hidden_act": "relu",
        },
        "projection_dim": 128,
        # A mean over tokens starts as a bag of words: what "star" means in one description holds in all others.
        "text_pooling": "mean",
    }
    if model_type == "cloc":
        # Whole images are learned first and easily: what is left of the rate belongs to regions and their boxes.
        weights = dict.fromkeys(("region_text_loss_weight", "box_l1_weight", "box_giou_weight"), 2.0)
        own |= {"prompter_num_attention_heads": 8, **weights}
    model = model_class(config_class(**own | fields))
    start_vision_tower(model)
    image_processor = RegionImageProcessor(size={"height": image_size, "width": image_size})
    return model, processor_class(image_processor=image_processor, tokenizer=tokenizer)


def start_vision_tower(model: CLOCModel | PixCLIPModel) -> None:
    """Starts a CLIP or SigLIP vision tower so that it can learn in minutes.

    CLIP's own start has small patch weights, which Adam's first steps shake about, positions at a fourteenth of the
    patches' scale, and all but uniform attention. Here patch weights are three times as large, positions are 2-D sines
    and cosines at the patches' scale, and queries resemble keys, so that patches first look at what is like them and
    near them (mimetic initialization, Trockman and Kolter 2023). SigLIP's patch weights are large enough.
    """
    embeddings = model.vision_model.embeddings
    side = embeddings.image_size // embeddings.patch_size
    has_class_token = hasattr(embeddings, "class_embedding")
    with torch.no_grad():
        if has_class_token:
            embeddings.patch_embedding.weight.mul_(3)
        embeddings.position_embedding.weight[-side * side :] = 1.5 * sincos_2d(side, embeddings.embed_dim)
        for layer in model.vision_model.encoder.layers:
            queries, keys = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            scale = 1.5 * queries.shape[1] ** -0.5
            queries.normal_(std=scale)
            keys.normal_(std=0.3 * scale).add_(queries)
        if has_class_token and isinstance(model, PixCLIPModel):
            # The class token looks at what the mask marks: both point into one direction.
            direction = torch.randn(embeddings.embed_dim)
            embeddings.class_embedding.copy_(0.5 * direction)
            patches = embeddings.patch_embedding
            patches.mask_weight.copy_(direction[:, None, None, None].expand_as(patches.mask_weight))
            patches.mask_weight.mul_(
                model.config.mask_std / (1 - model.config.mask_mean) / patches.mask_weight[0].numel()
            )


def sincos_2d(side: int, width: int) -> Tensor:
    """Sines and cosines of column and row, `(side * side, width)`, for a width divisible by 4."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    axis = torch.arange(side).float()
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)
