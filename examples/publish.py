"""Writes the folder that a trained model would be published as, from Python, and looks at its card.

    python examples/publish.py --model runs/demo/cloc --repo_id org/cloc

`pixclip_hf.publish` takes the same arguments and pushes in one commit; `pixclip-hf publish` does so from the command
line, for LoRA adapters too.
"""

import argparse

from transformers import AutoModel, AutoProcessor

from pixclip_hf.hub import write_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/cloc", help="output folder of a training run")
parser.add_argument("--repo_id", default="org/cloc", help="organization/name")
parser.add_argument("--output_dir", default="runs/publish-example", help="new or empty folder")
arguments = parser.parse_args()

# 1. The model as it was saved.
model, processor = AutoModel.from_pretrained(arguments.model), AutoProcessor.from_pretrained(arguments.model)

# 2. Weights, configuration, processor, code, and a card filled from the records of the run.
folder = write_folder(
    model, processor, arguments.output_dir, arguments.repo_id, run_folder=arguments.model, license="apache-2.0"
)

# 3. What a reader of the Hub would see.
print((folder / "README.md").read_text(encoding="utf-8"))
print(*sorted(path.name for path in folder.iterdir()))
