"""GradCache (Gao et al. 2021): the contrastive loss of a large batch with the activations of a part of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """State of the random generators of the CPU and of the devices of `batch`."""

    def __init__(self, batch: Mapping[str, Any]):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*batch.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Starts from this state; leaves the generators as they were."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def split_batch(batch: Mapping[str, Any], chunks: int) -> list[dict[str, Any]]:
    """Parts of a batch, of (nearly) equally many images; as many as it has images when `chunks` are more."""
    size = -(-len(batch["pixel_values"]) // chunks)
    parts = {name: value.split(size) for name, value in batch.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in batch.items() if name not in parts}
    return [{**others, **dict(zip(parts, values, strict=True))} for values in zip(*parts.values(), strict=True)]


def cached_backward(
    model: nn.Module,
    inner: nn.Module,
    batch: Mapping[str, Any],
    chunks: int,
    loss_of: Callable[[nn.Module, Any, Mapping[str, Any]], Tensor],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
) -> tuple[Tensor, Any]:
    """Loss and gradients of a batch, holding the activations of one chunk at a time.

    1. All chunks pass without a graph; `loss_of` sees their representations as one output and yields the gradient of
       each, and of the parameters that only the loss reads (the temperatures).
    2. The chunks pass again with a graph and the same random numbers, and go back from these gradients.

    Equal to one pass of the batch in value and gradient. The loss is computed, and its parameters take part, inside of
    forward passes: there a model sharded by FSDP holds whole parameters, and DistributedDataParallel sees them used.

    Under FSDP every rank needs as many chunks, for each pass gathers parameters; accelerate's loaders give all ranks
    as many images.

    Args:
        model: what is called; may be wrapped for data parallelism.
        inner: the module inside that returns the output, a [`RegionTextOutput`].
        batch: a batch of the collator, whose tensors have one entry per image.
        chunks: number of parts.
        loss_of: from the inner module, the joined output and the batch to the loss.
        backward: in place of `Tensor.backward`.
        no_sync: context in which a backward pass is not reduced over the ranks.

    Returns:
        The loss, detached, and the joined output.
    """
    parts = split_batch(batch, chunks)
    states, outputs, result = [], [], {}

    def keep(module: nn.Module, output: Any) -> None:
        outputs.append({name: output[name] for name in output.representations() if output.get(name) is not None})
        if len(outputs) == len(parts):
            result.update(_gradients(module, type(output), outputs, batch, loss_of))

    with torch.no_grad():
        for part in parts:
            states.append(RandomState(part))
            _forward(model, inner, part, keep)

    start = 0
    for index, (part, state) in enumerate(zip(parts, states, strict=True)):
        rows = slice(start, start := start + len(part["pixel_values"]))
        last = index == len(parts) - 1

        def lead(module: nn.Module, output: Any, rows: slice = rows, last: bool = last) -> None:
            # Its gradient is that of the loss.
            terms = [(output[name] * gradient[rows]).sum() for name, gradient in result["rows"].items()]
            if last:
                parameters = dict(module.named_parameters())
                terms += [(parameters[name] * gradient).sum() for name, gradient in result["parameters"].items()]
            output.loss = sum(terms)

        with nullcontext() if last else no_sync():
            with state.replayed():
                output = _forward(model, inner, part, lead)
            backward(output.loss)
    return result["loss"], result["output"]


def _forward(
    model: nn.Module, inner: nn.Module, batch: Mapping[str, Any], hook: Callable[[nn.Module, Any], None]
) -> Any:
    handle = inner.register_forward_hook(lambda module, args, output: hook(module, output), prepend=True)
    try:
        return model(**{**batch, "return_loss": False})
    finally:
        handle.remove()


@torch.enable_grad()
def _gradients(
    module: nn.Module,
    output_class: type,
    outputs: list[dict[str, Tensor]],
    batch: Mapping[str, Any],
    loss_of: Callable[[nn.Module, Any, Mapping[str, Any]], Tensor],
) -> dict[str, Any]:
    joined = output_class(**{name: torch.cat([output[name] for output in outputs]) for name in outputs[0]})
    leaves = {name: rows.requires_grad_() for name, rows in joined.items() if rows.is_floating_point()}
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    loss = loss_of(module, joined, batch)
    found = torch.autograd.grad(loss, [*leaves.values(), *parameters.values()], allow_unused=True)
    gradients = {name: value for name, value in zip([*leaves, *parameters], found, strict=True) if value is not None}
    return {
        "loss": loss.detach(),
        "output": joined,
        "rows": {name: value for name, value in gradients.items() if name in leaves},
        "parameters": {name: value for name, value in gradients.items() if name in parameters},
    }
