"""What is not a number is no result: models and embeddings that hold such values are refused by name, before anything
is measured, kept or published of them."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch


def check_finite_weights(model: Any, name: str = "model") -> None:
    """Refuses a model with weights that are not finite.

    Weights that are not in memory (offloaded ones), of integers, and of packed or sharded tensors are not looked at.

    Args:
        model: any module.
        name: how the message calls it.

    Raises:
        ValueError: a parameter holds NaN or infinite values, or a buffer NaN; names the first one.
    """
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        readable = not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__") and tensor.itemsize > 1
        if not (readable and tensor.is_floating_point() and tensor.numel()):
            continue
        # The ends carry NaN and infinity, without a copy of the weights. A buffer may mask with minus infinity.
        ends = torch.stack(tensor.detach().aminmax())
        if ends.isnan().any() or (isinstance(tensor, torch.nn.Parameter) and ends.isinf().any()):
            raise ValueError(
                f"`{name}` must have finite weights, got NaN or infinite values in {key!r}: it comes from a training "
                "that diverged, from a damaged file, or from a conversion to a type that is too narrow."
            )


def check_finite(rows: Any, what: str, names: Sequence[Any], dtype: Any = None) -> None:
    """Refuses embeddings or states that are not finite.

    Args:
        rows: tensor or array `(N, ...)`.
        what: what a row is, for the message; names: which one it is.
        dtype: the `torch.dtype` that the model computes in, as far as it is known.

    Raises:
        ValueError: a row holds NaN or infinite values; names the first one.
    """
    if isinstance(rows, torch.Tensor):
        finite = torch.isfinite(rows).reshape(len(rows), -1).all(-1).cpu().numpy()
    else:
        finite = np.isfinite(rows).reshape(len(rows), -1).all(-1)
    if not finite.all():
        number = int(np.argmin(finite))
        computed = "" if dtype is None else f", computed in {str(dtype).removeprefix('torch.')}"
        advice = ": take bfloat16 or float32, whose range is wider" if dtype == torch.float16 else ""
        raise ValueError(
            f"{what} {names[number]!r:.80} has NaN or infinite values{computed}, "
            f"{(~finite).sum()} of {len(finite)} rows do{advice}."
        )
