"""The public PixCLIP checkpoint: EVA02-CLIP's image tower with its mask projection, and the text adaptor."""

from typing import Any

import torch

from ..modeling.configuration_eva02 import Eva02VisionConfig
from ..modeling.modeling_eva02 import rotary_tables
from ..modeling.modeling_inherit import load_weights, read_source
from .checkpoint import Checkpoint
from .formats import check_source
from .weights import Move, Plan, pairs

HEAD_WIDTH = 64
LLM = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LLM_WIDTH = 4096
ADAPTER = "text.text_adaptor"
DROPPED = "leading axes of 1 dropped"


def plan_pixclip(
    checkpoint: Checkpoint,
    text_model: str | None = None,
    text_model_name: str | None = None,
    head_width: int | None = None,
) -> Plan:
    """The public PixCLIP. Sizes are those of its tensors; the width of a head is that of its rotary tables.

    Args:
        checkpoint: the state dict; `l2v.*`, the language model's own weights, may be in it and are left out.
        text_model: folder or Hub id of the language model, which becomes the text tower. Without it the model takes
            pooled states, `text_states`.
        text_model_name: the language model to expect those states from; [`LLM`] when None.
        head_width: channels of an attention head, for a checkpoint without rotary tables; 64 when None.

    Raises:
        ValueError: a file of another kind, one whose shapes contradict each other or `head_width`, rotary tables of
            other frequencies, or a language model of another width.
    """
    check_source(checkpoint, "pixclip")
    vision = _vision_config(checkpoint, head_width)
    projection, width = checkpoint.shape(f"{ADAPTER}.5.weight", 2)
    config: dict[str, Any] = {
        "vision_config": vision.to_dict(),
        "text_config": None,
        "text_hidden_size": width,
        "text_model_name": text_model_name or LLM,
        "projection_dim": projection,
        "text_pooling": "mean",
        "text_projection": "mlp_adapter",
        "bidirectional": True,
        "mask_bias": "visual.alpha_patch_embed.proj.bias" in checkpoint.tensors,
        "visual_projection_bias": "visual.head.bias" in checkpoint.tensors,
    }
    plan = Plan(
        config=config,
        tensors=dict(checkpoint.tensors),
        moves=[
            *_vision_moves(vision, config["mask_bias"], config["visual_projection_bias"]),
            *_adapter_moves(),
            Move("logit_scale", ("logit_scale.log_scale",)),
        ],
        left_out=_check_rotary_tables(checkpoint, vision),
    )
    if not plan.left_out:
        plan.notes.append(
            f"no rotary tables in the checkpoint, taken as given: attention heads "
            f"{vision.hidden_size // vision.num_attention_heads} channels wide, positions stretched over "
            f"{vision.rope_grid_size} x {vision.rope_grid_size}, base {vision.rope_theta:g}"
        )
    for name in checkpoint.tensors:
        if name.startswith("l2v."):
            plan.left_out[name] = "the language model's own: --text_model attaches it"
    if text_model is not None:
        _attach(plan, text_model)
    elif text_model_name is None and width != LLM_WIDTH:
        plan.notes.append(
            f"text_model_name is the published {LLM}, whose states are {LLM_WIDTH} wide; this adaptor takes {width}: "
            "name its language model with --text_model_name"
        )
    return plan


def _vision_config(checkpoint: Checkpoint, head_width: int | None) -> Eva02VisionConfig:
    width, patch = checkpoint.square_patch("visual.patch_embed.proj.weight")
    _, positions, _ = checkpoint.shape("visual.pos_embed", 3)
    tables = (tensor for name, tensor in checkpoint.tensors.items() if name.endswith("rope.freqs_cos"))
    shown = next((table.shape[-1] for table in tables), None)
    if None not in (shown, head_width) and head_width != shown:
        raise ValueError(f"`head_width` must be that of the checkpoint's rotary tables, {shown}, got {head_width}.")
    head_width = shown or (HEAD_WIDTH if head_width is None else head_width)
    if head_width < 1 or width % head_width:
        raise ValueError(f"`head_width` must divide the image tower's width {width}, got {head_width}.")
    return Eva02VisionConfig(
        hidden_size=width,
        intermediate_size=checkpoint.shape("visual.blocks.0.mlp.w1.weight", 2)[0],
        num_hidden_layers=checkpoint.blocks("visual.blocks."),
        num_attention_heads=width // head_width,
        image_size=checkpoint.grid_side("visual.pos_embed", positions) * patch,
        patch_size=patch,
    )


