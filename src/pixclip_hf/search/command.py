"""`pixclip-hf search`: queries by text over a folder of embeddings."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_help import HelpFormatter
from ..embedding.folder import EmbeddingFolder
from ..encoders.view_encoder import load_encoder
from .index import INDEX, build_index, check_index, find_regions, open_images, open_index
from .sheet import draw_sheet

SEARCH = """\
Finds the regions of a collection that `pixclip-hf embed` has embedded, by text of any length.

  pixclip-hf search --query "a red mug with a chipped rim" --index_dir runs/photos
  pixclip-hf search                                       # what three regions of runs/search are known to show

The first search of a folder indexes it. It prints the hits, draws them into hits.png, and writes its times to
report.json.
"""


def search(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Answers the queries that the arguments hold.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        What report.json holds now: the times of this search.

    Raises:
        ValueError: the folder holds no region, the index does not fit its embeddings,
            or no query is given where nothing is known about the regions.
        FileNotFoundError: an image is no longer where it was embedded from.
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf search", description=SEARCH, formatter_class=HelpFormatter)
    parser.add_argument("--index_dir", type=Path, default=Path("runs/search"), help="folder of `pixclip-hf embed`")
    parser.add_argument("--query", nargs="+", help="texts; by default what three of the regions are known to show")
    parser.add_argument("--top", type=int, default=6, help="hits per query")
    parser.add_argument("--index", default="Flat", help="FAISS index factory; Flat is exact, IVF1024,PQ32 small")
    parser.add_argument("--model", help="where the model of the embeddings is now; by default where it was")
    parser.add_argument("--output_dir", type=Path, help="folder for hits.png; that of the index by default")
    arguments = parser.parse_args(argv)
    folder = arguments.index_dir
    settings = EmbeddingFolder.open(folder).settings
    check_index(arguments.index, settings["width"])
    began = time.perf_counter()
    has_index = (folder / INDEX).is_file()
    regions = open_index(folder) if has_index else build_index(folder, arguments.index)
    opened = time.perf_counter()
    queries = arguments.query or list(dict.fromkeys(filter(None, regions["text"])))[:3]
    if not queries:
        raise ValueError("`--query` is needed: nothing is known about the windows of a grid.")
    name = arguments.model or settings["model"]
    encoder = load_encoder(name, settings["view"] or "crop", prompt=settings["prompt"])

    asked = time.perf_counter()
    embeds = encoder.encode_texts(queries, batch_size=len(queries), show_progress_bar=False)
    searched = time.perf_counter()
    hits = find_regions(regions, embeds, arguments.top)
    answered = time.perf_counter()

    images = open_images(folder, hits)
    output = arguments.output_dir or folder
    output.mkdir(parents=True, exist_ok=True)
    draw_sheet(output / "hits.png", images, queries, hits, title=f"regions found by text, {name}")
    report = {
        "regions": len(regions),
        "index_seconds": opened - began,
        "index_bytes_a_region": (folder / INDEX).stat().st_size / len(regions),
        "text_milliseconds_a_query": 1e3 * (searched - asked) / len(queries),
        "search_milliseconds_a_query": 1e3 * (answered - searched) / len(queries),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for query, found in zip(queries, hits, strict=True):
        print(query)
        for image, box, score in zip(found["image_id"], found["box"], found["score"], strict=True):
            print(f"  {score:.3f}  {image}  {[round(side) for side in box]}")
    for entry, value in report.items():
        print(f"{entry:<28} {value:,.2f}" if isinstance(value, float) else f"{entry:<28} {value:,}")
    print(f"written: {output / 'hits.png'}")
    return report
