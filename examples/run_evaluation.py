"""Evaluates CLOC, PixCLIP or any CLIP or SigLIP of transformers, and writes results.json and results.md.

On drawn scenes, nothing to download:

    python examples/run_evaluation.py --model runs/demo/cloc --tasks scenes --data_dir scenes:1000:0 \\
        --output_dir runs/evaluation

On COCO, by the protocol of PixCLIP's published script, with an encoding cache that survives an interruption:

    python examples/run_evaluation.py --model org/pixclip --tasks region-classification --data_dir data/coco \\
        --protocol official --cache_dir runs/cache --output_dir runs/evaluation

A CLIP or SigLIP sees a region as `--view` says (crop, blur, box, mask_pooled):

    python examples/run_evaluation.py --model openai/clip-vit-base-patch16 --view mask_pooled \\
        --tasks region-classification --data_dir data/coco --output_dir runs/evaluation

`--layouts` shows how each task's data must lie. docs/evaluation.md explains tasks and protocols.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.view_encoder import REGION_VIEWS, load_encoder
from pixclip_hf.evaluation.intervals import RESAMPLES
from pixclip_hf.evaluation.pictures import draw_pictures
from pixclip_hf.evaluation.report import Result, refuse_other_model, weights_digest, write_results
from pixclip_hf.evaluation.tasks import OPTIONS, PROTOCOLS, TASKS, check_task, run_task

# Recorded beside the results.
LIBRARIES = ("torch", "transformers", "pillow")


class ShowLayouts(argparse.Action):
    """Prints how data must lie, and ends."""

    def __call__(self, parser, namespace, values, option_string=None):
        for name, task in TASKS.items():
            print(f"{name}: {task.layout}\n")
        parser.exit()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id")
    parser.add_argument("--tasks", required=True, nargs="+", choices=tuple(TASKS))
    parser.add_argument(
        "--data_dir", required=True, nargs="+", help="folder or scenes:N:SEED: one for all tasks, or one for each"
    )
    parser.add_argument("--output_dir", required=True, help="of results.json and results.md")
    parser.add_argument(
        "--protocol",
        default="corrected",
        choices=PROTOCOLS,
        help="what the paper says (corrected) or what its published script does (official); the others are protocols "
        "of region-classification",
    )
    parser.add_argument("--split", help="of a dataset that has several")
    for name, option in OPTIONS.items():
        parser.add_argument(
            f"--{name}", default=option.default, type=type(option.default), choices=option.choices, help=option.help
        )
    parser.add_argument("--view", default="crop", choices=REGION_VIEWS, help="how a CLIP or SigLIP sees a region")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, help="tokens that texts are cut to")
    parser.add_argument("--cache_dir", help="of embeddings, to go on after an interruption; none when left out")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap intervals; 0 for none")
    parser.add_argument("--pictures", action="store_true", help="add pictures of the first images (needs matplotlib)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--no_progress", action="store_true", help="no progress bars")
    parser.add_argument("--layouts", nargs=0, action=ShowLayouts, help="show how each task's data must lie")
    arguments = parser.parse_args(argv)
    if len(arguments.data_dir) not in (1, len(arguments.tasks)):
        parser.error(
            f"--data_dir must be one for all tasks or one for each of the {len(arguments.tasks)}, "
            f"got {len(arguments.data_dir)}"
        )
    return arguments


def saved(model: str, revision: str) -> Path:
    """Where the files of a model that has been loaded lie."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def main(argv: list[str] | None = None) -> list[Result]:
    arguments = parse(argv)
    data_dirs = arguments.data_dir
    if len(data_dirs) == 1:
        data_dirs = data_dirs * len(arguments.tasks)
    for task in arguments.tasks:
        check_task(task, arguments.protocol)
    refuse_other_model(arguments.output_dir, arguments.model)

    # 1. The model, behind a cache of what it has embedded.
    encoder = load_encoder(
        arguments.model,
        view=arguments.view,
        max_length=arguments.max_length,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    encoder = CachedEncoder(
        encoder, arguments.cache_dir, progress=not arguments.no_progress, batch_size=arguments.batch_size
    )

    # 2. The tasks. What is done is written at once: a later task may lack its data.
    settings = {
        "view": encoder.encoder.view,
        "max_length": encoder.encoder.text_limit,
        "dtype": arguments.dtype,
        "revision": getattr(encoder.encoder.model.config, "_commit_hash", None),
        "weights": weights_digest(saved(arguments.model, arguments.revision)),
        **{name: version(name) for name in LIBRARIES},
    }
    options = {name: getattr(arguments, name) for name in OPTIONS}
    results, pictures = [], []
    for number, (task, data_dir) in enumerate(zip(arguments.tasks, data_dirs, strict=True), 1):
        results += run_task(
            encoder,
            task,
            data_dir,
            protocol=arguments.protocol,
            split=arguments.split,
            resamples=arguments.resamples,
            **options,
        )
        if arguments.pictures and TASKS[task].pictured:
            data = TASKS[task].read(data_dir, arguments.split, **options)
            name = task if arguments.tasks.count(task) == 1 else f"{task}-{number}"
            pictures += draw_pictures(encoder, data, arguments.output_dir, name)
        write_results(arguments.output_dir, arguments.model, results, pictures, settings)
        print(f"{task}: written to {arguments.output_dir}")
    return results


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
