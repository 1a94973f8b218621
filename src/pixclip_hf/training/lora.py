"""LoRA on the text tower, through PEFT."""

import re

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

ATTENTION_PROJECTIONS = r"text_model\..*\.(q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value)"


def add_lora(
    model: PreTrainedModel, r: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: str | None = None
) -> PeftModel:
    """Freezes the text tower and gives it adapters; the rest of the model trains in full and is saved with them,
    except for parts that were frozen before.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`] with a text tower.
        r, alpha, dropout: rank, scale and dropout of the adapters.
        target_modules: regular expression that a module's whole name must match, of modules in the text tower; its
            attention projections when not given.

    Returns:
        The model wrapped by PEFT: `save_pretrained` writes an adapter folder and `merge_and_unload()` gives the plain
        model back. `AutoModel.from_pretrained` loads the folder if `model` was itself loaded from a folder or the Hub:
        the adapter names it as its base.

    Raises:
        ValueError: no text tower, no linear layer of it that matches, or a match outside of it.
    """
    if model.text_model is None:
        raise ValueError("`model` has no text tower (`config.text_config` is None): there is nothing to adapt.")
    pattern = target_modules or ATTENTION_PROJECTIONS
    _check_targets(model, pattern)
    others = [
        name
        for name, child in model.named_children()
        if name != "text_model" and any(parameter.requires_grad for parameter in child.parameters())
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=pattern,
            modules_to_save=others,
        ),
    )


def _check_targets(model: PreTrainedModel, pattern: str) -> None:
    matches = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if outside := [name for name in matches if not name.startswith("text_model.")]:
        raise ValueError(f"`target_modules` {pattern!r} must match modules of the text tower alone, got {outside}.")
    if not matches:
        linear = {name for name, module in model.text_model.named_modules() if isinstance(module, nn.Linear)}
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear})
        raise ValueError(
            f"`target_modules` {pattern!r} matches no module. A module's whole name must match; the linear layers of "
            f"the text tower are: {', '.join(f'text_model.{name}' for name in kinds)}."
        )
