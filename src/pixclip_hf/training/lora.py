"""LoRA on the text tower, through PEFT."""

import re

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# What reads the states into an attention: queries, keys and values, one by one or fused (GPT-2 has c_attn, Phi-3
# qkv_proj, Falcon, BLOOM and GPT-NeoX query_key_value, MPT and ModernBERT Wqkv, DistilBERT q_lin).
INTO_ATTENTION = "q_proj|k_proj|v_proj|query|key|value|qkv_proj|query_key_value|c_attn|Wqkv|q_lin|k_lin|v_lin"
# What leads out of it, where a name says so: c_proj, Wo and dense are names of other layers too.
OUT_OF_ATTENTION = r"o_proj|out_proj|out_lin|attn\.c_proj|attn\.Wo|self_attention\.dense"
ATTENTION_PROJECTIONS = rf"text_model\.(?:.*\.)?({INTO_ATTENTION}|{OUT_OF_ATTENTION})"


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
        ValueError: no text tower, no linear layer of it that matches, or a match outside of it; without
            `target_modules`, a tower whose attention has projections of other names. The message lists the linear
            layers.
    """
    if model.text_model is None:
        raise ValueError("`model` has no text tower (`config.text_config` is None): there is nothing to adapt.")
    pattern = target_modules or ATTENTION_PROJECTIONS
    targets = _check_targets(model, pattern, given=target_modules is not None)
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
            # How GPT-2's layers keep their weights.
            fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in targets),
            modules_to_save=others,
        ),
    )


def _check_targets(model: PreTrainedModel, pattern: str, given: bool) -> list[str]:
    """The modules that a pattern matches."""
    matches = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if outside := [name for name in matches if not name.startswith("text_model.")]:
        raise ValueError(f"`target_modules` {pattern!r} must match modules of the text tower alone, got {outside}.")
    into = [name for name in matches if re.fullmatch(rf"(?:.*\.)?({INTO_ATTENTION})", name)]
    if matches and (given or into):
        return matches
    linear = {name for name, module in model.text_model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear})
    listed = f"the linear layers of the text tower are: {', '.join(f'text_model.{name}' for name in kinds)}."
    if matches:
        raise ValueError(
            f"No projection of queries, keys or values is known in a {model.text_model.config.model_type!r} tower: "
            f"`target_modules` (`--lora_target_modules`) must name them; {listed}"
        )
    raise ValueError(f"`target_modules` {pattern!r} matches no module. A module's whole name must match; {listed}")
