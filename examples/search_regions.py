"""Finds the regions of drawn scenes by text and by region, from Python.

    python examples/search_regions.py --model runs/demo/cloc

`pixclip-hf embed` and `pixclip-hf search` do the same for photographs and datasets; docs/search.md explains both.
"""

import argparse
from pathlib import Path

from pixclip_hf.embedding.encoder_choice import EncoderChoice
from pixclip_hf.embedding.run import embed
from pixclip_hf.search import Collection, Filter, Query
from pixclip_hf.search.sheet import draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id of a CLOC or PixCLIP")
parser.add_argument("--scenes", type=int, default=200)
parser.add_argument("--output_dir", type=Path, default=Path("runs/search-example"))
arguments = parser.parse_args()

# 1. The regions of the collection, embedded into Parquet shards.
embed(f"scenes:{arguments.scenes}", EncoderChoice(arguments.model), arguments.output_dir, kinds=["region"])

# 2. A store over them, which is built here and added to by later runs; texts find the nearest regions.
collection = Collection(arguments.output_dir)
queries = [Query(text="a plain red disc"), Query(text="a striped blue star")]
hits = collection.search(queries, top=6)

# 3. The best hit of the first query is a query itself, without stars and without duplicates.
queries.append(Query(id=hits[0][0].id, negative=("a star",)))
hits += collection.search(queries[-1], top=6, where=Filter(min_side=4), fold=0.999)
for query, found in zip(queries, hits, strict=True):
    print(query.label)
    for hit in found:
        print(f"  {hit.cosine:.3f}  {hit.id}  {[round(side) for side in hit.box]}")

# 4. A sheet with the hits of each query.
images = collection.open_images(hit for found in hits for hit in found)
draw_sheet(arguments.output_dir / "hits.png", images, queries, hits)
