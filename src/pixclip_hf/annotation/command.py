"""`pixclip-hf annotate`: makes a dataset of regions and texts out of images, or reports on one."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..command_help import HelpFormatter
from ..hub import dataset_files, publish_dataset
from ..jobs.passes import ENGINES
from ..outgoing import listing
from .longgrit import LongGritArguments, longgrit_models, longgrit_stages
from .report import report
from .run import annotate
from .vesl import VeslArguments, vesl_models, vesl_stages

DESCRIPTION = """\
Makes a dataset of regions and texts out of images, or reports on one.

tasks:
  vesl      the data of CLOC: new captions, their phrases, and the boxes of the phrases
  longgrit  the data of PixCLIP: one long, checked caption per region
  report    what became of a run, as text and pictures

Without arguments for models, texts and boxes are drawn, simulated or taken from the source, and recorded as such:

  pixclip-hf annotate vesl --source scenes:200 --output runs/vesl
  pixclip-hf annotate longgrit --source scenes:200 --output runs/longgrit
  pixclip-hf annotate report runs/vesl

With models, a folder of images, and Ray on a node with GPUs:

  pixclip-hf annotate vesl --source images folder=photos --engine ray --output runs/photos --shard_size 1000 \\
      --captioner llava-hf/llava-1.5-7b-hf --detector google/owlv2-base-patch16-ensemble --push_to_hub org/photos

Long captions for the regions of a dataset, by models behind two servers with OpenAI's chat API:

  pixclip-hf annotate longgrit --source grit folder=GRIT --output runs/long --segmenter facebook/sam-vit-huge \\
      --object_captioner org/vlm@http://a:8000/v1 --context_captioner org/vlm@http://a:8000/v1 \\
      --verifier org/llm@http://b:8000/v1 --merger org/llm@http://b:8000/v1

A run that is started again continues at the first shard that is not done. Its folder trains a model as it is:

  pixclip-hf train --dataset_name runs/vesl --output_dir runs/cloc

`pixclip-hf annotate vesl --help` and `pixclip-hf annotate longgrit --help` list the arguments.
"""
# Arguments, stages and names of the models.
PIPELINES: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    "vesl": (VeslArguments, vesl_stages, vesl_models),
    "longgrit": (LongGritArguments, longgrit_stages, longgrit_models),
}


@dataclass
class RunArguments:
    """Where images come from, where records go, and what runs the stages."""

    _argument_group_name = "run"

    output: str = field(metadata={"help": "Folder of the run: data/, rejected/, shards/, report.md."})
    source: list[str] = field(
        default_factory=lambda: ["scenes:200"],
        metadata={
            "help": "What to annotate: a kind of source and its arguments, such as `images folder=photos`; a dataset "
            "in the record schema; or `scenes:NUMBER[:SEED]`. docs/data.md lists the kinds."
        },
    )
    engine: str = field(default="local", metadata={"help": "What runs the stages.", "choices": list(ENGINES)})
    workers: int = field(default=1, metadata={"help": "Processes; with Ray, actors per group of stages."})
    shard_size: int = field(default=50, metadata={"help": "Maximum number of images per shard."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn at random."})
    pictures: int = field(default=4, metadata={"help": "Number of records to draw for the report."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id to push the finished dataset to."})
    dry_run: bool = field(default=False, metadata={"help": "List what `push_to_hub` would push, and push nothing."})
    license: str | None = field(default=None, metadata={"help": "License of the dataset, for its card."})


def main(argv: Sequence[str] | None = None) -> Path:
    """Annotates, reports and publishes as the arguments say.

    Args:
        argv: arguments of the command line; those of the process when None.

    Returns:
        The folder of the run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = "pixclip-hf annotate"
    parser = argparse.ArgumentParser(
        prog=prog, usage=f"{prog} TASK [ARGUMENT ...]", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("task", choices=[*PIPELINES, "report"], metavar="TASK", help="vesl, longgrit or report")
    task, rest = parser.parse_args(argv[:1]).task, argv[1:]
    if task == "report":
        parser = argparse.ArgumentParser(
            prog=f"{prog} report", description="Reports on a run.", formatter_class=HelpFormatter
        )
        parser.add_argument("output", type=Path, help="folder of the run")
        parser.add_argument("--pictures", type=int, default=4, help="number of records to draw")
        arguments = parser.parse_args(rest)
        print(report(arguments.output, arguments.pictures))
        return arguments.output
    arguments_class, build_stages, name_models = PIPELINES[task]
    parser = HfArgumentParser(
        (RunArguments, arguments_class),
        prog=f"{prog} {task}",
        usage=f"{prog} {task} --output FOLDER [--ARGUMENT VALUE ...]",
        description=arguments_class.__doc__,
        formatter_class=HelpFormatter,
    )
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
        card = {"models": name_models(arguments), "license": run.license}
        if run.dry_run:
            print(listing(dataset_files(output, run.push_to_hub, task, **card)))
        else:
            publish_dataset(output, run.push_to_hub, task, **card)
    return output
