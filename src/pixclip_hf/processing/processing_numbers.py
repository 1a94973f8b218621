"""The one reader of numbers that others wrote: bounded before anything is computed, sized or indexed by them."""

from typing import Any

import numpy as np
from PIL import Image

# Sides, coordinates and runs in pixels: what the record schema stores a side in. Sums and products of such numbers fit
# into 64 bits, whatever a file says.
MOST = 2**31 - 1
LEAST_INT64, MOST_INT64 = -(2**63), 2**63 - 1
LARGEST = float(np.finfo(np.float32).max)


def most_pixels() -> int:
    """The most pixels of an image or a mask: what PIL itself refuses to decode, twice `PIL.Image.MAX_IMAGE_PIXELS`."""
    return MOST if Image.MAX_IMAGE_PIXELS is None else min(2 * Image.MAX_IMAGE_PIXELS, MOST)


def shown(value: Any) -> str:
    """A value in a message: the start of its `repr`, or its type where Python refuses to write a number so long."""
    try:
        return f"{value!r:.80}"
    except Exception:  # any: it must not hide what the message is about
        return f"a value of type {type(value).__name__}"


def as_array(values: Any, name: str, expected: str = "numbers in an array, or in lists of equal length") -> np.ndarray:
    """
    Numbers in any form as an array of their own type: lists, arrays, and tensors of any device, with or without a
    gradient, also as the entries of a list.

    Raises:
        ValueError: a tensor without data (on the device "meta"), rows of several lengths, or nothing that makes an
            array.
    """
    try:
        return np.asarray(_plain(values))
    except (TypeError, ValueError, OverflowError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{name} must be {expected}, got {shown(values)}: {error}") from error


def _plain(values: Any) -> Any:
    if _is_tensor(values):
        if values.is_meta:
            raise ValueError("a tensor on the device 'meta' holds no numbers")
        values = values.detach().cpu()
        half = values.is_floating_point() and values.itemsize < 4
        return (values.float() if half else values).numpy()
    # By the first entry: the lists of a file, which are long, hold numbers alone.
    first = values[0] if isinstance(values, list | tuple) and values else None
    inner = first[0] if isinstance(first, list | tuple) and first else None
    return [_plain(value) for value in values] if _is_tensor(first) or _is_tensor(inner) else values


def _is_tensor(value: Any) -> bool:
    # Importing torch would cost those who only read records a second.
    return hasattr(value, "detach") and hasattr(value, "is_meta")


def as_float64(values: Any, name: str, expected: str = "numbers") -> np.ndarray:
    """
    Numbers in any form of [`as_array`] as float64, of any shape and value: a copy.

    Raises:
        ValueError: no numbers, or integers beyond any float.
    """
    found = as_array(values, name, expected)
    try:
        if found.dtype.kind == "c":
            raise TypeError("complex numbers have no order")
        # Integers of any size come as objects.
        return found.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be {expected}, got {shown(values)}: {error}") from error


def read_numbers(values: Any, name: str) -> np.ndarray:
    """
    Coordinates in any form of [`as_array`] as float64, of any shape.

    Raises:
        ValueError: no numbers, or one that is not finite or beyond `MOST`.
    """
    numbers = as_float64(values, name)
    # A comparison with NaN is never true.
    if not (np.abs(numbers) <= MOST).all():
        raise ValueError(f"{name} must be finite numbers between -{MOST} and {MOST}, got {shown(values)}")
    return numbers


def read_whole(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """
    One whole number.

    Raises:
        TypeError: no integer.
        ValueError: it is below `least` or above `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return int(value)


def read_number(value: Any, name: str) -> float:
    """
    One number.

    Raises:
        TypeError: no number.
        ValueError: it is not finite, or beyond what a float32 holds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    number = int(value) if isinstance(value, int | np.integer) else float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {number}")
    if not -LARGEST <= number <= LARGEST:
        raise ValueError(f"{name} must be a number that a float32 holds, got {shown(value)}")
    return float(number)
