"""A case of the suite, what may come out of it, and values that no one should give."""

import os
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# What bad input may raise; each with a message that says what is wrong with which argument.
NAMED = (ValueError, TypeError, FileNotFoundError)
TRIED: Counter = Counter()
# Cases of a test, times its share: `FUZZ_SCALE=0.01 pytest tests/fuzz` tries the suite itself.
SCALE = float(os.environ.get("FUZZ_SCALE", "1"))


def fuzz(number, **strategies):
    """A test of so many cases. Arithmetic that overflows or divides by zero fails it, as any error without a name."""

    def decorate(test):
        @pytest.mark.fuzz
        @pytest.mark.timeout(3000)
        @settings(max_examples=max(int(number * SCALE), 1))
        @given(**strategies)
        @wraps(test)
        def run(**arguments):
            TRIED[test.__name__] += 1
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                test(**arguments)

        return run

    return decorate


@contextmanager
def named_errors(*words):
    """Lets errors of the named types pass whose message holds one of the words."""
    try:
        yield
    except NAMED as error:
        assert not words or any(word in str(error) for word in words), (
            f"{type(error).__name__} without a name: {error}"
        )


LARGE = [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
EDGES = [0, 1, -1, 0.5, -0.0, 1e-320, 1e-9, 1e19, 1e300, float("inf"), float("-inf"), float("nan")]
NO_NUMBERS = [None, True, "", "3", "x", "\ud800", b"\x00", 1j, [], {}, [[]], object()]
SCALARS = [
    np.uint8(200),
    np.uint64(2**64 - 1),
    np.int8(-1),
    np.float16(65504),
    np.float32("nan"),
    np.array(3),
    np.array([]),
    torch.tensor(2.5),
    torch.tensor(7, dtype=torch.uint8),
]
# In JSON and Arrow there are no objects of numpy and torch, but all of the others.
plain_numbers = st.one_of(
    st.integers(-3, 60),
    st.floats(-100, 100),
    st.sampled_from([*EDGES, *LARGE, *(-value for value in LARGE)]),
    st.floats(width=64),
)
json_values = st.recursive(
    st.one_of(
        plain_numbers, st.sampled_from([None, True, "", "3", "x", "\ud800", "../x", "a" * 300]), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.sampled_from(["size", "counts", "id", "box", "bbox", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@st.composite
def tensors_and_arrays(draw):
    """Arrays and tensors of any type and shape, with and without data."""
    shape = draw(
        st.sampled_from([(), (0,), (1,), (4,), (2, 4), (1, 4, 1), (0, 4), (12, 17), (3, 12, 17), (2, 12, 17)])
    )
    value = draw(st.sampled_from([0, 1, 2, 255, 0.25, -1]))
    if draw(st.booleans()):
        kind = draw(
            st.sampled_from(["bool", "u1", "u2", "u8", "i1", "i8", "f2", "f4", "f8", "c8", "O", "U3", "M8[s]"])
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return np.full(shape, value).astype(kind)
            except (TypeError, ValueError):
                return np.full(shape, str(value))
    kinds = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    made = torch.full(shape, value, dtype=torch.float32).to(draw(st.sampled_from([*kinds, torch.complex64])))
    change = draw(st.sampled_from(["none", "meta", "grad", "sparse", "nan"]))
    if change == "meta":
        return made.to("meta")
    if change == "grad" and made.is_floating_point():
        return made.requires_grad_()
    if change == "sparse" and made.ndim:
        return made.to_sparse()
    if change == "nan" and made.is_floating_point():
        return made * float("nan")
    return made


wild_numbers = st.one_of(plain_numbers, st.sampled_from(NO_NUMBERS), st.sampled_from(SCALARS), tensors_and_arrays())
wild = st.recursive(
    st.one_of(wild_numbers, st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=2),
    ),
    max_leaves=10,
)


def one_replaced(values, others=wild_numbers):
    """A list of which one entry, or none, is something else."""
    return st.builds(
        lambda given, place, other, change: [
            other if change and i == place % max(len(given), 1) else value for i, value in enumerate(given)
        ],
        values,
        st.integers(0, 30),
        others,
        st.booleans(),
    )
