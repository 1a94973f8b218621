"""`pixclip-hf app`: the demo of a model in a browser."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from ..command_help import HelpFormatter
from .demo import DEMO_MODEL, load_demo

if find_spec("gradio") is None:  # told at once; importing it takes seconds, which `--help` need not
    raise ModuleNotFoundError("The demo needs Gradio.", name="gradio")

DESCRIPTION = """\
Shows a model in the browser: drop an image, draw boxes, paint masks or click points, and compare them with texts of
any length; see where a text is; and search a collection that `pixclip-hf embed` made.

  pixclip-hf app                                      # the model of `make demo`, on drawn scenes
  pixclip-hf app --model org/cloc
  pixclip-hf app --model org/pixclip --mask_model facebook/sam-vit-base
  pixclip-hf app --index runs/photos                  # with the model that embedded the collection

The page is served to this machine alone; `--host 0.0.0.0` serves it to the network. Nothing is sent anywhere.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the demo until it is interrupted.

    Args:
        argv: arguments of the command line; those of the process when None.

    Raises:
        ValueError: no model, one that embeds no regions and texts, or one that did not make the collection.
        OSError: the port is taken.
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf app", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument(
        "--model",
        help="folder or Hub id of a CLOC or PixCLIP, or any CLIP or SigLIP; by default the one that made the "
        f"collection, or else {DEMO_MODEL}",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--mask_model", help="folder or Hub id of a SAM or SAM-HQ, for points with a model that reads none"
    )
    parser.add_argument("--index", help="folder of `pixclip-hf embed` to search in")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve")
    parser.add_argument("--port", type=int, help="port to serve; the first free one from 7860 on by default")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    arguments = parser.parse_args(argv)
    demo = load_demo(arguments.model, arguments.revision, arguments.mask_model, arguments.index)
    from .interface import launch_demo

    launch_demo(demo, server_name=arguments.host, server_port=arguments.port, inbrowser=arguments.open)
