"""The builders of tests/conftest.py, whose name the conftest of this folder has too."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
build_tokenizer = _module.build_tokenizer
