"""The command `pixclip-hf`: finds the room that a subcommand belongs to and calls it.

Only the standard library is imported here, and nothing by a relative import: `pixclip_hf_command` reads this file
without its package, so that `pixclip-hf --help` answers at once.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        module: where its function is; imported when the command runs.
        help: its line in `pixclip-hf --help`.
        function: takes the arguments behind the subcommand; an integer that it returns is the exit status.
        extra: what installs the libraries that the module imports, if the package alone does not bring them.
        short_errors: whether an error about the input is shown as one line. A long run shows where it failed.
    """

    module: str
    help: str
    function: str = "main"
    extra: str | None = None
    short_errors: bool = True


COMMANDS = {
    "train": Command(
        "pixclip_hf.training.command", "train CLOC or PixCLIP with the Trainer", extra="train", short_errors=False
    ),
    "evaluate": Command(
        "pixclip_hf.evaluation.command", "measure a model on tasks with named protocols", extra="eval"
    ),
    "annotate": Command(
        "pixclip_hf.annotation.command",
        "make a dataset of regions and texts out of images",
        extra="annotate",
        short_errors=False,
    ),
    "embed": Command("pixclip_hf.embedding.command", "embed the regions of a collection", extra="data"),
    "search": Command("pixclip_hf.search.command", "find regions by text, region or image", "search", extra="search"),
    "convert": Command("pixclip_hf.conversion.command", "turn a public checkpoint into a model folder"),
    "publish": Command("pixclip_hf.hub", "push a trained model with its card to the Hub"),
    "app": Command("pixclip_hf.app.command", "show a model in the browser", extra="app"),
}


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="pixclip-hf",
        usage="pixclip-hf COMMAND [ARGUMENT ...]",
        description="PixCLIP and CLOC, CLIP models for regions of images, from training to the Hub.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
        + "\n\n`pixclip-hf COMMAND --help` explains a command and its arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pixclip-hf {version('pixclip-hf')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        argv: the subcommand and its arguments; those of the process when None.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding does not have must not end a run that is done.
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS[build_parser().parse_args(argv[:1]).command]
    try:
        function = getattr(import_module(command.module), command.function)
    except ModuleNotFoundError as error:
        if command.extra is None or error.name is None or error.name.partition(".")[0] == "pixclip_hf":
            raise
        install = f'pip install "pixclip-hf[{command.extra}]"'
        print(f"error: pixclip-hf {argv[0]} needs {error.name}: {install}", file=sys.stderr)
        return 1
    try:
        result = function(argv[1:])
    except (ModuleNotFoundError, OSError, ValueError) as error:
        if not command.short_errors:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0
