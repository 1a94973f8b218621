"""Finds the regions of drawn scenes by text, from Python.

    python examples/search_regions.py --model runs/demo/cloc

`pixclip-hf embed` and `pixclip-hf search` do the same for photographs and datasets; docs/search.md explains both.
"""

import argparse
from pathlib import Path

from pixclip_hf import load_encoder
from pixclip_hf.embedding.passes import EncoderChoice
from pixclip_hf.embedding.run import embed
from pixclip_hf.search.index import build_index, find_regions, open_images
from pixclip_hf.search.sheet import draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id of a CLOC or PixCLIP")
parser.add_argument("--scenes", type=int, default=200)
parser.add_argument("--output_dir", type=Path, default=Path("runs/search-example"))
arguments = parser.parse_args()

# 1. The regions of the collection, embedded into Parquet shards, and an exact index over them.
embed(f"scenes:{arguments.scenes}", EncoderChoice(arguments.model), arguments.output_dir, kinds=["region"])
regions = build_index(arguments.output_dir)

# 2. Texts are embedded into the same space: the nearest regions are the hits.
queries = ["a plain red disc", "a striped blue star"]
hits = find_regions(regions, load_encoder(arguments.model).encode_texts(queries), top=6)
for query, found in zip(queries, hits, strict=True):
    print(query)
    for name, box, score in zip(found["image_id"], found["box"], found["score"], strict=True):
        print(f"  {score:.3f}  {name}  {[round(side) for side in box]}")

# 3. A sheet with the hits of each query.
images = open_images(arguments.output_dir, hits)
draw_sheet(arguments.output_dir / "hits.png", images, queries, hits)
