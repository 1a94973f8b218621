"""Entry point of the command `pixclip-hf`.

It stands outside the package because importing the package imports torch and transformers, which takes seconds;
`pixclip-hf --help` should not.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> int:
    """Runs `pixclip_hf/cli.py`, which is read without its package, on the arguments of the process."""
    (folder,) = find_spec("pixclip_hf").submodule_search_locations
    spec = spec_from_file_location("pixclip_hf_cli", Path(folder, "cli.py"))
    cli = module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()
