"""Weights of safetensors files, each read by itself when it is asked for."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

# Names of floating-point types in the headers of safetensors files.
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Numbers that are converted at a time: few enough to stay in the processor's cache.
PIECE = 1 << 18
# Reading is bound by memory and disk; transformers loads with as many threads.
THREADS = min(4, os.cpu_count() or 4)

# Linux's list of mounted file systems, by device.
MOUNTS = Path("/proc/mounts")


class StoredWeight(NamedTuple):
    """Where a weight is stored.

    Args:
        path: the file.
        key: its name in the file.
        dtype: its type; None for one that is not floating-point, or of fewer than 16 bits.
        shape: its shape.
        start: where it begins, in bytes from the beginning of the file.
    """

    path: str
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int


def can_map_files() -> bool:
    """Whether files may be mapped into memory: under Windows that reserves memory for whole files, and the file system
    hf-mount of the Hub's machines locks up when several threads read a mapping."""
    lines = MOUNTS.read_text(encoding="utf-8").splitlines() if MOUNTS.exists() else []
    return sys.platform != "win32" and not any(line.startswith("hf-mount ") for line in lines)


def stored_weights(name: str, hub_kwargs: dict[str, Any]) -> dict[str, StoredWeight]:
    """The weights of a checkpoint by their stored names, none of them read; empty if it has no safetensors files.

    Args:
        name: folder or Hub id.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
    """
    weights = {}
    for path in safetensors_files(name, hub_kwargs):
        # Refuses what is not such a file, or is shorter than its header says.
        safe_open(path, framework="pt", device="cpu")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            weights[key] = StoredWeight(path, key, STORED.get(entry["dtype"]), tuple(entry["shape"]), start)
    return weights


def read_weights(weights: dict[str, StoredWeight], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights as tensors of `dtype`, by the names that they are given by.

    Those that are stored in that type are mapped into memory and never copied; the others are read and converted piece
    by piece, so that no weight is held in both types.

    Raises:
        ValueError: a file is shorter than its header says.
    """
    paths = {weight.path for weight in weights.values() if weight.dtype == dtype}
    files = {path: safe_open(path, framework="pt", device="cpu") for path in paths}
    with ThreadPoolExecutor(THREADS) as pool:
        converted = {
            name: pool.submit(_read_converted, weight, dtype)
            for name, weight in weights.items()
            if weight.dtype != dtype
        }
        return {
            name: converted[name].result() if name in converted else files[weight.path].get_tensor(weight.key)
            for name, weight in weights.items()
        }


def _read_converted(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    result = torch.empty(weight.shape, dtype=dtype)
    numbers = result.view(-1)
    buffer = torch.empty(min(PIECE, len(numbers)), dtype=weight.dtype)
    memory = buffer.view(torch.uint8).numpy().data
    with open(weight.path, "rb") as file:
        file.seek(weight.start)
        for piece in numbers.split(PIECE):
            size = len(piece) * buffer.element_size()
            if file.readinto(memory[:size]) < size:
                raise ValueError(f"{weight.path!r} ends within {weight.key!r}: its header asks for more bytes.")
            piece.copy_(buffer[: len(piece)])
    return result


def safetensors_files(name: str, hub_kwargs: dict[str, Any]) -> list[str]:
    """The shards of a checkpoint, in the order in which transformers looks for them; none if it has no safetensors."""
    options: Any = {**hub_kwargs, "_raise_exceptions_for_missing_entries": False}
    if path := cached_file(name, SAFE_WEIGHTS_NAME, **options):
        return [path]
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options):
        return get_checkpoint_shard_files(name, index, **hub_kwargs)[0]
    return []
