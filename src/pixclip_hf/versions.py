"""The versions of other libraries that this package works with: `setup.py` asks for them, the import checks them.

Run as a script, it prints the oldest of them as constraints for pip.
"""

from importlib.metadata import PackageNotFoundError, version

# transformers 5.23 itself asks for this torch and this peft; constraints.txt holds what the tests run with.
SUPPORTED = {"transformers": ">=5.23,<6", "torch": ">=2.6,<3", "peft": ">=0.20,<1"}
OPTIONAL = {"peft"}


def oldest() -> dict[str, str]:
    """The lower end of each range, by library: what the tests run with once beside the newest."""
    return {name: versions.split(",")[0].removeprefix(">=") for name, versions in SUPPORTED.items()}


def check_versions() -> None:
    """
    Raises:
        ImportError: an installed version outside its range, or a library that is missing and not optional.
    """
    from packaging.requirements import Requirement

    for name, versions in SUPPORTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            if name in OPTIONAL:
                continue
            installed = None
        # A local version, such as 2.13.0+cpu, is the release it was built from; a pre-release of one counts too.
        if installed is None or not Requirement(name + versions).specifier.contains(installed, prereleases=True):
            found = "is not installed" if installed is None else f"{installed} is installed"
            raise ImportError(f'pixclip_hf needs {name}{versions}, but {found}: pip install "{name}{versions}"')


if __name__ == "__main__":
    print(*(f"{name}=={lowest}" for name, lowest in oldest().items()), sep="\n")
