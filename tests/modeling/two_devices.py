"""A second device where there is none: tensors that compute on the CPU and say that they lie elsewhere.

Inside of [`TwoDevices`], what is moved to or created on `OTHER` claims to lie there, and an operation over tensors of
both devices fails as it does on a machine that has two.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# A device that needs no library, unlike those of CUDA.
OTHER = torch.device("xla:1")


class Elsewhere(torch.Tensor):
    """A tensor whose values lie on the CPU and whose device is `OTHER`."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, strides=values.stride(), dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    device = property(lambda self: OTHER)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            return move(args[0], *args[1:], **(kwargs if function is torch.Tensor.to else {"device": "cpu"}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def move(tensor, *args, **kwargs):
    """`tensor.to(...)`, which would take the device of a tensor from where its values lie."""
    device, dtype = kwargs.get("device", tensor.device), kwargs.get("dtype", tensor.dtype)
    for given in args:
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        else:
            device = given
    values = here(tensor).to(dtype)
    return Elsewhere(values) if torch.device(device) == OTHER else values


def run(operation, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    moves = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    # As on a GPU, a number may come from the CPU, in a tensor without dimensions.
    if there and not moves and any(not isinstance(tensor, Elsewhere) and tensor.ndim for tensor in tensors):
        raise RuntimeError(f"{operation}: tensors on two devices.")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device) == OTHER
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(
        lambda leaf: leaf.values if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    results = operation(*plain_args, **plain_kwargs)
    written = operation._schema.arguments[0].alias_info if args else None
    if written is not None and written.is_write:
        return args[0]
    return tree_map(lambda leaf: Elsewhere(leaf) if there and isinstance(leaf, torch.Tensor) else leaf, results)


class TwoDevices(TorchDispatchMode):
    """Creates tensors for `OTHER`, too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def here(value):
    """The values of a tensor of either device."""
    return value.values if isinstance(value, Elsewhere) else value
