"""What FSDP needs of a model: ranks that call every part equally often and, for FSDP2, parameters with a dimension,
which the temperatures lack."""

from typing import Any

from torch import Tensor, nn


def check_shardable(model: Any) -> None:
    """
    Raises:
        ValueError: a model whose ranks would call a part of it a different number of times, and wait for each other.
    """
    if model.takes_patches and getattr(model, "prompter", None) is not None:
        raise ValueError(
            "`fsdp` must be off for a CLOC with a vision tower of variable resolution: its Prompter is called once "
            "per grid of a batch, which is not equally often on every rank. Train it with DistributedDataParallel."
        )


def scalars_to_vectors(model: nn.Module) -> set[str]:
    """Gives every scalar parameter one dimension of one element, and returns their names."""
    names = {name for name, parameter in model.named_parameters() if not parameter.ndim}
    for name in names:
        path, _, leaf = name.rpartition(".")
        scalar = model.get_parameter(name)
        vector = nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)
        setattr(model.get_submodule(path), leaf, vector)
    return names


def vectors_to_scalars(state_dict: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The weights as a model has them that is not sharded."""
    return {name: value.reshape(()) if name in names else value for name, value in state_dict.items()}
