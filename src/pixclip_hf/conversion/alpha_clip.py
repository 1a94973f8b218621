"""Alpha-CLIP (arXiv 2312.03818): a CLIP whose image tower takes a mask through a second patch convolution."""

from os import PathLike
from pathlib import Path

from transformers import CLIPModel

from .checkpoint import Checkpoint, read_checkpoint
from .formats import check_source
from .openai_clip import (
    HEAD_WIDTH,
    MASK_WEIGHT,
    assumption,
    check_scalars,
    join_positions,
    plan_towers,
    refuse_open_clip,
    region_config,
    text_config,
    text_moves,
    vision_config,
    vision_moves,
)
from .weights import Move, Plan

ACTIVATION = "quick_gelu"


def plan_alpha_clip(
    checkpoint: Checkpoint,
    clip: str | PathLike | None = None,
    head_width: int = HEAD_WIDTH,
    text_head_width: int = HEAD_WIDTH,
) -> Plan:
    """An Alpha-CLIP as a PixCLIP.

    Args:
        checkpoint: a full state dict, or the visual half alone, as the public files are, without its `visual.` prefix.
        clip: for the visual half, the CLIP that it was trained from: a checkpoint file of OpenAI's, or folder or Hub
            id of a transformers `CLIPModel`. Its text tower and temperature are taken, its image tower is not.
        head_width, text_head_width: see [`plan_clip`].

    Raises:
        ValueError: a file of another kind, or of open_clip; a visual half without `clip`, or with a CLIP of other
            sizes; a full state dict with `clip`.
    """
    check_source(checkpoint, "alpha-clip")
    if "visual.conv1_alpha.weight" in checkpoint.tensors:
        if clip is not None:
            raise ValueError(
                f"`clip` ({str(clip)!r}) is for a visual half alone: the checkpoint is a full Alpha-CLIP."
            )
        refuse_open_clip(checkpoint)
        plan = plan_towers(checkpoint, ACTIVATION, head_width, text_head_width)
        plan.left_out |= check_scalars(checkpoint, plan.config["vision_config"], plan.config["text_config"])
        prefix = "visual."
    else:
        if clip is None:
            raise ValueError(
                f"{str(checkpoint.path)!r} is the visual half of an Alpha-CLIP: `clip` must name the CLIP with its "
                "text tower (--clip)."
            )
        plan = _lay_over(checkpoint, clip, head_width, text_head_width)
        prefix = ""
    plan.new.clear()
    plan.moves.append(Move(f"{prefix}conv1_alpha.weight", (MASK_WEIGHT,)))
    return plan


def _lay_over(checkpoint: Checkpoint, clip: str | PathLike, head_width: int, text_head_width: int) -> Plan:
    vision, dimension = vision_config(checkpoint, "", ACTIVATION, head_width)
    if Path(clip).is_file():
        base = read_checkpoint(clip)
        check_source(base, "clip")
        refuse_open_clip(base)
        theirs = vision_config(base, "visual.", ACTIVATION, head_width)
        replaced: tuple[str, ...] = ("visual.",)
        text = text_config(base, ACTIVATION, text_head_width)
        tensors, joined, notes = join_positions(base)
        moves, checked = text_moves(base, text), check_scalars(base, theirs[0], text) | joined
    else:
        model, info = CLIPModel.from_pretrained(clip, dtype="auto", output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"The weights of `clip` {str(clip)!r} do not fit a CLIPModel: missing {sorted(info['missing_keys'])}, "
                f"left over {sorted(info['unexpected_keys'])}."
            )
        text = model.config.text_config.to_dict()
        if text["eos_token_id"] == 2:
            # The first CLIPs on the Hub carry wrong ids; transformers then takes the largest token for the end.
            text |= {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
        theirs = {name: getattr(model.config.vision_config, name) for name in vision}, model.config.projection_dim
        tensors = dict(model.state_dict())
        moves = [Move(name, (name,)) for name in tensors if name.startswith(("text_model.", "text_projection."))]
        moves.append(Move("logit_scale", ("logit_scale.log_scale",)))
        replaced, checked, notes = ("vision_model.", "visual_projection."), {}, []
    if theirs != (vision, dimension):
        raise ValueError(
            f"`clip` ({str(clip)!r}) is not the CLIP that the visual half was trained from: its image tower is "
            f"{theirs}, that of the checkpoint {(vision, dimension)}."
        )
    named = {f"clip:{name}": tensor for name, tensor in tensors.items()}
    return Plan(
        config=region_config(vision, text, dimension),
        tensors={**checkpoint.tensors, **named},
        moves=vision_moves(checkpoint, "", vision) + [move._replace(source=f"clip:{move.source}") for move in moves],
        left_out={
            f"clip:{name}": checked.get(name, "replaced by the checkpoint's image tower")
            for name in tensors
            if name in checked or name.startswith(replaced)
        },
        notes=[
            assumption(ACTIVATION, head_width, text_head_width),
            f"names with clip: are those of {str(clip)!r}",
            *notes,
        ],
    )
