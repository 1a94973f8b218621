"""The demo: trains a small CLOC or PixCLIP on scenes, evaluates it on unseen ones, and uses it from the pipeline.

    python examples/demo.py --model cloc --seed 0

CLOC starts from random weights, and so does the CLOC of `--model cloc-points`, which points may prompt too. PixCLIP
inherits: both towers come from such a CLOC, which is trained first unless the demo of CLOC has run with this seed and
this code.

It begins with what it will do and how long that takes on this machine, from a few timed steps, and ends with three
commands to try next. Everything lands in runs/demo/<model>, with the code of model, processor and pipelines and a
model card: the folder loads with AutoModel, AutoProcessor and pipeline, here or where the package is not installed.
"""

import argparse
import sys
from pathlib import Path

import datasets
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.utils import logging

from pixclip_hf.cards import write_card
from pixclip_hf.data.whole_files import write_json
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.estimate import in_words, seconds_of_measuring, seconds_of_training
from pixclip_hf.scenes.measures import evaluate_scenes
from pixclip_hf.scenes.recipes import RECIPES, find_stage, model_type_of, start_from_towers, train_stage
from pixclip_hf.scenes.report import describe_regions, draw_front, draw_page, report

TEST_IMAGES = 1000


def measure(folder: Path, seed: int, setting: str = "default") -> dict[str, float]:
    """The measures of a saved model on unseen scenes."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    scenes = [make_scene(i, "test", seed, setting=setting) for i in range(TEST_IMAGES)]
    return evaluate_scenes(model, processor, scenes)


def announce(recipe: str, stages: list[str], folder: Path) -> None:
    """Says what will be done, and how long it takes here.

    Args:
        recipe: what is demonstrated.
        stages: the recipes that will be trained, in their order.
        folder: where everything goes.
    """
    print("This demo will, as soon as a few steps are timed,\n", flush=True)
    parts = []
    for stage in stages:
        start = "random weights" if model_type_of(stage) == "cloc" else "the towers of such a CLOC"
        steps = int(RECIPES[stage][1])
        parts.append(
            (f"train a small {model_type_of(stage)} from {start}, {steps:,} steps", seconds_of_training(stage))
        )
    inherits = model_type_of(recipe) == "pixclip"
    text = f"measure it on {TEST_IMAGES:,} unseen scenes and as many harder ones"
    text += ", and the towers that it began with" if inherits else ""
    parts.append((text, (2 + inherits) * seconds_of_measuring(recipe, TEST_IMAGES)))
    for number, (text, seconds) in enumerate(parts, 1):
        print(f"  {number}. {text}: about {in_words(seconds)}")
    print(f"  {len(parts) + 1}. draw two pictures, write a report and a model card")
    total = in_words(sum(seconds for _, seconds in parts))
    print(f"\nand leave everything in {folder}: about {total} on this machine.\n", flush=True)


def use_pipeline(folder: Path, seed: int) -> None:
    """The saved folder in a pipeline: each region among the captions of its scene, ✓ where its own comes first."""
    scene = make_scene(0, "test", seed)
    regions = scene["regions"]
    captions = [region["caption"] for region in regions]
    classify = pipeline("zero-shot-region-classification", model=str(folder))
    if classify.model.config.model_type == "pixclip":
        prompts = {"masks": [region["mask"] for region in regions]}
    else:
        prompts = {"boxes": [region["box"] for region in regions]}
    print("The folder in a pipeline, the regions of one scene among their captions:\n")
    results = classify(scene["image"], **prompts, candidate_labels=list(dict.fromkeys(captions)))
    for caption, found in zip(captions, results, strict=True):
        best, score = found["labels"][0], found["scores"][0]
        print(f"  {'✓' if best == caption else '✗'} {best:<28} {score:.2f}  is {caption}")


def next_commands(folder: Path) -> list[str]:
    """Three commands to try next."""
    program = Path(sys.executable).with_name("pixclip-hf")
    if not program.is_file():
        program = Path("pixclip-hf")
    elif program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return [
        f"{program} embed --source scenes:200:1 --model {folder} --output {folder}-search",
        f'{program} search {folder}-search "a plain red disc" "a striped blue star"',
        f"{program} app --model {folder} --index {folder}-search",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RECIPES), default="cloc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    seed, folder = arguments.seed, arguments.output_dir / arguments.model

    # 1. Say what will happen. PixCLIP needs the towers of a CLOC.
    stages = [arguments.model]
    places = (arguments.output_dir / "cloc", folder / "towers")
    if model_type_of(arguments.model) == "pixclip" and not any(find_stage("cloc", seed, place) for place in places):
        stages.insert(0, "cloc")
    announce(arguments.model, stages, folder)

    # 2. Train.
    towers = {}
    if model_type_of(arguments.model) == "cloc":
        stage = train_stage(arguments.model, seed, folder)
    else:
        source = arguments.output_dir / "cloc"
        first = find_stage("cloc", seed, source)
        if first is None:
            source = folder / "towers"
            first = find_stage("cloc", seed, source) or train_stage("cloc", seed, source)
        start = folder / "start"
        start_from_towers(source, start)
        stage = train_stage("pixclip", seed, folder, start)
        towers = {"towers_seconds": first["seconds"]}
        towers |= {f"towers_{name}": value for name, value in measure(start, seed).items()}

    # 3. Measure, on scenes that it has not seen.
    run = {"dataset": "scenes", "split": "test", "seed": seed}
    run |= {"train_steps": int(RECIPES[arguments.model][1]), "train_seconds": stage["seconds"]}
    hard = {f"hard_{name}": value for name, value in measure(folder, seed, "hard").items()}
    metrics = {**run, **measure(folder, seed), **hard, **towers}
    write_json(folder / "metrics.json", metrics)

    # 4. Show: a table, two pictures, the card, and the folder in a pipeline.
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    draw_front(model, processor, folder, seed)
    draw_page(model, processor, folder, seed)
    answers = describe_regions(model, processor, seed)
    print(report(model_type_of(arguments.model), metrics, folder, answers))
    write_card(folder, str(folder))
    use_pipeline(folder, seed)
    print(f"\nwritten: {folder}\n\nTry next:\n")
    for command in next_commands(folder):
        print(f"  {command}")


def be_quiet() -> None:
    """Leaves out bars other than those of trainings, and the warning of a measure that cuts texts on purpose."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.get_logger("pixclip_hf.processing.processing_text").setLevel(logging.ERROR)


if __name__ == "__main__":
    be_quiet()
    main()
