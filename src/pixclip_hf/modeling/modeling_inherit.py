"""Weights inherited from existing towers: a CLIP, SigLIP, DINO, ViT or region model on the image side, any text model
on the other."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_region_text import pooled_width
from .modeling_adapters import AdapterRegistry
from .modeling_lean import laid_out, load_converted, model_of_weights, plain_weights, take_over
from .modeling_stored import read_weights
from .modeling_text import TEXT_ADAPTERS, announce_own_code
from .modeling_vision import VISION_ADAPTERS

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")
MAIN_INPUTS = {"vision": "pixel_values", "text": "input_ids"}
EXPECTED = {
    "vision": "a CLIP, SigLIP, SigLIP2, DINOv2, DINOv3 or ViT checkpoint (or a CLOC or PixCLIP)",
    "text": "a CLIP or SigLIP text tower, a text encoder or a decoder",
}
ADAPTERS: dict[str, AdapterRegistry[Any]] = {"vision": VISION_ADAPTERS, "text": TEXT_ADAPTERS}


@dataclass
class Source:
    """A checkpoint that one side of a model comes from, its weights not read yet.

    Args:
        layout: the checkpoint's model, see [`laid_out`].
        composite: whether the tower is a part of the checkpoint's model.
        positions: rows of the tower's learned position embeddings; None where it has none that can be resized.
    """

    side: str
    name: str
    hub_kwargs: dict[str, Any]
    layout: PreTrainedModel
    config: PreTrainedConfig
    tower_config: PreTrainedConfig
    composite: bool
    positions: int | None

    @property
    def adapter(self) -> Any:
        """What is special about the tower: a [`VisionAdapter`] or [`TextAdapter`]."""
        return ADAPTERS[self.side].of(self.tower_config)

    def tower(self, whole: PreTrainedModel) -> PreTrainedModel:
        return getattr(whole, f"{self.side}_model") if self.composite else whole

    def projection(self, whole: PreTrainedModel) -> nn.Linear | None:
        """The projection behind the tower, if the checkpoint has one that is linear."""
        found = getattr(whole, "visual_projection" if self.side == "vision" else "text_projection", None)
        return found if self.composite and isinstance(found, nn.Linear) else None


class Tower(NamedTuple):
    """A loaded tower and, if its checkpoint has them, the projection behind it (D_out, width), the temperature and the
    bias of the logits."""

    model: PreTrainedModel
    projection: Tensor | None
    log_scale: Tensor | None
    logit_bias: Tensor | None


def read_source(side: str, name: str, hub_kwargs: dict[str, Any], whole: PreTrainedModel | None = None) -> Source:
    """What a checkpoint's configuration says.

    Args:
        side: `"vision"` or `"text"`.
        name: folder or Hub id of a composite CLIP or SigLIP, or of a single tower.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
        whole: the checkpoint's model, see [`laid_out`], if the other side of the new model comes from it too.

    Raises:
        ValueError: the checkpoint has no tower for that side.
    """
    config = AutoConfig.from_pretrained(name, **hub_kwargs)
    refusal = ValueError(f"`{side}` must name {EXPECTED[side]}, got {name!r}, a {config.model_type!r} checkpoint.")
    if type(config) not in MODEL_MAPPING:
        raise refusal
    model_class = AutoModel
    with_projection = ADAPTERS[side].of(config).with_projection
    if with_projection in (config.architectures or ()):
        # `AutoModel` would leave the projection behind.
        model_class = getattr(transformers, with_projection)
    if whole is None:
        # To see what it is before any weight is read.
        whole = laid_out(AutoModel.from_config if model_class is AutoModel else model_class, config)
    tower_config = getattr(config, f"{side}_config", None)
    composite = tower_config is not None or model_class is not AutoModel
    tower_config = tower_config or config
    tower = getattr(whole, f"{side}_model", None) if composite else whole
    if (
        tower is None
        or tower.main_input_name != MAIN_INPUTS[side]
        or type(tower_config) not in MODEL_MAPPING
        or tower_config.is_encoder_decoder
        or (side == "vision" and not _has_a_grid(tower_config))
    ):
        raise refusal
    positions = tower.state_dict().get(ADAPTERS[side].of(tower_config).positions)
    return Source(
        side,
        name,
        hub_kwargs,
        whole,
        config,
        tower_config,
        composite,
        None if positions is None else positions.shape[-2],
    )


def _has_a_grid(config: PreTrainedConfig) -> bool:
    """Whether a vision tower has one square grid of patches, or takes images on grids of their own."""
    square = all(isinstance(getattr(config, name, None), int) for name in ("image_size", "patch_size"))
    return square or VISION_ADAPTERS.of(config).takes_patches


def load_weights(source: Source, dtype: torch.dtype | str, beside: Source | None = None) -> PreTrainedModel:
    """The checkpoint's model with the weights of its tower, and of all that may be inherited with it.

    The task head of a single tower (`lm_head` of a `...ForCausalLM`) is left behind, and a tower's `pooler` may be
    missing, as it is in masked language models: the pooled states never come from it.

    Args:
        source: the checkpoint. Where nothing has to be done with its weights, its layout takes them, and what is
            not needed of them stays unread.
        dtype: the type that the weights will have, or `"auto"`.
        beside: the other side of the new model if it comes from the same checkpoint: its tower is read too.

    Raises:
        ValueError: the checkpoint lacks weights of its model, has some that the model does not know, or has some in
            another shape.
    """
    plain = plain_weights(source.layout, source.name, dtype, source.hub_kwargs)
    if plain is not None and not _unexpected(source, source.layout, plain[1]):
        assert isinstance(dtype, torch.dtype)  # `plain_weights` takes no other
        weights, left_over = plain
        if left_over:
            logger.warning(f"These weights of {source.name!r} are left behind: {', '.join(sorted(left_over))}.")
        parts = [source] if beside is None else [source, beside]
        needed = {name: weight for name, weight in weights.items() if any(_inherits(part, name) for part in parts)}
        take_over(source.layout, read_weights(needed, dtype))
        return source.layout
    options: Any = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_converted(type(source.layout), source.name, source.config, dtype, source.hub_kwargs, **options)
    missing = info["missing_keys"]
    if not source.composite:
        missing = [name for name in missing if not name.startswith(source.adapter.optional_weights)]
    unexpected = _unexpected(source, model, info["unexpected_keys"])
    _check(source.name, type(model).__name__, missing, unexpected, info["mismatched_keys"])
    return model


def _unexpected(source: Source, model: PreTrainedModel, left_over: Iterable[str]) -> list[str]:
    """What is left over in a checkpoint besides the task head of a single tower."""
    if source.composite or type(model).__name__ in (source.config.architectures or [type(model).__name__]):
        return list(left_over)
    children, prefix = dict(model.named_children()), f"{model.base_model_prefix}."
    return [name for name in left_over if name.removeprefix(prefix).split(".")[0] in children]


def _inherits(source: Source, name: str) -> bool:
    """Whether a weight of the checkpoint is one of those that [`take_tower`] takes."""
    if not source.composite:
        return True
    parts = [f"{source.side}_model", "logit_scale", "logit_bias"]
    if source.projection(source.layout) is not None:
        parts.append("visual_projection" if source.side == "vision" else "text_projection")
    return name.split(".")[0] in parts


def take_tower(source: Source, whole: PreTrainedModel) -> Tower:
    """A source's tower and what lies behind it, out of its loaded model."""
    model = source.tower(whole)
    projection = source.projection(whole)
    weight = None if projection is None else projection.weight
    if weight is None and not source.adapter.projects:
        # The family compares what its towers pool: no projection is the identity.
        width = model.config.hidden_size if source.side == "vision" else pooled_width(model.config)
        weight = torch.eye(width, dtype=model.dtype)
    scale = getattr(whole, "logit_scale", None)
    # A region model keeps both in a module of its own.
    both = (getattr(scale, "log_scale", scale), getattr(scale, "bias", getattr(whole, "logit_bias", None)))
    log_scale, bias = (value if isinstance(value, Tensor) else None for value in both)
    return Tower(model, weight, log_scale, bias)


