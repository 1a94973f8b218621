"""Marks of transformers' own tests, and the tests that our classes are excused from."""

import pytest
from exceptions import EXCEPTIONS

MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")
MOST_EXCEPTIONS = 10


def pytest_configure(config):
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own tests")
    if len(EXCEPTIONS) > MOST_EXCEPTIONS:
        raise pytest.UsageError(f"{len(EXCEPTIONS)} exceptions, and at most {MOST_EXCEPTIONS} are allowed.")


def pytest_collection_modifyitems(items):
    for item in items:
        classes, reason = EXCEPTIONS.get(item.name, ((), ""))
        if any(name in item.cls.__name__ for name in classes):
            item.add_marker(pytest.mark.xfail(reason=reason))
