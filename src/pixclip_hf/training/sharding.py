"""What FSDP2 needs of a model: it does not shard parameters without a dimension, and the temperatures have none."""

from torch import Tensor, nn


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
