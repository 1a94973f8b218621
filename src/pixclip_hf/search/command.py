"""`pixclip-hf embed` and `pixclip-hf search`: an index of a collection's regions, and queries over it."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..command_help import HelpFormatter
from ..encoders.protocol import Encoder
from ..encoders.region_encoder import RegionEncoder
from ..encoders.view_encoder import load_encoder
from ..scenes.small_models import small_model
from ..scenes.tokenizer import scenes_tokenizer
from .collection import Collection
from .index import INDEX, build_index, check_index, embed_collection, find_regions, open_index, shards
from .sheet import draw_sheet

DEMO = "runs/demo/cloc"
# What a folder was made with, so that queries are embedded by the same model.
SETTINGS = "embedding.json"

EMBED = """\
Embeds the regions of a collection and indexes them. `pixclip-hf search` then finds them by text.

  pixclip-hf embed                                        # 200 drawn scenes, the demo's CLOC
  pixclip-hf embed --images photos --output_dir runs/photos
  pixclip-hf embed --images photos --detector PekingU/rtdetr_r50vd --output_dir runs/objects
  pixclip-hf embed --dataset my-regions --model runs/demo/pixclip --output_dir runs/regions

Regions come from the annotations of a dataset in the record schema, from an object detector, or from a grid of
windows. The folder then holds the embeddings as Parquet shards, a FAISS index, and report.json. docs/search.md
explains large collections.
"""
SEARCH = """\
Finds the regions of a collection that `pixclip-hf embed` has embedded, by text of any length.

  pixclip-hf search --query "a red mug with a chipped rim" --index_dir runs/photos
  pixclip-hf search                                       # what three regions of runs/search are known to show

