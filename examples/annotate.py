"""Makes a dataset of regions and texts out of images, or reports on one.

Without arguments for models everything is drawn, simulated or taken from the source, and named as such:

    python examples/annotate.py vesl --source scenes:200 --output runs/vesl
    python examples/annotate.py longgrit --source scenes:200 --output runs/longgrit
    python examples/annotate.py report runs/vesl

With models, a folder of images, and Ray on a node with GPUs:

    python examples/annotate.py vesl --source images folder=photos --engine ray --output runs/photos \
        --shard_size 1000 --captioner llava-hf/llava-1.5-7b-hf --detector google/owlv2-base-patch16-ensemble \
        --push_to_hub org/photos

Long captions of the regions of a dataset, by models behind two servers with OpenAI's chat API:

    python examples/annotate.py longgrit --source grit folder=GRIT --output runs/long \
        --segmenter facebook/sam-vit-huge --object_captioner org/vlm@http://a:8000/v1 --context_captioner org/vlm@http://a:8000/v1 \
        --verifier org/llm@http://b:8000/v1 --merger org/llm@http://b:8000/v1

A run that is started again goes on at the first shard that is not done. Its folder trains a model as it is:

    python examples/run_pretrain.py --dataset_name runs/vesl --output_dir runs/cloc
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from pixclip_hf.annotation.engines import ENGINES
from pixclip_hf.annotation.longgrit import LongGritArguments, longgrit_models, longgrit_stages
from pixclip_hf.annotation.report import report
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.vesl import VeslArguments, vesl_models, vesl_stages
from pixclip_hf.hub import publish_dataset

PIPELINES = {
    "vesl": (VeslArguments, vesl_stages, vesl_models),
    "longgrit": (LongGritArguments, longgrit_stages, longgrit_models),
}


@dataclass
class RunArguments:
    """Where images come from, where records go, and on what."""

    output: str = field(metadata={"help": "Folder of the run: data/, rejected/, shards/, report.md."})
    source: list[str] = field(
        default_factory=lambda: ["scenes:200"],
        metadata={
            "help": "What to annotate: a kind of source and its arguments, such as `images folder=photos`; a dataset "
            "in the record schema; or `scenes:NUMBER[:SEED]`. docs/data.md lists the kinds."
        },
    )
    engine: str = field(default="local", metadata={"help": "What runs the stages.", "choices": list(ENGINES)})
    workers: int = field(default=1, metadata={"help": "Actors of each stage with Ray."})
    shard_size: int = field(default=50, metadata={"help": "Images in a shard."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn at random."})
    pictures: int = field(default=4, metadata={"help": "Records to draw for the report."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id to push the finished dataset to."})
    license: str | None = field(default=None, metadata={"help": "Licence of the dataset, for its card."})


def main(argv: list[str]) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*PIPELINES, "report"])
    task, rest = parser.parse_args(argv[:1]).task, argv[1:]
    if task == "report":
        parser = argparse.ArgumentParser(prog="annotate.py report")
        parser.add_argument("output", type=Path)
        parser.add_argument("--pictures", type=int, default=4)
        arguments = parser.parse_args(rest)
        print(report(arguments.output, arguments.pictures))
        return arguments.output
    arguments_class, build_stages, name_models = PIPELINES[task]
    parser = HfArgumentParser((RunArguments, arguments_class), prog=f"annotate.py {task}")
    run, arguments = parser.parse_args_into_dataclasses(rest)
    output = annotate(
        run.source,
        build_stages(arguments, run.seed),
        run.output,
        engine=run.engine,
        workers=run.workers,
        shard_size=run.shard_size,
    )
    print(report(output, run.pictures))
    if run.push_to_hub is not None:
        publish_dataset(output, run.push_to_hub, task, models=name_models(arguments), license=run.license)
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
