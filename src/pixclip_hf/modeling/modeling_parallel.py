"""What `Trainer` and data parallelism expect of a model that returns its own loss."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def returns_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Declares of a forward pass that it returns a loss by itself where its batch has the texts for one.

    `Trainer` reads this from the signature, and without it evaluates no loss of batches that do not ask for one. The
    signature therefore has True as the default of `return_loss`. Left out, the argument is None all the same.
    """
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(default=True) if parameter.name == "return_loss" else parameter
        for parameter in signature.parameters.values()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def with_every_parameter(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss, with a gradient of zero for the parameters that it does not depend on, where they must have one.

    `Trainer` lets DistributedDataParallel expect a gradient of every parameter once a model recomputes its
    activations. Without captions the head of the image embeddings has none, and the pooler of a text tower never has
    one. In any other run they stay without a gradient, and an optimizer leaves them as they are.
    """
    recomputes = getattr(model, "is_activation_checkpointing", False)
    if not (recomputes and model.training and loss.requires_grad and torch.distributed.is_available()):
        return loss
    if torch.compiler.is_compiling() or not torch.distributed.is_initialized():
        return loss
    reached = leaves_of(loss)
    unused = [
        parameter
        for parameter in model.parameters()
        # Sharded parameters are reduced with their module, whether they are used or not.
        if parameter.requires_grad and parameter not in reached and not hasattr(parameter, "device_mesh")
    ]
    return loss + 0 * sum(parameter.flatten()[0] for parameter in unused)


def leaves_of(loss: Tensor) -> set[Tensor]:
    """The tensors that the backward pass of a loss gives a gradient to."""
    leaves, seen, found = set(), set(), [loss.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        found += [following for following, _ in node.next_functions]
    return leaves
