"""Entry point of the command `pixclip-hf`.

It stands outside the package because importing the package imports torch and transformers, which takes seconds;
`pixclip-hf --help` should not.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> int:
    """Runs `pixclip_hf/cli.py`, which is read without its package, on the arguments of the process."""
    package = find_spec("pixclip_hf")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("The package pixclip_hf is not installed beside its command.", name="pixclip_hf")
    spec = spec_from_file_location("pixclip_hf_cli", Path(package.submodule_search_locations[0], "cli.py"))
    if spec is None or spec.loader is None:
        raise ImportError("The package pixclip_hf has no cli.py.", name="pixclip_hf.cli")
    cli = module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()
