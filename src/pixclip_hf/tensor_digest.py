"""What tells a named tensor from any other, down to the bit."""

from typing import Any

import torch
from torch import Tensor


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor to a digest of `hashlib`: its name, dtype, shape and content.

    Args:
        digest: what `hashlib.sha256()` returns, or another digest.
        name: what the tensor is called.
        tensor: of any shape and dtype, on any device.
    """
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
