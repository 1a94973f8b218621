"""What both configurations accept, and the checks that name a wrong value."""

from typing import Any

from transformers import AutoConfig

from .configuration_eva02 import Eva02VisionConfig

# Here and not only in the package, so that a folder's own code knows the tower too.
AutoConfig.register(Eva02VisionConfig.model_type, Eva02VisionConfig, exist_ok=True)

TEXT_POOLINGS = ("mean", "last", "eos", "cls")
TEXT_PROJECTIONS = ("linear", "mlp_adapter")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` naming the field, its value and the choices, unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_tile_size(value: int | None) -> None:
    """Raises `ValueError` unless `contrastive_tile_size` is None, 0 or positive."""
    if value is not None and value < 0:
        raise ValueError(f"`contrastive_tile_size` must not be negative, got {value}.")


def check_towers(config: Any) -> None:
    """Checks the two tower configurations of a region model's configuration and fills `text_hidden_size`.

    Raises:
        ValueError: a vision configuration without a square patch grid, a composite configuration where a tower's is
            expected, or no text tower and no `text_hidden_size`.
    """
    vision, text = config.vision_config, config.text_config
    if hasattr(vision, "vision_config"):
        raise ValueError(
            f"`vision_config` must be the configuration of a vision tower, got the composite {vision.model_type!r}: "
            "pass its `vision_config`."
        )
    for name in ("image_size", "patch_size"):
        value = getattr(vision, name, None)
        if not isinstance(value, int):
            raise ValueError(
                f"`vision_config.{name}` must be an int, got {value!r} in a {vision.model_type!r} configuration."
            )
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"`vision_config.image_size` ({vision.image_size}) must be a multiple of its `patch_size` "
            f"({vision.patch_size})."
        )
    if text is None:
        if not config.text_hidden_size:
            raise ValueError("`text_hidden_size` must be given when `text_config` is None, got None.")
        return
    if getattr(text, "text_config", None) is not None:
        raise ValueError(
            f"`text_config` must be the configuration of a text tower, got the composite {text.model_type!r}: "
            "pass its `text_config`."
        )
    if config.text_hidden_size not in (None, text.hidden_size):
        raise ValueError(
            f"`text_hidden_size` ({config.text_hidden_size}) contradicts `text_config.hidden_size` "
            f"({text.hidden_size})."
        )
    config.text_hidden_size = text.hidden_size
    if config.bidirectional:
        text.is_causal = False
