"""LoRA on the text tower, through PEFT."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ATTENTION_PROJECTIONS = r"text_model\..*\.(q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value)"


def add_lora(
    model: PreTrainedModel, r: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: str | None = None
) -> PeftModel:
    """Freezes the text tower and gives it adapters; the rest of the model trains in full and is saved with them.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`] with a text tower.
        r, alpha, dropout: of the adapters.
        target_modules: regular expression that a module's whole name must match; the attention projections of the text
            tower when not given.

    Returns:
        The model wrapped by PEFT: `save_pretrained` writes an adapter folder, which `AutoModel.from_pretrained` loads,
        and `merge_and_unload()` gives the plain model back.

    Raises:
        ValueError: no text tower, or no module that matches.
    """
    if model.text_model is None:
        raise ValueError("`model` has no text tower (`config.text_config` is None): there is nothing to adapt.")
    others = [
        name
        for name, child in model.named_children()
        if name != "text_model" and next(child.parameters(), None) is not None
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=target_modules or ATTENTION_PROJECTIONS,
            modules_to_save=others,
        ),
    )
