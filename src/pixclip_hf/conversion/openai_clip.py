"""CLIP in OpenAI's names: the two transformers that `clip`, `open-clip` and `alpha-clip` checkpoints share."""

from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import check_source
from .weights import Move, Plan, pairs

HEAD_WIDTH = 64
OPEN_CLIP_SETTINGS = "open_clip_config.json"
# Long-CLIP (arXiv 2403.15378) keeps two tables of text positions: the first rows of one, which short captions have
# trained well and which stay as they were, and the other rows of the second, which were trained on.
SECOND_POSITIONS = "positional_embedding_res"
KEPT_POSITIONS = 20
MASK_WEIGHT = "vision_model.embeddings.patch_embedding.mask_weight"


def plan_clip(
    checkpoint: Checkpoint,
    activation: str = "quick_gelu",
    head_width: int = HEAD_WIDTH,
    text_head_width: int = HEAD_WIDTH,
) -> Plan:
    """A CLIP of OpenAI (ViT) as a PixCLIP whose mask projection is zero.

    Args:
        checkpoint: a state dict; sizes are those of its tensors.
        activation: `"quick_gelu"`, that of OpenAI's, or `"gelu"`. No tensor shows it.
        head_width, text_head_width: channels of an attention head in each tower; 64 in OpenAI's models. No tensor
            shows them.

    Raises:
        ValueError: a file of another kind, or one whose shapes contradict each other.
    """
    check_source(checkpoint, "clip")
    refuse_open_clip(checkpoint)
    plan = plan_towers(checkpoint, activation, head_width, text_head_width)
    plan.left_out |= check_scalars(checkpoint, plan.config["vision_config"], plan.config["text_config"])
    return plan


def refuse_open_clip(checkpoint: Checkpoint) -> None:
    """Refuses a file with open_clip's settings beside it: activation and heads may be others than OpenAI's.

    Raises:
        ValueError: it has.
    """
    if checkpoint.path.with_name(OPEN_CLIP_SETTINGS).is_file():
        raise ValueError(
            f"{OPEN_CLIP_SETTINGS} lies beside {str(checkpoint.path)!r}: its settings are read for 'open-clip' alone."
        )


def check_scalars(checkpoint: Checkpoint, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, str]:
    """The sizes among the weights and why they go nowhere; they must say what the configurations say.

    Raises:
        ValueError: one says something else.
    """
    sizes = {
        "input_resolution": vision["image_size"],
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
    }
    checked = {}
    for name, size in sizes.items():
        if name in checkpoint.tensors:
            found = checkpoint.tensors[name].item()
            if found != size:
                raise ValueError(f"{name!r} of the checkpoint says {found}, its weights say {size}.")
            checked[name] = f"checked: {found}"
    return checked


def plan_towers(checkpoint: Checkpoint, activation: str, head_width: int, text_head_width: int) -> Plan:
    """Both towers, their projections and the temperature. Arguments as in [`plan_clip`]."""
    vision, dimension = vision_config(checkpoint, "visual.", activation, head_width)
    text = text_config(checkpoint, activation, text_head_width)
    tensors, left_out, notes = join_positions(checkpoint)
    return Plan(
        config=region_config(vision, text, dimension),
        tensors=tensors,
        moves=vision_moves(checkpoint, "visual.", vision) + text_moves(checkpoint, text),
        left_out=left_out,
        new={MASK_WEIGHT: "new: zeros"},
        notes=[assumption(activation, head_width, text_head_width), *notes],
    )