def inherited(layout: PreTrainedModel, part: str, tower: PreTrainedModel, new: tuple[str, ...]) -> dict[str, Tensor]:
    """A tower's weights by their names in a new model, whose learned positions may be more or fewer. No weight is
    copied.

    Args:
        layout: the new model, see [`laid_out`].
        part: name of its tower.
        tower: where the weights are.
        new: endings of the parameter names that the tower cannot have.

    Raises:
        ValueError: any other parameter is missing or left over.
    """
    target, state = getattr(layout, part).state_dict(), tower.state_dict()
    adapter = ADAPTERS[part.removesuffix("_model")].of(tower.config)
    if (positions := adapter.positions) in state:
        state[positions] = adapter.resize_positions(state[positions], target[positions].shape)
    for name in [name for name in state if name not in target and name.startswith(adapter.optional_weights)]:
        del state[name]
    missing = [name for name in target if name not in state and not name.endswith(new)]
    _check(type(tower).__name__, part, missing, [name for name in state if name not in target])
    return {f"{part}.{name}": weight for name, weight in state.items()}


def inherited_projection(layout: PreTrainedModel, name: str, weight: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint's projection by its name in a new model if it has one of the same shape; warns otherwise."""
    projection = getattr(layout, name)
    if weight is not None and isinstance(projection, nn.Linear) and projection.weight.shape == weight.shape:
        return {f"{name}.weight": weight}
    logger.warning(f"`{name}` starts from random weights: the checkpoint has none of this shape.")
    return {}


def _check(source: str, target: str, missing: Any, unexpected: Any, mismatched: Any = ()) -> None:
    if missing or unexpected or mismatched:
        shapes = [f"{name} {tuple(found)} for {tuple(expected)}" for name, found, expected in sorted(mismatched)]
        raise ValueError(
            f"The weights of {source!r} do not fit {target}: missing {sorted(missing)}, left over "
            f"{sorted(unexpected)}, of another shape {shapes}."
        )


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return dtype or torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point dtype, its name or 'auto', got {dtype!r}.")
    return found


def _common_dtype(sources: list[Source | None]) -> torch.dtype | str:
    """The widest of the types that the checkpoints' configurations name; "auto" where one of them names none."""
    found = [source.config.dtype for source in sources if source is not None]
    return "auto" if None in found else reduce(torch.promote_types, found)


def _image_size(source: Source, image_size: int | None) -> int:
    own, patch = source.tower_config.image_size, source.tower_config.patch_size
    if image_size is None:
        return source.adapter.whole_image_size(source.tower_config)
    if not isinstance(image_size, int) or image_size < patch or image_size % patch:
        raise ValueError(f"`image_size` must be a multiple of the patch size {patch}, got {image_size!r}.")
    if image_size != own and source.positions is None and not source.adapter.takes_any_size:
        raise ValueError(
            f"`image_size` must stay {own} for a {source.tower_config.model_type!r} tower, got {image_size}."
        )
    return image_size


def _text_positions(source: Source, count: int) -> int:
    if source.positions is None:
        raise ValueError(
            "`max_position_embeddings` can be changed in CLIP text towers, whose positions are learned; got "
            f"{count!r} for {source.name!r}, a {source.tower_config.model_type!r} tower."
        )
    kept = source.adapter.kept_positions
    if not isinstance(count, int) or count < source.positions or source.positions <= kept + 1:
        raise ValueError(
            f"`max_position_embeddings` must be at least the tower's own {source.positions}, and these more than "
            f"{kept + 1}, got {count!r}."
        )
    return count


def _projection_dim(source: Source) -> dict[str, int]:
    found = getattr(source.config, "projection_dim", None)
    if found is None and not source.adapter.projects:
        found = source.tower_config.hidden_size
    return {} if found is None else {"projection_dim": found}


def _text_fields(source: Source | None, is_whole: bool) -> dict[str, Any]:
    """How a checkpoint reads its text tower and, where the whole of it is inherited, what it was trained with."""
    if source is None:
        return {}
    config, names = source.config, ("text_pooling", "bidirectional")
    trained = ("contrastive_objective", "logit_bias_init_value", "equal_texts") if is_whole else ()
    if hasattr(config, "text_pooling"):  # a region model
        return {name: getattr(config, name) for name in (*names, *trained)}
    own = {} if source.adapter.projects else {"text_projection": "linear"}
    return own | ({"contrastive_objective": source.adapter.objective} if is_whole else {})


class Towers(NamedTuple):
    """The checkpoints of a model that is to be built, and its configuration."""

    vision: Source
    text: Source | None
    # Whether both are one checkpoint, whose towers have met.
    same: bool
    config: Any


def read_towers(
    config_class: Any,
    vision: str,
    text: str | None,
    image_size: int | None = None,
    max_position_embeddings: int | None = None,
    revision: str = "main",
    vision_revision: str | None = None,
    text_revision: str | None = None,
    **kwargs: Any,
) -> Towers:
    """What the configurations of two towers say, and that of a region model with both; no weight is read.

    Args and errors: see [`PixCLIPModel.from_vision_text_pretrained`].
    """
    hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    unknown = set(kwargs) - {field.name for field in fields(config_class)} - {"attn_implementation"}
    if unknown:
        raise TypeError(f"{config_class.__name__} has no fields {', '.join(map(repr, sorted(unknown)))}.")
    vision_kwargs = hub_kwargs | {"revision": vision_revision or revision}
    text_kwargs = hub_kwargs | {"revision": text_revision or revision}
    same = text == vision and text_kwargs == vision_kwargs
    vision_source = read_source("vision", vision, vision_kwargs)
    vision_config = vision_source.tower_config.to_dict()
    text_source = text_config = None
    if text is not None:
        text_source = read_source("text", text, text_kwargs, vision_source.layout if same else None)
        text_config = text_source.tower_config.to_dict()
    if not vision_source.adapter.takes_patches:
        vision_config["image_size"] = _image_size(vision_source, image_size)
    elif image_size is not None:
        raise ValueError(
            f"`image_size` must be None for a {vision_source.tower_config.model_type!r} tower, which takes images of "
            f"any size, got {image_size!r}."
        )
    if max_position_embeddings is not None:
        if text_source is None:
            raise ValueError("`max_position_embeddings` needs a text tower, got `text=None`.")
        text_config["max_position_embeddings"] = _text_positions(text_source, max_position_embeddings)
    config = config_class(
        vision_config=vision_config,
        text_config=text_config,
        **(_projection_dim(vision_source) | _text_fields(text_source, same) | kwargs),
    )
    return Towers(vision_source, text_source, same, config)


def model_from_towers(
    model_class: Any,
    vision: str,
    text: str | None,
    new: tuple[str, ...],
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A region model of `model_class` with the weights of two towers, and a configuration made of theirs.

    Configurations are read and the model is laid out before any weight is read, so that what cannot fit fails at once.
    Every weight is held once: the model takes over the tensors of the loaded towers.

    Args:
        vision, text: see [`read_source`]; no text tower when `text` is None.
        new: endings of the vision tower's parameter names that only the new model has.
        kwargs: see [`PixCLIPModel.from_vision_text_pretrained`], as is `dtype`.
    """
    dtype = _check_dtype(dtype)
    vision_source, text_source, same, config = read_towers(model_class.config_class, vision, text, **kwargs)
    if dtype == "auto":
        dtype = _common_dtype([vision_source, text_source])
    layout = _lay_out(model_class, config, dtype)

    whole = load_weights(vision_source, dtype, text_source if same else None)
    towers = {"vision_model": take_tower(vision_source, whole)}
    if text_source is not None and not same:
        # What the first checkpoint has beside its tower is let go before the second is read.
        whole = None
        whole = load_weights(text_source, dtype)
    if text_source is not None:
        towers["text_model"] = take_tower(text_source, whole)
        if kwargs.get("bidirectional") is None:
            announce_own_code(towers["text_model"].model, text_source.config, text)
    whole = None
    if dtype == "auto":
        dtype = reduce(torch.promote_types, (tower.model.dtype for tower in towers.values()))
        for tower in towers.values():
            tower.model.to(dtype)
        layout = _lay_out(model_class, config, dtype)

    state: dict[str, Tensor] = {}
    aligned = []
    for part, tower in towers.items():
        state |= inherited(layout, part, tower.model, new if part == "vision_model" else ())
        projection = "visual_projection" if part == "vision_model" else "text_projection"
        weight = inherited_projection(layout, projection, tower.projection)
        state |= weight
        aligned.append(bool(weight))
    if same and all(aligned):
        for name, field_name, value in (
            ("log_scale", "logit_scale_init_value", towers["vision_model"].log_scale),
            ("bias", "logit_bias_init_value", towers["vision_model"].logit_bias),
        ):
            if field_name not in kwargs and getattr(layout.logit_scale, name) is not None and value is not None:
                state[f"logit_scale.{name}"] = value.detach().reshape(())
    towers.clear()
    return model_of_weights(layout, state)


def _lay_out(model_class: Any, config: Any, dtype: torch.dtype | str) -> PreTrainedModel:
    """A new model, see [`laid_out`], of the default type where its checkpoints are still to tell which ("auto")."""
    options = {} if dtype == "auto" else {"dtype": dtype}
    return laid_out(partial(model_class._from_config, **options), config)
