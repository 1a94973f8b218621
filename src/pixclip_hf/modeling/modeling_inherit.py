"""Weights inherited from existing towers: a CLIP or SigLIP on the image side, any text model on the other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class Tower(NamedTuple):
    """A loaded tower and, if its checkpoint has one, the projection behind it (D_out, width)."""

    model: PreTrainedModel
    projection: Tensor | None


def load_tower(name_or_path: str, side: str, dtype: torch.dtype, **hub_kwargs: Any) -> Tower:
    """One tower of a checkpoint.

    Args:
        name_or_path: folder or Hub id of a composite CLIP or SigLIP, or of a single tower.
        side: `"vision"` or `"text"`.
        dtype: of the weights.
        hub_kwargs: `revision`, `token`, `cache_dir` and the like.

    Returns:
        The tower. The task head of a single tower (`lm_head` of a `...ForCausalLM`) is left behind, and a text tower's
        `pooler` may be missing, as it is in masked language models: the pooled states never come from it.

    Raises:
        ValueError: the checkpoint lacks weights of the tower, or has some that the tower does not know.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    composite = getattr(config, f"{side}_config", None)
    if composite is None:
        model, info = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **hub_kwargs)
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
        if side == "text":
            missing = [name for name in missing if not name.startswith("pooler.")]
        if _has_task_head(config, model):
            children = dict(model.named_children())
            unexpected = [
                name
                for name in unexpected
                if name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in children
            ]
        _check(name_or_path, f"{side} tower", missing, unexpected)
        return Tower(model, None)
    whole, info = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **hub_kwargs)
    _check(name_or_path, config.model_type, info["missing_keys"], info["unexpected_keys"])
    projection = getattr(whole, "visual_projection" if side == "vision" else "text_projection", None)
    return Tower(getattr(whole, f"{side}_model"), projection.weight if isinstance(projection, nn.Linear) else None)


def _has_task_head(config: Any, model: PreTrainedModel) -> bool:
    # A projection is no head to drop: `CLIPVisionModelWithProjection` is refused, and its composite loads.
    names = config.architectures or []
    return bool(names) and type(model).__name__ not in names and not any("WithProjection" in name for name in names)


def inherit(model: nn.Module, part: str, tower: PreTrainedModel, new: tuple[str, ...] = ()) -> None:
    """Copies a tower's weights into the same tower of a new model.

    Args:
        model: the new model.
        part: name of its tower.
        tower: where the weights are.
        new: endings of the parameter names that the tower cannot have.

    Raises:
        ValueError: any other parameter is missing or left over.
    """
    result = getattr(model, part).load_state_dict(tower.state_dict(), strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(new)] if new else result.missing_keys
    _check(type(tower).__name__, part, missing, result.unexpected_keys)


def inherit_projection(projection: nn.Module, weight: Tensor | None, name: str) -> None:
    """Copies a checkpoint's projection, where it has one of the same shape; says so where it has not."""
    if weight is not None and isinstance(projection, nn.Linear) and projection.weight.shape == weight.shape:
        with torch.no_grad():
            projection.weight.copy_(weight)
    else:
        logger.warning(f"`{name}` starts from random weights: the checkpoint has none of this shape.")


def _check(source: str, target: str, missing: Any, unexpected: Any) -> None:
    if missing or unexpected:
        raise ValueError(
            f"The weights of {source!r} do not fit {target}: missing {sorted(missing)}, "
            f"left over {sorted(unexpected)}."
        )


def model_from_towers(
    model_class: Any, config_class: Any, vision: str, text: str | None, new: tuple[str, ...], **kwargs: Any
) -> PreTrainedModel:
    """A region model of `model_class` with the weights of two towers, and a configuration made of theirs.

    Args:
        vision, text: see [`load_tower`]; no text tower when `text` is None.
        new: endings of the vision tower's parameter names that only the new model has.
        kwargs: `dtype` (float32 when not given), Hub arguments (`revision`, `token`, `cache_dir`, `local_files_only`),
            and fields of the configuration.
    """
    dtype = kwargs.pop("dtype", None) or torch.float32
    hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    vision_tower = load_tower(vision, "vision", dtype, **hub_kwargs)
    text_tower = None if text is None else load_tower(text, "text", dtype, **hub_kwargs)
    if "projection_dim" not in kwargs and vision_tower.projection is not None:
        kwargs["projection_dim"] = len(vision_tower.projection)
    text_config = None if text_tower is None else text_tower.model.config.to_dict()
    config = config_class(vision_config=vision_tower.model.config.to_dict(), text_config=text_config, **kwargs)
    # Built in its dtype and not cast: a cast would take the rotary frequencies of an LLM along.
    model = model_class._from_config(config, dtype=dtype)
    inherit(model, "vision_model", vision_tower.model, new)
    inherit_projection(model.visual_projection, vision_tower.projection, "visual_projection")
    if text_tower is not None:
        inherit(model, "text_model", text_tower.model)
        inherit_projection(model.text_projection, text_tower.projection, "text_projection")
    return model.eval()
