"""Command line: `python -m pixclip_hf.conversion SOURCE CHECKPOINT --output DIR`."""

import argparse
import sys
from collections.abc import Sequence

from .convert import DTYPES, PLANS, REPORT, convert
from .weights import report_text

SOURCES = {
    "alpha-clip": "Alpha-CLIP: a full state dict, or the visual half alone with --clip",
    "pixclip": "the public PixCLIP: EVA02-CLIP and the text adaptor",
    "clip": "OpenAI's CLIP (ViT)",
    "open-clip": "a CLIP (ViT) trained with open_clip",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pixclip_hf.conversion",
        description="Convert a public checkpoint into a folder that AutoModel, AutoProcessor and the pipelines load.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name in PLANS:
        source = sources.add_parser(name, help=SOURCES[name], description=SOURCES[name])
        source.add_argument("checkpoint", help=".pt, .pth, .bin or .safetensors; read as tensors, never run")
        source.add_argument("--output", required=True, help="new or empty folder")
        source.add_argument("--dtype", choices=DTYPES, help="of the saved weights; the checkpoint's by default")
        source.add_argument("--tokenizer", metavar="PATH_OR_ID", help="tokenizer of the text tower")
        source.add_argument(
            "--allow", nargs="+", default=[], metavar="PATTERN", help="names that may be left over or missing"
        )
        if name == "pixclip":
            source.add_argument("--text_model", metavar="PATH_OR_ID", help="language model to attach")
            source.add_argument("--text_model_name", help="language model to expect states from, without --text_model")
        source.add_argument("--head_width", type=int, help="channels of an attention head, image tower (64)")
        if name == "pixclip":
            continue
        source.add_argument("--text_head_width", type=int, help="channels of an attention head, text tower (64)")
        if name == "alpha-clip":
            source.add_argument("--clip", metavar="PATH_OR_ID", help="the CLIP that a visual half was trained from")
        else:
            source.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of both towers")
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


if __name__ == "__main__":
    sys.exit(main())
