"""The files that are saved with a model import nothing that would be missing where they are loaded."""

import ast
import re
import sys
from pathlib import Path

import pytest

import pixclip_hf

PACKAGE = Path(pixclip_hf.__file__).parent
TRAVELING = sorted(p for f in ("modeling", "processing", "pipelines") for p in (PACKAGE / f).glob("*.py"))
ALLOWED = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}


def bad_imports(source, siblings):
    """What in the source of a file would break its loading from a repository, beside the modules `siblings`."""
    found, relative = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module] if node.module.split(".")[0] not in ALLOWED else []
        elif isinstance(node, ast.ImportFrom):
            relative.add(node.module)
            found += [ast.unparse(node)] if node.level > 1 or node.module not in siblings else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.append(ast.unparse(node))
    # transformers finds the files to copy by these patterns, in docstrings too.
    for pattern in (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import"):
        found += [module for module in re.findall(pattern, source, re.M) if module not in relative]
    return found


def test_names_are_unique():
    names = [path.name for path in TRAVELING if path.name != "__init__.py"]
    assert len(names) >= 8
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", TRAVELING, ids=lambda path: path.name)
def test_imports(path):
    assert not bad_imports(path.read_text(), {sibling.stem for sibling in path.parent.glob("*.py")})


@pytest.mark.parametrize(
    "source",
    [
        "import pixclip_hf",
        "from pixclip_hf.modeling import modeling_cloc",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pixclip_hf import CLOCConfig",
        "from . import sibling",
        "from ..processing.sibling import name",
        "from .missing import name",
        "from .sub.sibling import name",
        "def late():\n    import datasets",
        "try:\n    import scipy\nexcept ImportError:\n    scipy = None",
        "import importlib\nimportlib.import_module('pixclip_hf.hub')",
        '"""Docstring.\n\n    from .example import name\n"""',
    ],
)
def test_an_import_that_breaks_is_found(source):
    assert bad_imports(source, {"sibling"})
    assert not bad_imports("import torch.nn\nfrom PIL import Image\nfrom .sibling import name", {"sibling"})
