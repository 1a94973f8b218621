"""`pixclip-hf evaluate`: measures a model on tasks and writes results.json and results.md."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..command_help import HelpFormatter
from ..encoders.cached import CachedEncoder
from ..encoders.view_encoder import REGION_VIEWS, load_encoder
from .intervals import RESAMPLES
from .report import Result, refuse_other_model, weights_digest, write_results
from .tasks import OPTIONS, PROTOCOLS, TASKS, check_task, draw_task, run_task

DESCRIPTION = """\
Evaluates CLOC, PixCLIP, or any CLIP or SigLIP of transformers, and writes results.json and results.md.

On drawn scenes, with nothing to download:

  pixclip-hf evaluate --model runs/demo/cloc --tasks scenes --data_dir scenes:1000:0 --output_dir runs/evaluation

On COCO by the protocol of PixCLIP's published script, with a cache of embeddings that survives an interruption:

  pixclip-hf evaluate --model org/pixclip --tasks region-classification --data_dir data/coco \\
      --protocol official --cache_dir runs/cache --output_dir runs/evaluation

For a CLIP or SigLIP, --view says how it sees a region:

  pixclip-hf evaluate --model openai/clip-vit-base-patch16 --view mask_pooled \\
      --tasks region-classification --data_dir data/coco --output_dir runs/evaluation

--layouts prints how the data of each task must be laid out. docs/evaluation.md explains tasks and protocols.
"""
# Recorded beside the results.
LIBRARIES = ("torch", "transformers", "pillow")
PROMPTS = ("box", "mask", "point")


class ShowLayouts(argparse.Action):
    """Prints how data must be laid out, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        for name, task in TASKS.items():
            print(f"{name}: {task.layout}\n")
        parser.exit()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pixclip-hf evaluate",
        usage="pixclip-hf evaluate --model MODEL --tasks TASK ... --data_dir DATA ... --output_dir FOLDER "
        "[--ARGUMENT VALUE ...]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--tasks", required=True, nargs="+", choices=tuple(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument(
        "--data_dir",
        nargs="+",
        metavar="DATA",
        help="folder or scenes:N:SEED, one for all tasks or one for each task",
    )
    places.add_argument(
        "--source",
        nargs="+",
        metavar="WORD",
        help="data of any format for all tasks: its kind and arguments, coco annotations=i.json images=val2017",
    )
    parser.add_argument("--output_dir", required=True, help="folder for results.json and results.md")
    parser.add_argument(
        "--protocol",
        default="corrected",
        choices=PROTOCOLS,
        help="do what a paper says or what its published code does; the named protocols belong to "
        "region-classification and open-vocabulary-detection",
    )
    parser.add_argument("--split", help="split of a dataset that has several")
    for name, option in OPTIONS.items():
        parser.add_argument(
            f"--{name}", default=option.default, type=type(option.default), choices=option.choices, help=option.help
        )
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="what prompts the regions of a CLOC or PixCLIP; by default what the model is usually prompted with",
    )
    parser.add_argument("--view", default="crop", choices=REGION_VIEWS, help="how a CLIP or SigLIP sees a region")
    parser.add_argument("--batch_size", type=int, default=32, help="images, crops and texts per pass of the model")
    parser.add_argument("--max_length", type=int, help="tokens that texts are cut to; the model's limit by default")
    parser.add_argument(
        "--cache_dir", help="folder for embeddings, so that an interrupted run can continue; no cache by default"
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        help="resamples of the intervals that are bootstrapped; 0 for no intervals",
    )
    parser.add_argument("--pictures", action="store_true", help="draw the first images and their hits")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="precision of the model"
    )
    parser.add_argument("--no_progress", action="store_true", help="show no progress bars")
    parser.add_argument(
        "--layouts", nargs=0, action=ShowLayouts, help="show how the data of each task must be laid out"
    )
    arguments = parser.parse_args(argv)
    if arguments.source is not None:
        words = tuple(arguments.source)
        arguments.data_dir = [words if len(words) > 1 else words[0]]
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


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the tasks that the arguments name and writes their results.

    Args:
        argv: arguments of the command line; those of the process when None.

    Raises:
        ValueError: a task, protocol or prompt that does not fit the model or the data.
        FileNotFoundError: data is missing; the message shows how it must be laid out.
    """
    arguments = parse(argv)
    data_dirs = arguments.data_dir
    if len(data_dirs) == 1:
        data_dirs = data_dirs * len(arguments.tasks)
    for task in arguments.tasks:
        check_task(task, arguments.protocol)
    refuse_other_model(arguments.output_dir, arguments.model)

    # 1. The model, behind a cache of what it has embedded.
    model = load_encoder(
        arguments.model,
        view=arguments.view,
        max_length=arguments.max_length,
        revision=arguments.revision,
        prompt=arguments.prompt,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    encoder = CachedEncoder(
        model, arguments.cache_dir, progress=not arguments.no_progress, batch_size=arguments.batch_size
    )

    # 2. The tasks. What is done is written at once: a later task may lack its data.
    settings = {
        "view": encoder.encoder.view,
        "prompt": encoder.encoder.prompt if encoder.encoder.view is None else None,
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
        if arguments.pictures:
            name = task if arguments.tasks.count(task) == 1 else f"{task}-{number}"
            pictures += draw_task(
                encoder, task, data_dir, arguments.protocol, arguments.split, arguments.output_dir, name, **options
            )
        write_results(arguments.output_dir, arguments.model, results, pictures, settings)
        print(f"{task}: written to {arguments.output_dir}")
    return results
