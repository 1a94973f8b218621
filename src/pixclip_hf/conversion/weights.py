"""Weights moved from a checkpoint's names to a model's, with an account of every one of them on both sides."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def _without_leading_ones(tensor: Tensor) -> tuple[Tensor]:
    while tensor.ndim > 1 and len(tensor) == 1:
        tensor = tensor[0]
    return (tensor,)


# A tensor of other dimensions comes back as it is, for its shape to be refused.
CHANGES = {
    "as it is": lambda tensor: (tensor,),
    "transposed": lambda tensor: (tensor.T if tensor.ndim == 2 else tensor,),
    "split in three": lambda tensor: tensor.chunk(3) if tensor.ndim else (tensor,),
    "leading axes of 1 dropped": _without_leading_ones,
}


class Move(NamedTuple):
    """A tensor of the source, the parameters that it becomes, and how: a key of `CHANGES`."""

    source: str
    targets: tuple[str, ...]
    how: str = "as it is"


@dataclass
class Plan:
    """What a source format makes of a checkpoint.

    Args:
        config: fields of the model's configuration.
        tensors: the source's, by the names that the moves use.
        moves: where each goes.
        left_out: source name -> why it goes nowhere.
        new: target name -> what it starts from, where the source has none.
        notes: what a reader of the report must know: what the file does not say and was taken from elsewhere.
        image_mean, image_std: the statistics of the image processor, for R, G and B; OpenAI's when None.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    moves: list[Move]
    left_out: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor that is moved without loss."""
        moved = {self.tensors[move.source].dtype for move in self.moves if move.source in self.tensors}
        return reduce(torch.promote_types, moved)


def pairs(source: str, target: str, *names: str) -> list[Move]:
    """Moves of the parameters `names` of one module into another."""
    return [Move(f"{source}.{name}", (f"{target}.{name}",)) for name in names]


def fill(layout: nn.Module, plan: Plan, allow: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Carries out a plan.

    Args:
        layout: the model that is to have the weights, of the dtype that they are to have; it needs no memory.
        allow: patterns (`*`, `?`) of source names that may go nowhere, and of target names that may start anew.

    Returns:
        The model's weights by name, those of the source themselves where nothing about them changes; the plan gives
        its tensors away. And the account: `sources`, name -> `{"shape", "dtype", "targets", "how"}`, and `targets`,
        name -> `{"shape", "source", "how"}`.

    Raises:
        ValueError: a tensor is left over, missing or of the wrong shape. All of them are listed.
    """
    state = layout.state_dict()
    sources: dict[str, Any] = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "targets": []}
        for name, tensor in plan.tensors.items()
    }
    targets: dict[str, Any] = {}
    wrong = []
    for source, names, how in plan.moves:
        if source not in plan.tensors:
            continue
        tensors = CHANGES[how](plan.tensors[source])
        expected = [tuple(state[name].shape) if name in state else None for name in names]
        if not plan.tensors[source].is_floating_point() or [tuple(tensor.shape) for tensor in tensors] != expected:
            wrong.append(
                f"{source} {tuple(plan.tensors[source].shape)} {sources[source]['dtype']}, {how}, "
                f"to {', '.join(map(str, names))} {', '.join(map(str, expected))}"
            )
        sources[source] |= {"targets": list(names), "how": how}
        for part, (name, tensor) in enumerate(zip(names, tensors, strict=False), start=1):
            which = how if len(names) == 1 else f"{how}, part {part}"
            targets[name] = {"shape": list(tensor.shape), "source": source, "how": which}
    for name, why in plan.left_out.items():
        sources[name]["how"] = why
    for name, why in plan.new.items():
        targets[name] = {"shape": list(state[name].shape), "source": None, "how": why}
    left_over = [name for name, entry in sources.items() if "how" not in entry]
    missing = [name for name in state if name not in targets]
    for name in [name for name in left_over if _matches(name, allow)]:
        sources[name]["how"] = "left over, allowed"
        left_over.remove(name)
    for name in [name for name in missing if _matches(name, allow)]:
        targets[name] = {"shape": list(state[name].shape), "source": None, "how": "missing, allowed: as initialized"}
        missing.remove(name)
    if left_over or missing or wrong:
        origin = {name: move.source for move in plan.moves for name in move.targets}
        missing = [f"{name} (from {origin[name]})" if name in origin else name for name in missing]
        parts = (("left over in the checkpoint", left_over), ("missing", missing), ("of another shape or type", wrong))
        raise ValueError(
            "The checkpoint does not fit: "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
        )
    for name in set(plan.tensors) - {move.source for move in plan.moves}:
        del plan.tensors[name]
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for source, names, how in plan.moves:
        if source not in plan.tensors:
            continue
        for name, tensor in zip(names, CHANGES[how](plan.tensors.pop(source)), strict=True):
            tensor = tensor.detach().to(state[name].dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"{source!r} has numbers too large for {state[name].dtype}.")
            weights[name] = _by_itself(tensor, taken)
    return weights, {"sources": sources, "targets": {name: targets[name] for name in state}}


def _by_itself(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor if its memory is its own, or a copy: a part of another tensor would keep all of that, and tensors
    that share memory would learn together."""
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(storage.data_ptr())
    return tensor


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def report_text(report: dict[str, Any]) -> str:
    """The report as two tables, each name of one side with what became of it, or where it came from."""
    lines = [f"{name}: {report[name]}" for name in ("source", "checkpoint", "dtype")]
    lines += [f"note: {note}" for note in report["notes"]]
    for title, sign, rows in (
        ("source", "->", {k: (", ".join(v["targets"]) or "-", v["how"]) for k, v in report["sources"].items()}),
        ("target", "<-", {k: (v["source"] or "-", v["how"]) for k, v in report["targets"].items()}),
    ):
        width = max(map(len, rows))
        lines += ["", f"{title} ({len(rows)})"]
        lines += [f"{name:<{width}}  {sign} {other}  [{how}]" for name, (other, how) in rows.items()]
    return "\n".join(lines)
