"""Makes a dataset of regions and texts out of drawn scenes, from Python: the data of CLOC, without any model.

    python examples/annotate.py

`pixclip-hf annotate` does the same from the command line, with models, photographs and Ray.
"""

import argparse

from datasets import load_dataset

from pixclip_hf.annotation.report import report
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.vesl import VeslArguments, vesl_stages

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", nargs="+", default=["scenes:200"], help="such as images folder=photos")
parser.add_argument("--output", default="runs/annotation-example")
arguments = parser.parse_args()

# 1. The stages: a caption per image, the phrases in it, their boxes. The name of a model replaces a stand-in.
stages = vesl_stages(VeslArguments(captioner="captions", detector="simulated"))

# 2. Images in, shards of records out. A run that was killed continues here.
folder = annotate(arguments.source, stages, arguments.output)
print(report(folder))

# 3. The folder is a dataset in the record schema, ready for `pixclip-hf train --dataset_name`.
record = load_dataset(str(folder), split="train")[0]
for region in record["regions"]:
    print([round(side) for side in region["box"]], region["caption"])
