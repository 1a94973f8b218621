"""`pixclip-hf convert SOURCE CHECKPOINT --output FOLDER`: makes a model folder of a public checkpoint."""

import argparse
import sys
from collections.abc import Sequence

from ..command_help import HelpFormatter
from .convert import DTYPES, PLANS, REPORT, convert
from .weights import report_text

SOURCES = {
    "alpha-clip": "Alpha-CLIP: a full state dict, or the visual half alone with --clip",
    "pixclip": "the public PixCLIP: EVA02-CLIP and the text adaptor",
    "clip": "OpenAI's CLIP (ViT)",
    "open-clip": "a CLIP (ViT) trained with open_clip",
}


DESCRIPTION = """\
Converts a public checkpoint into a folder that AutoModel, AutoProcessor and the pipelines load.

  pixclip-hf convert pixclip pixclip.pth --output runs/pixclip
  pixclip-hf convert pixclip pixclip.pth --output runs/pixclip-llm --text_model any/llm --dtype bfloat16
  pixclip-hf convert alpha-clip alpha_visual.pth --clip openai/clip-vit-base-patch16 \\
      --tokenizer openai/clip-vit-base-patch16 --output runs/alpha-clip

conversion_report.json in the folder accounts for every name of the checkpoint and of the model. `pixclip-hf convert
SOURCE --help` lists the arguments for a source.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pixclip-hf convert",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name in PLANS:
        source = sources.add_parser(name, help=SOURCES[name], description=SOURCES[name], formatter_class=HelpFormatter)
        source.add_argument("checkpoint", help=".pt, .pth, .bin or .safetensors; read as tensors, never run")
        source.add_argument("--output", required=True, help="new or empty folder")
        source.add_argument(
            "--dtype", choices=DTYPES, help="precision of the saved weights; the checkpoint's by default"
        )
        source.add_argument("--tokenizer", metavar="PATH_OR_ID", help="tokenizer of the text tower")
        source.add_argument(
            "--allow", nargs="+", default=[], metavar="PATTERN", help="names that may be left over or missing"
        )
        if name == "pixclip":
            source.add_argument("--text_model", metavar="PATH_OR_ID", help="language model to attach")
            source.add_argument("--text_model_name", help="language model to expect states from, without --text_model")
        source.add_argument(
            "--head_width", type=int, help="channels per attention head of the image tower; 64 by default"
        )
        if name == "pixclip":
            continue
        source.add_argument(
            "--text_head_width", type=int, help="channels per attention head of the text tower; 64 by default"
        )
        if name == "alpha-clip":
            source.add_argument("--clip", metavar="PATH_OR_ID", help="the CLIP that a visual half was trained from")
        else:
            source.add_argument(
                "--activation",
                choices=("quick_gelu", "gelu"),
                help="activation of both towers; quick_gelu for clip and gelu for open-clip by default",
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts, prints the report, and returns the exit status: 1 after an error, which goes to stderr."""
    given = {name: value for name, value in vars(build_parser().parse_args(arguments)).items() if value is not None}
    try:
        report = convert(**given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report_text(report))
    print(f"\nwritten to {given['output']}, with {REPORT}")
    return 0
