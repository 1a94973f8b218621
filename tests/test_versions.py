"""The supported versions: stated once, met by what is pinned, and refused at import where they are not."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pixclip_hf import versions

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Installed versions by name, in place of the real ones; None is a library that is missing."""
    found = {"transformers": "5.23.0", "torch": "2.13.0+cpu", "peft": "0.21.2"}

    def version(name):
        if found[name] is None:
            raise versions.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)
    return found


def test_what_is_installed_is_supported(installed):
    versions.check_versions()
    installed["peft"] = None
    versions.check_versions()


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        (
            "transformers",
            "5.22.1",
            r"needs transformers>=5.23,<6, but 5.22.1 is installed: pip install \"transformers",
        ),
        ("transformers", "6.0.0", "but 6.0.0 is installed"),
        ("transformers", None, "needs transformers>=5.23,<6, but is not installed"),
        ("torch", "2.5.1+cu121", r"needs torch>=2.6,<3, but 2.5.1\+cu121 is installed"),
        ("peft", "0.19.0", "needs peft>=0.20,<1, but 0.19.0 is installed"),
    ],
)
def test_other_versions_are_refused(name, version, message, installed):
    installed[name] = version
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


def test_the_import_checks_before_transformers_is_used():
    code = (
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.57.0' if name == 'transformers' else real(name)\n"
        "try:\n"
        "    import pixclip_hf\n"
        "except ImportError as error:\n"
        "    import sys\n"
        "    print(error, 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pixclip_hf needs transformers>=5.23,<6, but 4.57.0 is installed" in result.stdout
    assert result.stdout.rstrip().endswith("False")


def test_constraints_are_in_range():
    file = ROOT / "constraints.txt"
    if not file.is_file():
        pytest.skip("the package is not run from its repository")
    pinned = dict(line.split("==") for line in file.read_text().split())
    for name, range_ in versions.SUPPORTED.items():
        assert Requirement(name + range_).specifier.contains(pinned[name])
