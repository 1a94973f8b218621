"""`pixclip-hf embed`: embeds the regions, images and captions of a collection into a folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_help import HelpFormatter
from ..data.sources import name_source
from ..hub import dataset_files, publish_dataset, write_dataset_card
from ..jobs.passes import ENGINES
from ..outgoing import listing
from ..search.store import StoreOptions
from ..search.store_arguments import add_store_arguments, store_options
from ..search.store_folder import check_own_stores, check_store, open_store
from .encoder_choice import EncoderChoice
from .folder import DTYPES, KINDS, EmbeddingFolder, embedding_counts
from .regions import Annotations, DetectorProposer, Grid
from .run import embed
from .sam import SamProposer

DESCRIPTION = """\
Embeds the regions, images and captions of a collection into a folder of Parquet shards, which is a dataset.
`pixclip-hf search` then finds them.

  pixclip-hf embed --source scenes:200 --model runs/demo/cloc --output runs/embeddings
  pixclip-hf embed --source coco annotations=instances_val2017.json images=val2017 --model org/cloc --output runs/coco
  pixclip-hf embed --source images folder=photos --grid 1 3 7 --model org/cloc --output runs/photos
  pixclip-hf embed --source images folder=photos --detector PekingU/rtdetr_r50vd --model org/cloc --output runs/objects
  pixclip-hf embed --source grit folder=GRIT --model org/cloc --output /shared/grit --engine ray --workers 8

A run that is started again continues at the first shard that is not done. docs/collections.md explains large
collections.
"""


def main(argv: Sequence[str] | None = None) -> EmbeddingFolder:
    """Embeds a collection as the arguments say.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        The folder.

    Raises:
        ValueError: as [`embed`]; or as [`check_store`], before the first image is embedded.
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf embed", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        help="what to embed: a kind of source and its arguments, such as `images folder=photos`; a dataset in the "
        "record schema; or `scenes:NUMBER[:SEED]`",
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLOC or PixCLIP, or any CLIP or SigLIP")
    parser.add_argument("--output", type=Path, required=True, help="folder of the embeddings")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--prompt",
        choices=("box", "mask", "point"),
        help="what prompts the regions, `point` for a point inside each; by default what usually prompts the model",
    )
    parser.add_argument("--view", default=EncoderChoice.view, help="how a CLIP or SigLIP is shown a region")
    regions = parser.add_mutually_exclusive_group()
    regions.add_argument(
        "--grid",
        type=int,
        nargs="+",
        help="windows in place of the regions of the source: so many per side of an image, for each number",
    )
    regions.add_argument("--detector", help="object detector of transformers, whose boxes are the regions")
    regions.add_argument("--segmenter", help="SAM (folder or Hub id), whose masks are the regions")
    parser.add_argument(
        "--detector_threshold", type=float, default=DetectorProposer.threshold, help="least score of a detector's box"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["region", "image"], help="what is embedded")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="numbers on disk")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model: auto is bfloat16 on a GPU and that of the checkpoint on a CPU",
    )
    parser.add_argument(
        "--reduced",
        action="store_true",
        help="decode large JPEGs at a reduced scale, which is several times as fast",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images per pass of the model")
    parser.add_argument(
        "--readers", type=int, help="processes that read images ahead of the model; by default the cores beside a GPU"
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="what runs the work")
    parser.add_argument("--workers", type=int, default=1, help="processes, or actors of Ray, that embed")
    parser.add_argument("--shard_size", type=int, default=2048, help="maximum number of images per shard")
    add_store_arguments(parser, None, "also build this store; `pixclip-hf search` builds it otherwise")
    parser.add_argument("--push_to_hub", help="Hub id to push the finished dataset to")
    parser.add_argument("--dry_run", action="store_true", help="list what --push_to_hub would push, and push nothing")
    parser.add_argument("--license", help="license of the dataset, for its card")
    arguments = parser.parse_args(argv)

    choice = EncoderChoice(
        arguments.model, arguments.revision, arguments.view, arguments.prompt, precision=arguments.precision
    )
    stored = {"store": arguments.store, "options": store_options(arguments), "place": arguments.store_dir}
    if arguments.store is None and (stored["options"] != StoreOptions() or arguments.store_dir is not None):
        raise ValueError("Options of the store need `--store`.")

    def check(folder: EmbeddingFolder) -> None:
        check_own_stores(folder)
        if arguments.store is not None:
            check_store(folder, **stored)

    options = ("kinds", "dtype", "reduced", "batch_size", "readers", "engine", "workers", "shard_size")
    folder = embed(
        arguments.source,
        choice,
        arguments.output,
        regions=_regions(arguments),
        check=check,
        **{name: getattr(arguments, name) for name in options},
    )
    for name, count in embedding_counts(folder.path).items():
        print(f"{name:<60} {count:,}")
    if arguments.store is not None:
        opened = open_store(folder, **stored)
        print(f"{arguments.store + ' store':<60} {len(opened):,}")
        opened.close()
    card: dict[str, Any] = {"license": arguments.license, "models": {"embeddings": arguments.model}}
    if arguments.push_to_hub is not None and arguments.dry_run:
        print(listing(dataset_files(folder.path, arguments.push_to_hub, "embeddings", **card)))
    elif arguments.push_to_hub is not None:
        publish_dataset(folder.path, arguments.push_to_hub, "embeddings", **card)
    else:
        write_dataset_card(folder.path, f"local/{folder.path.resolve().name}", "embeddings", **card)
    print(f"written: {folder.path}, embeddings of {name_source(arguments.source)}")
    return folder


def _regions(arguments: argparse.Namespace) -> Any:
    if arguments.grid is not None:
        return Grid(tuple(arguments.grid))
    if arguments.detector is not None:
        return DetectorProposer(arguments.detector, arguments.detector_threshold)
    if arguments.segmenter is not None:
        return SamProposer(arguments.segmenter)
    return Annotations()
