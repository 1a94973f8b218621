"""`pixclip-hf search`: queries by text, region and image over a folder of embeddings."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_help import HelpFormatter
from ..data.whole_files import whole_file
from ..embedding.folder import KINDS
from .collection import Collection, Hit
from .queries import Query
from .sheet import draw_sheet
from .store import Filter
from .store_arguments import add_store_arguments, store_options

SEARCH = """\
Finds the regions of a collection that `pixclip-hf embed` has embedded, by texts of any length, by regions of other
images, by whole images, or by what the collection itself holds.

  pixclip-hf search runs/photos "a red mug with a chipped rim" "a dog asleep on a sofa"
  pixclip-hf search runs/photos --image desk.jpg --box 40 60 200 180
  pixclip-hf search runs/photos --image desk.jpg --points 120 90 --points 30 40 60 45
  pixclip-hf search runs/photos --id "desk.jpg#3" --fold 0.98
  pixclip-hf search runs/photos "a mug" --negative "a red mug" --min_side 32 --category cup mug
  pixclip-hf search runs/photos                           # what three of its regions are known to show

The first search of a folder builds its store, later ones add what was embedded since. It prints the hits, draws them
into hits.png, and writes them to hits.jsonl.
"""


def search(argv: Sequence[str] | None = None) -> list[list[Hit]]:
    """Answers the queries that the arguments hold.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        The hits of each query.

    Raises:
        ValueError: as [`Collection`] and [`Collection.search`]; or no query is given where nothing is known about
            the regions.
        FileNotFoundError: an image is no longer where it was embedded from.
    """
    # Texts may stand behind options.
    arguments = _parser().parse_intermixed_args(argv)
    began = time.perf_counter()
    collection = Collection(
        arguments.folder,
        arguments.store,
        store_options(arguments),
        place=arguments.store_dir,
        model=arguments.model,
        revision=arguments.revision,
        source=arguments.source,
    )
    try:
        opened = time.perf_counter()
        queries = _queries(arguments, collection)
        if any(query.id is None for query in queries) or arguments.negative:
            _ = collection.encoder  # loads it, which is no part of the time of a query
        asked = time.perf_counter()
        where = Filter(
            tuple(arguments.kinds),
            tuple(arguments.category),
            arguments.min_score,
            arguments.min_side,
            arguments.min_share,
            arguments.max_share,
        )
        hits = collection.search(queries, arguments.top, where, arguments.fold)
        answered = time.perf_counter()
        print(f"{len(collection):,} embeddings, opened in {opened - began:.2f} s", end=", ")
        print(f"{1e3 * (answered - asked) / len(queries):.1f} ms per query")
        _write(arguments.output_dir or arguments.folder, collection, queries, hits)
    finally:
        collection.close()
    return hits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pixclip-hf search",
        usage='pixclip-hf search DIR ["TEXT" ...] [--image FILE [--box X0 Y0 X1 Y1 | --mask FILE | --points X Y ...]] '
        "[--id ID ...] [options]",
        description=SEARCH,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of `pixclip-hf embed`")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a query each")
    parser.add_argument("--image", help="image to look for, or that has the regions to look for")
    parser.add_argument(
        "--box", type=float, nargs=4, action="append", default=[], help="region of the image in pixels; repeatable"
    )
    parser.add_argument("--mask", action="append", default=[], help="file with a mask of the image; repeatable")
    parser.add_argument(
        "--points",
        type=float,
        nargs="+",
        action="append",
        default=[],
        metavar="X Y",
        help="points on a region of the image in pixels, for a model that points prompt; repeatable",
    )
    parser.add_argument("--id", nargs="+", default=[], help="ids of embeddings of the collection")
    parser.add_argument("--negative", nargs="+", default=[], help="texts that hits of every query should be unlike")
    parser.add_argument("--top", type=int, default=6, help="hits per query")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["region"], help="what may be a hit")
    parser.add_argument("--category", nargs="+", default=[], help="categories that hits may have")
    parser.add_argument("--min_score", type=float, help="least confidence of a region")
    parser.add_argument("--min_side", type=float, help="least shorter side of a box in pixels")
    parser.add_argument("--min_share", type=float, help="least area of a box as a share of its image")
    parser.add_argument("--max_share", type=float, help="greatest area of a box as a share of its image")
    parser.add_argument("--fold", type=float, help="cosine from which on a hit is a duplicate of a better one")
    add_store_arguments(parser, "lance", "what holds and searches the embeddings")
    parser.add_argument("--model", help="where the model of the embeddings is now; by default where it was")
    parser.add_argument("--revision", help="of the model on the Hub; by default that of the embeddings")
    parser.add_argument(
        "--source", nargs="+", help="where the images are now, as `embed` takes it; by default where they were"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for hits.png and hits.jsonl; DIR by default")
    return parser


def _queries(arguments: argparse.Namespace, collection: Collection) -> list[Query]:
    negative = tuple(arguments.negative)
    if arguments.image is None and (arguments.box or arguments.mask or arguments.points):
        raise ValueError("`--box`, `--mask` and `--points` need the `--image` that they are in.")
    queries = [Query(text=text, negative=negative) for text in arguments.texts]
    image = arguments.image
    queries += [Query(image=image, box=box, negative=negative) for box in arguments.box]
    queries += [Query(image=image, mask=_open_mask(mask), negative=negative) for mask in arguments.mask]
    for points in arguments.points:
        if len(points) % 2:
            raise ValueError(f"`--points` must be pairs of x and y, got {len(points)} numbers.")
        pairs = list(zip(points[::2], points[1::2], strict=True))
        queries.append(Query(image=image, points=pairs, negative=negative))
    if image is not None and not (arguments.box or arguments.mask or arguments.points):
        queries.append(Query(image=image, negative=negative))
    queries += [Query(id=name, negative=negative) for name in arguments.id]
    queries = queries or [Query(text=text, negative=negative) for text in collection.known_texts(3)]
    if not queries:
        raise ValueError("A query is needed, a text or `--image` or `--id`: the collection knows no texts of its own.")
    return queries


def _open_mask(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as mask:
        return mask.convert("L").point(lambda value: 255 * (value >= 128))


def _write(folder: Path, collection: Collection, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> None:
    """Prints the hits and writes them as a sheet and as lines of JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "hits.jsonl") as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for query, found in zip(queries, hits, strict=True):
            print(query.label)
            for rank, hit in enumerate(found, 1):
                box = "" if hit.box is None else [round(edge) for edge in hit.box]
                folded = f"  and {len(hit.duplicates)} duplicates" if hit.duplicates else ""
                print(f"  {hit.cosine:.3f}  {hit.id}  {box}  {hit.category or ''}{folded}".rstrip())
                file.write(json.dumps({"query": query.label, "rank": rank, **hit.as_dict()}) + "\n")
            if not found:
                print("  nothing meets the filters")
    sys.stdout.flush()  # the answer is there; the sheet takes longer
    images = collection.open_images(hit for found in hits for hit in found)
    draw_sheet(
        folder / "hits.png",
        images,
        queries,
        hits,
        title=f"{collection.folder.path.name}: {len(collection):,} embeddings",
    )
    print(f"written: {folder / 'hits.png'}, {folder / 'hits.jsonl'}")