It prints the hits, draws them into hits.png, and adds its times to report.json.
"""


def load(name: str, prompt: str | None = None) -> tuple[Encoder, bool]:
    """The encoder of a model, and whether it is trained: an untrained one replaces a demo that has not run."""
    trained = name != DEMO or Path(name).exists()
    if trained:
        encoder = load_encoder(name, prompt=prompt)
    else:
        print(f"{name} does not exist (`make demo` makes it): an untrained model takes its place, so hits are random.")
        torch.manual_seed(0)
        encoder = RegionEncoder(*small_model("cloc", scenes_tokenizer()), prompt)
    return encoder, trained


def embed(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Embeds and indexes a collection as the arguments say.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        What report.json holds.

    Raises:
        ValueError: the folder holds embeddings already, or the collection has no region.
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf embed", description=EMBED, formatter_class=HelpFormatter)
    parser.add_argument("--model", default=DEMO, help="folder or Hub id of a CLOC or PixCLIP, or any CLIP or SigLIP")
    parser.add_argument(
        "--prompt",
        choices=("box", "mask"),
        help="what prompts the regions; by default what the model is usually prompted with",
    )
    parser.add_argument("--images", help="folder of images, read with all its subfolders")
    parser.add_argument("--dataset", help="folder or Hub id of a dataset in the record schema, for its regions")
    parser.add_argument("--split", default=Collection.split, help="split of the dataset")
    parser.add_argument(
        "--source",
        nargs="+",
        help="annotated images of any format: a kind and its arguments, `coco annotations=i.json images=val2017`",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=Collection.scenes,
        help="number of drawn scenes, where neither --images, --dataset nor --source is given",
    )
    parser.add_argument("--detector", help="object detector of transformers for --images, in place of the grid")
    parser.add_argument(
        "--detector_threshold", type=float, default=Collection.detector_threshold, help="least score of its boxes"
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs="+",
        default=list(Collection.grid),
        help="windows per side of an image of --images; each number is a size of window",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images per pass of the model")
    parser.add_argument("--index", default="Flat", help="FAISS index factory; Flat is exact, IVF1024,PQ32 small")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/search"), help="folder for shards and index")
    arguments = parser.parse_args(argv)
    names = ("images", "dataset", "split", "source", "scenes", "detector", "detector_threshold", "grid")
    collection = Collection(**{name: getattr(arguments, name) for name in names})
    folder = arguments.output_dir

    encoder, trained = load(arguments.model, arguments.prompt)
    check_index(arguments.index, encoder.encode_texts(["width"], show_progress_bar=False).shape[-1])
    settings = {
        "model": arguments.model,
        "trained": trained,
        "prompt": encoder.prompt if encoder.view is None else None,
        "collection": asdict(collection),
    }
    start = time.perf_counter()
    if not _lacks_its_index_alone(folder, settings):
        embed_collection(encoder, collection, folder, arguments.batch_size)
        write_json(folder / SETTINGS, settings)
    embedded = time.perf_counter()
    regions = build_index(folder, arguments.index)
    indexed = time.perf_counter()

    report = {
        "regions": len(regions),
        "pictures": len(set(regions["picture"])),
        "embed_seconds": embedded - start,
        "index_seconds": indexed - embedded,
        "parquet_bytes_a_region": sum(path.stat().st_size for path in shards(folder)) / len(regions),
        "index_bytes_a_region": (folder / INDEX).stat().st_size / len(regions),
    }
    write_json(folder / "report.json", report)
    show(report)
    print(f"written: {folder}")
    return report


def search(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Answers the queries that the arguments hold.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        What report.json holds now: the times of this search beside those of the embedding.

    Raises:
        ValueError: the folder holds no region, or no query is given where nothing is known about the regions.
        FileNotFoundError: the folder holds no index, or an image is no longer where it was embedded from.
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf search", description=SEARCH, formatter_class=HelpFormatter)
    parser.add_argument("--index_dir", type=Path, default=Path("runs/search"), help="folder of `pixclip-hf embed`")
    parser.add_argument("--query", nargs="+", help="texts; by default what three of the regions are known to show")
    parser.add_argument("--top", type=int, default=6, help="hits per query")
    parser.add_argument("--model", help="where the model of the embeddings is now; by default where it was")
    parser.add_argument("--output_dir", type=Path, help="folder for hits.png; that of the index by default")
    arguments = parser.parse_args(argv)
    folder = arguments.index_dir
    regions = open_index(folder)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    queries = arguments.query or list(dict.fromkeys(filter(None, regions["text"])))[:3]
    if not queries:
        raise ValueError("`--query` is needed: nothing is known about the windows of a grid.")
    name = arguments.model or settings["model"]
    encoder, trained = load(name)
    if arguments.model is None and trained != settings["trained"]:
        raise ValueError(
            f"{str(folder)!r} was embedded by an untrained model, and {name!r} is there now: embed again."
        )

    asked = time.perf_counter()
    embeds = encoder.encode_texts(queries, batch_size=len(queries), show_progress_bar=False)
    searched = time.perf_counter()
    hits = find_regions(regions, embeds, arguments.top)
    answered = time.perf_counter()

    images = Collection(**settings["collection"]).open_images({name for found in hits for name in found["picture"]})
    output = arguments.output_dir or folder
    output.mkdir(parents=True, exist_ok=True)
    draw_sheet(output / "hits.png", images, queries, hits, title=f"regions found by text, {name}")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report |= {
        "text_milliseconds_a_query": 1e3 * (searched - asked) / len(queries),
        "search_milliseconds_a_query": 1e3 * (answered - searched) / len(queries),
    }
    write_json(folder / "report.json", report)
    for query, found in zip(queries, hits, strict=True):
        print(query)
        for name, box, score in zip(found["picture"], found["box"], found["score"], strict=True):
            print(f"  {score:.3f}  {name}  {[round(side) for side in box]}")
    show(report)
    print(f"written: {output / 'hits.png'}")
    return report


def _lacks_its_index_alone(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether an earlier run has embedded all of this and then failed at its index, for too few regions perhaps."""
    path = folder / SETTINGS
    if not path.is_file() or (folder / INDEX).exists():
        return False
    return json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(settings))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(report: dict[str, Any]) -> None:
    for name, value in report.items():
        print(f"{name:<28} {value:,.2f}" if isinstance(value, float) else f"{name:<28} {value:,}")
