"""The demo: trains a small CLOC or PixCLIP on scenes, evaluates it on unseen ones, and uses it from the pipeline.

    python examples/demo.py --model cloc --seed 0

CLOC starts from random weights, and so does the CLOC of `--model cloc-points`, which points may prompt too. PixCLIP
inherits: both towers come from such a CLOC, which is trained first unless the demo of CLOC has run with this seed and
this code.

Everything lands in runs/demo/<model>, with the code of model, processor and pipelines and a model card: the folder
loads with AutoModel, AutoProcessor and pipeline, here or where the package is not installed.
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoModel, AutoProcessor, pipeline

from pixclip_hf.cards import write_card
from pixclip_hf.data.whole_files import write_json
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.measures import evaluate_scenes
from pixclip_hf.scenes.recipes import RECIPES, find_stage, model_type_of, start_from_towers, train_stage
from pixclip_hf.scenes.report import draw_front, draw_page, report

TEST_IMAGES = 1000


def measure(folder: Path, seed: int, setting: str = "default") -> dict[str, float]:
    """The measures of a saved model on unseen scenes."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    scenes = [make_scene(i, "test", seed, setting=setting) for i in range(TEST_IMAGES)]
    return evaluate_scenes(model, processor, scenes)


def use_pipeline(folder: Path, seed: int) -> None:
    """The saved folder in a pipeline."""
    scene = make_scene(0, "test", seed)
    boxes = [region["box"] for region in scene["regions"]]
    regions = pipeline("region-feature-extraction", model=str(folder))(scene["image"], boxes=boxes)
    for region, found in zip(scene["regions"], regions, strict=True):
        norm = np.linalg.norm(found["embedding"])
        print(f"{region['caption']:<28} {found['box']}  {len(found['embedding'])} numbers, norm {norm:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RECIPES), default="cloc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    seed, folder = arguments.seed, arguments.output_dir / arguments.model

    # 1. Train; PixCLIP from the towers of a CLOC.
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

    # 2. Measure, on scenes that it has not seen.
    run = {"dataset": "scenes", "split": "test", "seed": seed}
    run |= {"train_steps": int(RECIPES[arguments.model][1]), "train_seconds": stage["seconds"]}
    hard = {f"hard_{name}": value for name, value in measure(folder, seed, "hard").items()}
    metrics = {**run, **measure(folder, seed), **hard, **towers}
    write_json(folder / "metrics.json", metrics)

    # 3. Show: a table, two pictures, the card, and the folder in a pipeline.
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    draw_front(model, processor, folder, seed)
    draw_page(model, processor, folder, seed)
    print(report(model_type_of(arguments.model), metrics, folder))
    write_card(folder, str(folder))
    use_pipeline(folder, seed)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
