"""Measures a model on two tasks, from Python, and writes results.json and results.md.

    python examples/run_evaluation.py --model runs/demo/cloc

`pixclip-hf evaluate` does the same from the command line, for every task; docs/evaluation.md explains them.
"""

import argparse

from pixclip_hf import load_encoder
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.evaluation.report import write_results
from pixclip_hf.evaluation.tasks import run_task

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id; a CLIP or SigLIP works too")
parser.add_argument("--data", default="scenes:200:0", help="folder of a dataset, or drawn scenes by number and seed")
parser.add_argument("--output_dir", default="runs/evaluation-example")
arguments = parser.parse_args()

# 1. What embeds images, regions and texts. The cache asks the model once for what several tasks need.
encoder = CachedEncoder(load_encoder(arguments.model), progress=False)

# 2. A task gives one result or several: measures with their intervals and the name of the protocol.
results = []
for task in ("region-classification", "region-retrieval"):
    results += run_task(encoder, task, arguments.data)
for result in results:
    print(f"{result.task} by {result.protocol}")
    for name, value in result.metrics.items():
        print(f"  {name:<32} {value:.3f}")

# 3. Tables for readers, and the file that a model card is filled from.
write_results(arguments.output_dir, arguments.model, results)
