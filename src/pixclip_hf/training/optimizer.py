"""Parameter groups: which parameters learn at which rate, and which of them decay."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments

from .arguments import OptimizerArguments
from .muon import MuonAdamW

MASK_PROJECTION = (".mask_weight", ".mask_bias")
# Where the matrices of a part lie: in the blocks of a tower, which are numbered, and in the Prompter.
MATRICES = {
    "vision": re.compile(r"(?:^|\.)vision_model\..*\.\d+\."),
    "text": re.compile(r"(?:^|\.)text_model\..*\.\d+\."),
    "prompter": re.compile(r"(?:^|\.)prompter\."),
}
# What a tower computes before its first block.
BELOW_BLOCKS = re.compile(r"embed|cls_token|pre_layrnorm|\bw[tp]e\b")


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    vision_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    muon: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups for an optimizer.

    What the towers inherit learns at `learning_rate` times the scale of its tower, and `layer_decay` times slower with
    every block away from the tower's output (Bao et al. 2022, BEiT; as LLM2CLIP trains). Everything else is new and
    learns at the full rate: mask projection (Alpha-CLIP), Prompter, heads, projections, temperatures, LoRA adapters.

    Norms, biases, temperatures and embeddings (of tokens, positions, classes) do not decay.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`], plain or wrapped by PEFT, accelerate or `torch.compile`.
        learning_rate, weight_decay: the full rate, and the decay of the weights that decay.
        vision_lr_scale, text_lr_scale: rates of the towers relative to it; 0 leaves a tower as it is but still
            computes its gradients.
        layer_decay: 1 for the same rate in all blocks.
        muon: parts whose matrices step by Muon ([`MuonAdamW`]): `"vision"` and `"text"` for the blocks of a tower,
            and `"prompter"`. Adapters do not.

    Returns:
        Groups with `name`, `params`, `lr`, `weight_decay` and, where Muon steps, `muon`; the full rate first: it is
        the one that `Trainer` logs.

    Raises:
        ValueError: a negative scale, a `layer_decay` outside (0, 1], a part of `muon` that has no matrix to train, or
            a model without trainable parameters.
    """
    scales = {"vision_model": vision_lr_scale, "text_model": text_lr_scale}
    for name, scale in zip(("vision_lr_scale", "text_lr_scale"), scales.values(), strict=True):
        if not scale >= 0:
            raise ValueError(f"`{name}` must not be negative, got {scale}.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must lie in (0, 1], got {layer_decay}.")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inherited = _distances_to_output([name for name, _ in model.named_parameters()])
    groups: dict[tuple, dict[str, Any]] = {}
    seen: set[str | None] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate = "new", learning_rate
        if name in inherited:
            part, distance = inherited[name]
            rate = learning_rate * scales[part] * layer_decay**distance
        # Vectors are norms and biases; a class token or position table may come as (1, N, D).
        flat = parameter.ndim < 2 or (parameter.ndim > 2 and len(parameter) == 1)
        decay = 0.0 if flat or id(parameter) in embeddings else weight_decay
        settings = {"name": part, "lr": rate, "weight_decay": decay}
        if (matrix_of := _part_of_matrix(name, parameter)) in muon:
            settings["muon"] = True
            seen.add(matrix_of)
        groups.setdefault(tuple(settings.items()), {**settings, "params": []})["params"].append(parameter)
    if not groups:
        raise ValueError("`model` has no trainable parameter.")
    if missing := sorted(set(muon) - seen):
        raise ValueError(f"`muon` must name parts with matrices that train, got {missing} among {list(muon)}.")
    return sorted(groups.values(), key=lambda group: (group["name"] != "new", -group["lr"]))


def _part_of_matrix(name: str, parameter: nn.Parameter) -> str | None:
    """The part of the model whose layers a matrix ties together; none for what is no such matrix."""
    if parameter.ndim != 2 or ".lora_" in name:
        return None
    return next((part for part, place in MATRICES.items() if place.search(name)), None)


def _distances_to_output(names: list[str]) -> dict[str, tuple[str, int]]:
    """For each parameter that a tower inherits: the tower, and how many blocks it lies below the tower's output."""
    places: dict[str, tuple[str, int | None]] = {}
    depths = {"vision_model": 0, "text_model": 0}
    for name in names:
        found = re.search(r"(?:^|\.)(vision_model|text_model)\.", name)
        if found is None or name.endswith(MASK_PROJECTION) or ".lora_" in name:
            continue
        tower, block = found[1], re.search(r"\.(\d+)\.", name)
        places[name] = tower, int(block[1]) if block else None
        if block:
            depths[tower] = max(depths[tower], int(block[1]) + 1)
    distances = {}
    for name, (tower, place) in places.items():
        if place is not None:
            distances[name] = tower, depths[tower] - place
        else:
            distances[name] = tower, depths[tower] + 1 if BELOW_BLOCKS.search(name) else 0
    return distances


def optimizer_for(
    model: nn.Module, training: TrainingArguments, groups: OptimizerArguments
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer of `training` (`--optim`, betas, ...) on [`parameter_groups`], as `Trainer` takes it:
    `optimizer_cls_and_kwargs`. An optimizer that picks its parameters itself (GaLore, Dion) stays as it is.

    Raises:
        ValueError: rates by part for an optimizer that picks its parameters itself, Muon beside another optimizer than
            AdamW; see also [`parameter_groups`].
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    optim = getattr(training.optim, "value", training.optim)
    if not isinstance(optimizer_class, type) or options.keys() & {"params", "model", "optimizer_dict"}:
        if groups != OptimizerArguments():
            raise ValueError(f"`optim` {optim!r} picks its parameters itself, and takes no {groups}.")
        return optimizer_class, options
    options["params"] = parameter_groups(
        model,
        training.learning_rate,
        training.weight_decay,
        groups.vision_lr_scale,
        groups.text_lr_scale,
        groups.layer_decay,
        groups.muon or (),
    )
    if groups.muon:
        if optimizer_class is not AdamW:
            raise ValueError(f"`muon` takes AdamW beside it (`--optim adamw_torch`), got {optim!r}.")
        optimizer_class = MuonAdamW
    return optimizer_class, options