def join_positions(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors of a checkpoint with one table of text positions, what is left out for it, and notes about it.

    Raises:
        ValueError: the two tables of a Long-CLIP have different shapes, or no rows for the second.
    """
    tensors = dict(checkpoint.tensors)
    if SECOND_POSITIONS not in tensors:
        return tensors, {}, []
    shape, other = checkpoint.shape("positional_embedding", 2), checkpoint.shape(SECOND_POSITIONS, 2)
    if shape != other or shape[0] <= KEPT_POSITIONS:
        raise ValueError(
            f"'positional_embedding' and {SECOND_POSITIONS!r} of a Long-CLIP must have one shape with more than "
            f"{KEPT_POSITIONS} rows, got {shape} and {other}."
        )
    first, second = tensors["positional_embedding"], tensors[SECOND_POSITIONS]
    tensors["positional_embedding"] = torch.cat([first[:KEPT_POSITIONS], second[KEPT_POSITIONS:]])
    why = f"its rows from {KEPT_POSITIONS} on are joined with the first {KEPT_POSITIONS} of 'positional_embedding'"
    return tensors, {SECOND_POSITIONS: why}, [f"a Long-CLIP: {SECOND_POSITIONS!r}, {why}"]


def region_config(vision: dict[str, Any], text: dict[str, Any], dimension: int) -> dict[str, Any]:
    """Fields of [`PixCLIPConfig`] for two CLIP towers: the text's state at its end token, two bare projections."""
    return {
        "vision_config": vision,
        "text_config": text,
        "projection_dim": dimension,
        "text_pooling": "eos",
        "text_projection": "linear",
    }


def assumption(activation: str, head_width: int, text_head_width: int) -> str:
    """What no tensor shows."""
    return (
        f"not in the weights, taken as given: activation {activation}, attention heads {head_width} (image) and "
        f"{text_head_width} (text) channels wide"
    )


def vision_config(checkpoint: Checkpoint, prefix: str, activation: str, head_width: int) -> tuple[dict[str, Any], int]:
    """Configuration of the vision tower below `prefix`, and the width of the shared space."""
    width, patch = checkpoint.square_patch(f"{prefix}conv1.weight")
    positions, _ = checkpoint.shape(f"{prefix}positional_embedding", 2)
    side = checkpoint.grid_side(f"{prefix}positional_embedding", positions)
    _, dimension = checkpoint.shape(f"{prefix}proj", 2)
    config = {
        "model_type": "clip_vision_model",
        "image_size": side * patch,
        "patch_size": patch,
        **_sizes(checkpoint, prefix, width, activation, head_width, "head_width"),
    }
    return config, dimension


def text_config(checkpoint: Checkpoint, activation: str, head_width: int) -> dict[str, Any]:
    """Configuration of the text tower. Its end token is the last of the vocabulary, the start token before it."""
    vocabulary, width = checkpoint.shape("token_embedding.weight", 2)
    length, _ = checkpoint.shape("positional_embedding", 2)
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        **_sizes(checkpoint, "", width, activation, head_width, "text_head_width"),
    }


def _sizes(
    checkpoint: Checkpoint, prefix: str, width: int, activation: str, head_width: int, option: str
) -> dict[str, Any]:
    if head_width < 1 or width % head_width:
        raise ValueError(f"`{option}` must divide the tower's width {width}, got {head_width}.")
    return {
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": checkpoint.blocks(f"{prefix}transformer.resblocks."),
        "num_attention_heads": width // head_width,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def vision_moves(checkpoint: Checkpoint, prefix: str, config: dict[str, Any]) -> list[Move]:
    """Moves of the vision tower below `prefix` and of its projection."""
    embeddings = "vision_model.embeddings"
    return [
        Move(f"{prefix}conv1.weight", (f"{embeddings}.patch_embedding.weight",)),
        Move(f"{prefix}class_embedding", (f"{embeddings}.class_embedding",)),
        Move(f"{prefix}positional_embedding", (f"{embeddings}.position_embedding.weight",)),
        *pairs(f"{prefix}ln_pre", "vision_model.pre_layrnorm", "weight", "bias"),
        *_block_moves(checkpoint, prefix, "vision_model", config["num_hidden_layers"]),
        *pairs(f"{prefix}ln_post", "vision_model.post_layernorm", "weight", "bias"),
        Move(f"{prefix}proj", ("visual_projection.weight",), "transposed"),
    ]


def text_moves(checkpoint: Checkpoint, config: dict[str, Any]) -> list[Move]:
    """Moves of the text tower, of its projection, and of the temperature."""
    embeddings = "text_model.embeddings"
    return [
        Move("token_embedding.weight", (f"{embeddings}.token_embedding.weight",)),
        Move("positional_embedding", (f"{embeddings}.position_embedding.weight",)),
        *_block_moves(checkpoint, "", "text_model", config["num_hidden_layers"]),
        *pairs("ln_final", "text_model.final_layer_norm", "weight", "bias"),
        Move("text_projection", ("text_projection.weight",), "transposed"),
        Move("logit_scale", ("logit_scale.log_scale",)),
    ]


def _block_moves(checkpoint: Checkpoint, prefix: str, tower: str, blocks: int) -> list[Move]:
    moves = []
    for index in range(blocks):
        source, target = f"{prefix}transformer.resblocks.{index}", f"{tower}.encoder.layers.{index}"
        # OpenAI's attention is torch's own, Alpha-CLIP's image tower has a module of its own in that place.
        joint = "in_proj." if f"{source}.attn.in_proj.weight" in checkpoint.tensors else "in_proj_"
        for name in ("weight", "bias"):
            parts = tuple(f"{target}.self_attn.{part}_proj.{name}" for part in "qkv")
            moves.append(Move(f"{source}.attn.{joint}{name}", parts, "split in three"))
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            moves += pairs(f"{source}.{old}", f"{target}.{new}", "weight", "bias")
    return moves