def _check_rotary_tables(checkpoint: Checkpoint, config: Eva02VisionConfig) -> dict[str, str]:
    """The tables are computed by the model; those of the checkpoint must say the same."""
    side = config.image_size // config.patch_size
    tables = dict(zip(("cos", "sin"), rotary_tables(config, (side, side)), strict=True))
    checked = {}
    for name, tensor in checkpoint.tensors.items():
        for function, expected in tables.items():
            if not name.endswith(f"rope.freqs_{function}"):
                continue
            tolerance = max(1e-4, torch.finfo(tensor.dtype).eps)
            if tensor.shape != expected.shape or (tensor.float() - expected).abs().max() > tolerance:
                raise ValueError(
                    f"{name!r} {tuple(tensor.shape)} are not the rotary positions of a {side} x {side} grid stretched "
                    f"over {config.rope_grid_size} x {config.rope_grid_size}, base {config.rope_theta:g}."
                )
            checked[name] = "checked: computed by the model"
    return checked


def _vision_moves(config: Eva02VisionConfig, mask_bias: bool, head_bias: bool) -> list[Move]:
    embeddings = "vision_model.embeddings"
    names = ("weight", "bias")
    moves = [
        *pairs("visual.patch_embed.proj", f"{embeddings}.patch_embedding", *names),
        Move("visual.alpha_patch_embed.proj.weight", (f"{embeddings}.patch_embedding.mask_weight",)),
        Move("visual.cls_token", (f"{embeddings}.class_embedding",), DROPPED),
        Move("visual.pos_embed", (f"{embeddings}.position_embedding.weight",), DROPPED),
        *pairs("visual.norm", "vision_model.post_layernorm", *names),
        Move("visual.head.weight", ("visual_projection.weight",)),
    ]
    if mask_bias:
        moves.append(Move("visual.alpha_patch_embed.proj.bias", (f"{embeddings}.patch_embedding.mask_bias",)))
    if head_bias:
        moves.append(Move("visual.head.bias", ("visual_projection.bias",)))
    for index in range(config.num_hidden_layers):
        source, target = f"visual.blocks.{index}", f"vision_model.encoder.layers.{index}"
        moves += pairs(f"{source}.attn.k_proj", f"{target}.self_attn.k_proj", "weight")
        for old, new in (
            ("norm1", "layer_norm1"),
            ("attn.q_proj", "self_attn.q_proj"),
            ("attn.v_proj", "self_attn.v_proj"),
            ("attn.inner_attn_ln", "self_attn.inner_norm"),
            ("attn.proj", "self_attn.out_proj"),
            ("norm2", "layer_norm2"),
            ("mlp.w1", "mlp.gate_proj"),
            ("mlp.w2", "mlp.up_proj"),
            ("mlp.ffn_ln", "mlp.inner_norm"),
            ("mlp.w3", "mlp.down_proj"),
        ):
            moves += pairs(f"{source}.{old}", f"{target}.{new}", *names)
    return moves


def _adapter_moves() -> list[Move]:
    moves = []
    for index in range(4):
        for old, new in (("ln", "norm"), ("fn.0", "fc1"), ("fn.3", "fc2")):
            moves += pairs(f"{ADAPTER}.{index}.{old}", f"text_projection.blocks.{index}.{new}", "weight", "bias")
    for index, new in ((4, "norm"), (5, "projection")):
        moves += pairs(f"{ADAPTER}.{index}", f"text_projection.{new}", "weight", "bias")
    return moves


def _attach(plan: Plan, text_model: str) -> None:
    source = read_source("text", text_model, {})
    tower = source.tower(load_weights(source, "auto"))
    width = plan.config["text_hidden_size"]
    if tower.config.hidden_size != width:
        raise ValueError(
            f"`text_model` ({text_model!r}) has states {tower.config.hidden_size} wide, the adaptor takes {width}."
        )
    plan.config |= {"text_config": tower.config.to_dict(), "text_model_name": text_model}
    for name, tensor in tower.state_dict().items():
        plan.tensors[f"text_model:{name}"] = tensor
        plan.moves.append(Move(f"text_model:{name}", (f"text_model.{name}",)))
    plan.notes.append(f"names with text_model: are those of {text_model!r}")
