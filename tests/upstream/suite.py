"""transformers' own common tests, read from the sdist of the installed version and never copied into this repository.

`python tests/upstream/suite.py` takes the sdist from the package index into the user's cache; `load` imports a module
of its tests from there.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

VERSION = transformers.__version__
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pixclip_hf"
SUITE = CACHE / f"transformers-{VERSION}" / "tests"
PACKAGE = "transformers_suite"


def fetch() -> None:
    """Puts the tests of the installed transformers into the cache, unless they are there."""
    if SUITE.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"transformers=={VERSION}"
        options = ["--no-deps", "--no-binary", "transformers", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        (sdist,) = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(sdist) as archive:
            tests = [member for member in archive if member.name.split("/")[1:2] == ["tests"]]
            archive.extractall(Path(folder) / "sdist", members=tests, filter="data")
        (unpacked,) = (Path(folder) / "sdist").glob("*/tests")
        (unpacked / "__init__.py").touch()
        SUITE.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(SUITE)


def _stand_in(name: str, **names: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


def load(name: str) -> types.ModuleType:
    """A module of the suite, `"test_modeling_common"` for example.

    Raises:
        FileNotFoundError: the suite is not in the cache.
    """
    if not SUITE.is_dir():
        raise FileNotFoundError(f"The tests of transformers {VERSION} are not in {SUITE}: run `make test-upstream`.")
    if PACKAGE not in sys.modules:
        # What the sdist leaves out, and what the mixins import of it: the exporters, generation, files of the Hub.
        _stand_in(PACKAGE, __path__=[str(SUITE)])
        _stand_in(f"{PACKAGE}.exporters", __path__=[])
        _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in(f"{PACKAGE}.generation", __path__=[])
        _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in(f"{PACKAGE}.utils", __path__=[])
        _stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)
        _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    return importlib.import_module(f"{PACKAGE}.{name}")


# Fields of every configuration with values that are not their defaults.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


if __name__ == "__main__":
    fetch()
