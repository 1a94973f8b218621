"""Checkpoint files read as tensors and nothing else: no code in a file is ever run."""

import pickle
import re
import zipfile
from collections.abc import Callable
from itertools import pairwise
from math import isqrt
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

# What training scripts put around a state dict.
WRAPPERS = ("state_dict", "model", "module")
# What `torch.compile` puts before the names of the module that it wraps, and data parallelism too.
COMPILED = "_orig_mod."
PREFIXES = ("module.", COMPILED)
# float8 needs scales that lie elsewhere; quantized and complex numbers are no weights that this package knows.
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A state dict, and what was around it.

    Args:
        path: the file.
        tensors: by name, without `prefix`.
        prefix: that every name in the file begins with (`module.` of data parallelism, `_orig_mod.` of
            `torch.compile`, or both), or empty.
        beside: names of what the file holds beside its state dict, such as an optimizer's state.
    """

    path: Path
    tensors: dict[str, Tensor]
    prefix: str = ""
    beside: tuple[str, ...] = ()

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that sizes are read from.

        Raises:
            ValueError: there is no such tensor, or it has another number of dimensions.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path.name!r} lacks {self.prefix + name!r}.")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dimensions:
            raise ValueError(f"{self.prefix + name!r} must have {dimensions} dimensions, got shape {shape}.")
        return shape

    def blocks(self, prefix: str) -> int:
        """How many numbered blocks lie below `prefix`.

        Raises:
            ValueError: none, or one in between is missing.
        """
        found = {int(match[1]) for name in self.tensors if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
        if not found or found != set(range(len(found))):
            raise ValueError(f"{self.prefix + prefix!r} must be followed by blocks 0, 1, 2, …, got {sorted(found)}.")
        return len(found)

    def grid_side(self, name: str, positions: int) -> int:
        """Side of the square patch grid that `positions` position embeddings, one of them the class token's, are for.

        Raises:
            ValueError: the grid is not square.
        """
        side = isqrt(max(positions - 1, 0))
        if not side or side * side != positions - 1:
            raise ValueError(
                f"{self.prefix + name!r} must hold the positions of a class token and a square grid, got {positions}."
            )
        return side

    def square_patch(self, name: str) -> tuple[int, int]:
        """(width, patch side) of the RGB patch projection `(width, 3, side, side)`.

        Raises:
            ValueError: a projection of another shape.
        """
        width, channels, height, side = self.shape(name, 4)
        if channels != 3 or height != side:
            raise ValueError(
                f"{self.prefix + name!r} must be (width, 3, side, side), got {(width, channels, height, side)}."
            )
        return width, side


def read_checkpoint(path: str | PathLike) -> Checkpoint:
    """Reads a `.safetensors` file or one of `torch.save` (`weights_only=True`, mapped into memory), whatever its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or truncated file, an archive whose checksums do not hold, a TorchScript archive, a
            pickle with more in it than tensors, entries that are no tensors of floating-point numbers, tensors that
            are sparse, nested, quantized, without content (meta), in float8 or overlap in memory, or numbers that are
            not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` must be a file, got {str(path)!r}.")
    content = _load(path)
    beside: tuple[str, ...] = ()
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            beside = tuple(str(name) for name in content if name != wrapper)
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{str(path)!r} must hold a state dict, got {type(content).__name__} of {content!r:.80}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{str(path)!r} must hold tensors by name, got {name!r}: {type(value).__name__}.")
        if (fault := _fault(value)) is not None:
            raise ValueError(f"{name!r} of {str(path)!r} {fault}, which is not converted.")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name!r} of {str(path)!r} holds numbers that are not finite: the file is damaged.")
    if not any(value.is_floating_point() for value in content.values()):
        raise ValueError(f"{str(path)!r} holds no weights in floating-point numbers.")
    _refuse_overlaps(content, path)
    prefix = ""
    while common := next((own for own in PREFIXES if all(name.startswith(prefix + own) for name in content)), None):
        prefix += common
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        # A part of a model that was compiled alone has the name in the middle.
        plain = "." + name.removeprefix(prefix)
        plain = plain.replace(f".{COMPILED}", ".")[1:]
        if plain in tensors:
            raise ValueError(f"{str(path)!r} holds {plain!r} twice, compiled and not: which one counts is unknown.")
        tensors[plain] = value
    return Checkpoint(path, tensors, prefix, beside)


def _fault(tensor: Tensor) -> str | None:
    """What a tensor has that weights have not, in words that follow its name, or None."""
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout != torch.strided:
        return f"is a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_meta:
        return "is a meta tensor, without content"
    if tensor.is_quantized or tensor.dtype not in DTYPES:
        return f"has the type {str(tensor.dtype).removeprefix('torch.')}"
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return "is a tensor whose elements overlap in memory"
        reach += max(size - 1, 0) * stride
    return None


def _refuse_overlaps(tensors: dict[str, Tensor], path: Path) -> None:
    """
    Raises:
        ValueError: two tensors share some of their memory. Those that share all of it are tied weights.
    """
    places = sorted((*_bytes(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    for (start, stop, name), (next_start, next_stop, other) in pairwise(places):
        if next_start < stop and (start, stop) != (next_start, next_stop):
            raise ValueError(f"{name!r} and {other!r} of {str(path)!r} overlap in memory, and are not converted.")


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory, and the byte behind its last. Storages of their own may overlap, too: a file
    is mapped, and its directory says where each of them lies."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return start, start + reach * tensor.element_size()


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    read: Callable[[Path], Any]
    # safetensors: the length of a JSON header in eight bytes, then the header.
    if head[8:] == b"{":
        read, kind = load_file, "safetensors"
    elif head[:4] == b"PK\x03\x04":
        read, kind = _load_zipped, "torch.save"
    elif head[:1] == b"\x80":
        read, kind = _load_pickled, "torch.save"
    else:
        raise ValueError(f"{str(path)!r} is neither a safetensors file nor one that torch.save wrote.")
    try:
        return read(path)
    except TorchScriptError:
        raise
    except pickle.UnpicklingError as error:
        # Also what a truncated file of the format before zip archives ends in.
        raise ValueError(
            f"{str(path)!r} is damaged or holds more than tensors, and is not read: {_first_line(error)}"
        ) from error
    except Exception as error:
        # Parsers raise anything on damaged bytes, down to UnicodeDecodeError; there is nothing else in this block.
        raise ValueError(f"{str(path)!r} is a damaged or truncated {kind} file: {_first_line(error)}") from error


class TorchScriptError(ValueError):
    """The file is a program and not a state dict."""


def _load_zipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        packed = next(
            (entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None
        )
        # torch.load does not compare them.
        damaged = archive.testzip() if packed is None else None
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise TorchScriptError(
            f"{str(path)!r} is a TorchScript archive, which is a program and is not run here. Where you trust it, "
            'write its weights first: torch.save(torch.jit.load(path, map_location="cpu").state_dict(), "clip.pt")'
        )
    if packed is not None:
        raise ValueError(f"{packed!r} is compressed, which torch.save does not do")
    if damaged is not None:
        raise ValueError(f"{damaged!r} is not what its checksum says")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_pickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
