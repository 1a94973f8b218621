"""Publishes a trained model: weights, configuration, processor, tokenizer, code and a card filled from its run.

    python examples/publish.py --model runs/demo/cloc --repo_id org/cloc --dry_run
    python examples/publish.py --model runs/demo/cloc --repo_id org/cloc --license apache-2.0 --private

The output of a LoRA run is published as adapters, whose base is on the Hub, or as a whole model:

    python examples/publish.py --model runs/lora --repo_id org/cloc-lora --base_model org/cloc
    python examples/publish.py --model runs/lora --repo_id org/cloc-tuned --merge

The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoModel, AutoProcessor

from pixclip_hf.hub import publish, write_folder


def load(folder: str):
    """Model and processor of a folder; adapters come wrapped around their base."""
    processor = AutoProcessor.from_pretrained(folder)
    adapters = Path(folder, "adapter_config.json")
    if not adapters.is_file():
        return AutoModel.from_pretrained(folder), processor
    from peft import PeftModel

    base = AutoModel.from_pretrained(json.loads(adapters.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder), processor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="output folder of a training run, or a folder of save_pretrained"
    )
    parser.add_argument("--repo_id", required=True, help="organisation/name")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, push nothing")
    parser.add_argument("--output_dir", help="folder of a dry run; by default runs/publish/<repo_id>")
    parser.add_argument("--private", action="store_true", default=None, help="of a repository that is made")
    parser.add_argument("--revision", help="branch to push to; main by default")
    parser.add_argument("--base_model", help="Hub id of the model that adapters belong to")
    parser.add_argument("--merge", action="store_true", help="add the adapters into the weights")
    parser.add_argument("--license", help="licence identifier of the Hub, for the card")
    parser.add_argument("--language", nargs="+", help="language codes, for the card")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the training data; by default what the run recorded")
    parser.add_argument("--evaluation_folder", help="output folder of an evaluation of this model, for the card")
    parser.add_argument("--max_shard_size", default="5GB", help="weights above it are split")
    arguments = parser.parse_args(argv)

    model, processor = load(arguments.model)
    names = ("base_model", "merge", "license", "language", "datasets", "evaluation_folder", "max_shard_size")
    options = {name: getattr(arguments, name) for name in names} | {"run_folder": arguments.model}
    if arguments.dry_run:
        folder = arguments.output_dir or Path("runs/publish", arguments.repo_id)
        print(f"written: {write_folder(model, processor, folder, arguments.repo_id, **options)}")
    else:
        commit = publish(
            model,
            processor,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            **options,
        )
        print(f"published: {commit.commit_url}")


if __name__ == "__main__":
    main(sys.argv[1:])
