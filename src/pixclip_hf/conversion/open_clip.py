"""CLIPs (ViT) trained with open_clip: OpenAI's names, other settings, which a file beside the weights may tell."""

import json
from typing import Any

from .checkpoint import Checkpoint
from .formats import check_source
from .openai_clip import HEAD_WIDTH, OPEN_CLIP_SETTINGS, plan_towers
from .weights import Plan

TEXT_HEADS = 8  # what open_clip takes where its settings name none
# What these settings mean is in the plan; any other changes the architecture.
KNOWN = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"},
}


def plan_open_clip(
    checkpoint: Checkpoint,
    activation: str | None = None,
    head_width: int | None = None,
    text_head_width: int | None = None,
) -> Plan:
    """A CLIP of open_clip (ViT) as a PixCLIP whose mask projection is zero.

    What no tensor shows is read from `open_clip_config.json` beside the checkpoint, as repositories on the Hub have
    it; arguments rule over that, and without either open_clip's defaults are taken.

    Args:
        checkpoint: a state dict, or a training checkpoint of open_clip.
        activation: `"gelu"` (the default) or `"quick_gelu"` (models named so, and those from OpenAI's weights).
        head_width, text_head_width: channels of an attention head in each tower; 64 by default (but 80 in the image
            tower of H/14, 88 in g/14, 104 in bigG/14). A text tower whose settings name no `heads` has 8.

    Raises:
        ValueError: a file of another kind, one whose shapes contradict each other or `open_clip_config.json`, or
            settings of another architecture.
    """
    check_source(checkpoint, "open-clip")
    path = checkpoint.path.with_name(OPEN_CLIP_SETTINGS)
    settings = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    model = settings.get("model_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for name, given in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        if unknown := sorted(set(given) - KNOWN[name]):
            raise ValueError(
                f"{OPEN_CLIP_SETTINGS}: {name} has settings of another architecture: {', '.join(unknown)}."
            )
    if activation is None:
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if head_width is None:
        head_width = vision.get("head_width", HEAD_WIDTH)
    if text_head_width is None:
        _, width = checkpoint.shape("token_embedding.weight", 2)
        text_head_width = width // text.get("heads", TEXT_HEADS) if settings else HEAD_WIDTH
    plan = plan_towers(checkpoint, activation, head_width, text_head_width)
    _check_settings(plan.config, model, vision, text)
    preprocessing = settings.get("preprocess_cfg", {})
    plan.image_mean, plan.image_std = preprocessing.get("mean"), preprocessing.get("std")
    if settings:
        plan.notes.append(f"{OPEN_CLIP_SETTINGS} beside the checkpoint agrees with the weights")
    return plan


def _check_settings(config: dict[str, Any], *settings: dict[str, Any]) -> None:
    vision, text = config["vision_config"], config["text_config"]
    shown = (
        {"embed_dim": config["projection_dim"]},
        {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
        },
        {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
        },
    )
    for given, found in zip(settings, shown, strict=True):
        for name in given.keys() & found.keys():
            if given[name] != found[name]:
                raise ValueError(f"{OPEN_CLIP_SETTINGS} says {name} {given[name]}, the weights say {found[name]}.")
