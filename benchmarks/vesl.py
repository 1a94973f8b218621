"""Does VESL matter? CLOC trained on regions of VESL and of its n-gram baseline, from the same scenes and detector.

    python benchmarks/vesl.py [--seeds 3] [--processes 2]

Four arms, from the same weights and scenes, with the whole-image captions of the source: only boxes and texts of the
regions differ. A scene that is left without a region drops out of an arm.

- `true captions`: the regions as they were drawn, the most that an annotation can give;
- `vesl`: noun phrases of a new caption. A scene's own caption stands in for the captioning model: it names every
  object, as one would hope of a model that sees the image;
- `alt text phrases`: VESL without the new caption, noun phrases of the noisy alt text;
- `ngrams`: the baseline, n-grams of the alt text.

Boxes are those of the simulated detector with its default errors. What is done lies in runs/vesl and is not done
again: 12 models with three seeds. The second table is paired as in benchmarks/ablation.py.
"""

import argparse
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from ablation import done_before, gain, keep, side_by_side
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor

from pixclip_hf import RegionEncoder
from pixclip_hf.annotation.run import annotate
from pixclip_hf.annotation.vesl import VeslArguments, vesl_stages
from pixclip_hf.data.sources import load_records
from pixclip_hf.evaluation.report import markdown_table
from pixclip_hf.evaluation.retrieval import retrieval_recall
from pixclip_hf.modeling.modeling_regions import box_iou
from pixclip_hf.scenes.dataset import COLORS, SHAPES, TEXTURES, make_scene
from pixclip_hf.scenes.measures import evaluate_scenes
from pixclip_hf.scenes.recipes import COMMON, RECIPES
from pixclip_hf.training.command import main as run_pretrain

ARMS = {
    "true captions": None,
    "vesl": VeslArguments(),
    "alt text phrases": VeslArguments(captioner="alt_text"),
    "ngrams": VeslArguments(candidates="ngrams"),
}
CLAIMS = (
    ("vesl", "ngrams", "VESL is better than n-grams of the alt text"),
    ("vesl", "alt text phrases", "the new caption is what helps"),
    ("true captions", "vesl", "true regions are better still"),
)
STEPS = 700
TRAIN_IMAGES, TEST_IMAGES = 4000, 400
FOLDER, MEASURED = Path("runs/vesl"), Path("benchmarks/measures/vesl")
CHECKED_IMAGES = 500
MEASURES = {
    "region_description_exact": "region description, exact of 256 (chance 0.4 %)",
    "region_description_texture": "… texture of 4 (25 %)",
    "region_description_color": "… color of 8 (12.5 %)",
    "region_description_shape": "… shape of 8 (12.5 %)",
    "region_to_text_recall@1": "region to text, recall@1",
    "text_to_region_recall@1": "text to region, recall@1",
    "image_to_text_recall@1": "image to caption, recall@1",
    "regions_per_image": "regions per image, in training",
    "whole_texts": "… whose text says texture, color and shape, all right",
    "wrong_texts": "… whose text says a wrong one",
}


def annotated(arguments: VeslArguments, seed: int, folder: Path) -> Path:
    """Scenes with the regions that the stages find and the captions that the source has, in `folder / "records"`."""
    source = f"scenes:{TRAIN_IMAGES}:{seed}"
    output = annotate(source, vesl_stages(arguments, seed), folder / "annotated", shard_size=500)
    records = load_records(str(output), "train")
    # VESL puts its caption, here an alt text, beside those of the source.
    records = records.map(
        lambda captions, alt_text: {"captions": [caption for caption in captions if caption != alt_text]},
        input_columns=["captions", "alt_text"],
    )
    records.save_to_disk(folder / "records")
    return folder / "records"


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Every measure of the scenes, and retrieval between all regions of the unseen scenes and their captions."""
    model, processor = (part.from_pretrained(folder) for part in (AutoModel, AutoProcessor))
    records = [make_scene(i, "test", seed) for i in range(TEST_IMAGES)]
    metrics = evaluate_scenes(model, processor, records)
    texts = [region["caption"] for record in records for region in record["regions"]]
    ids = torch.tensor([list(dict.fromkeys(texts)).index(text) for text in texts])
    encoder = RegionEncoder(model, processor)
    regions = torch.cat(encoder.encode_records(records, batch_size=64, convert_to_tensor=True))
    forth, back = retrieval_recall(regions, encoder.encode_texts(texts, batch_size=128, convert_to_tensor=True), ids)
    return {**metrics, "region_to_text_recall@1": forth, "text_to_region_recall@1": back}


def check_texts(folder: Path, seed: int) -> dict[str, float]:
    """How many regions an annotated image has, and what share of their texts is whole, and wrong, as seen from the
    drawn object that a box overlaps most."""
    looks = {*COLORS, *SHAPES, *TEXTURES}
    records = load_dataset(str(folder / "annotated"), split="train").select_columns(["record_id", "regions"])
    whole, wrong, count = 0, 0, 0
    for record in records:
        index = int(record["record_id"].rsplit("-", 1)[1])
        if index >= CHECKED_IMAGES:
            break
        drawn = make_scene(index, "train", seed)["regions"]
        boxes = torch.tensor([region["box"] for region in drawn])
        for region in record["regions"]:
            said = set(region["caption"].lower().split()) & looks
            overlaps = box_iou(torch.tensor(region["box"]), boxes)
            # Of objects with one box, the one that the text fits best.
            nearest = (overlaps == overlaps.max()).nonzero()[:, 0].tolist()
            true = max(
                (set(drawn[i]["caption"].split()) & looks for i in nearest), key=lambda words: len(words & said)
            )
            whole, wrong, count = whole + (said == true), wrong + bool(said - true), count + 1
    images = min(CHECKED_IMAGES, TRAIN_IMAGES)
    return {"regions_per_image": count / images, "whole_texts": whole / count, "wrong_texts": wrong / count}


def plan(name: str, seed: int) -> tuple[Path, dict]:
    """Where the measures of an arm's model go, and its recipe."""
    arguments = ARMS[name]
    return MEASURED / f"{name.replace(' ', '_')}-{seed}.json", {
        # VESL gives regions no category.
        "arguments": ["--max_steps", str(STEPS), *RECIPES["cloc"][2:], *COMMON, "--region_text", "caption"],
        "annotation": arguments and asdict(arguments),
        "train_images": TRAIN_IMAGES,
        "test_images": TEST_IMAGES,
    }


def run(name: str, seed: int) -> dict[str, float]:
    """Measures of an arm, trained unless that was done before.

    Raises:
        ValueError: it was done with another recipe.
    """
    arguments = ARMS[name]
    file, recipe = plan(name, seed)
    if (metrics := done_before(file, recipe)) is not None:
        return metrics
    folder = FOLDER / file.stem
    if arguments is None:
        data = ["--scenes_train_images", str(TRAIN_IMAGES), "--scenes_seed", str(seed)]
    else:
        data = ["--dataset_name", str(annotated(arguments, seed, folder))]
    run_pretrain(
        ["--model_type", "cloc", "--output_dir", str(folder / "trained"), "--seed", str(seed)]
        + [*recipe["arguments"], *data, "--disable_tqdm", "True"]
    )
    metrics = evaluate(folder / "trained", seed)
    if arguments is not None:
        metrics |= check_texts(folder, seed)
    keep(file, recipe, metrics)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="models side by side")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    side_by_side(run, plan, [[(name, seed) for seed in seeds for name in ARMS]], arguments.processes)
    found = {name: [run(name, seed) for seed in seeds] for name in ARMS}

    rows = [[label, *(cell(found[name], measure) for name in ARMS)] for measure, label in MEASURES.items()]
    measured = markdown_table([f"{STEPS} steps, {len(seeds)} seeds", *ARMS], rows)
    exact = {name: [100 * metrics["region_description_exact"] for metrics in runs] for name, runs in found.items()}
    rows, points = [], {}
    for better, worse, claim in CLAIMS:
        mean, error, verdict = gain([one - other for one, other in zip(exact[better], exact[worse], strict=True)])
        rows.append([claim, f"{better} – {worse}", f"{mean:+.1f} ± {error:.1f}", verdict])
        points[f"{better}_less_{worse}".replace(" ", "_")] = mean
    header = ["claim", "region description, exact", f"points, {len(seeds)} seeds", "here"]
    tables = f"{measured}\n\n{markdown_table(header, rows)}"
    (FOLDER / "table.md").write_text(tables + "\n", encoding="utf-8")
    print(tables)
    ratio = statistics.mean(exact["vesl"]) / statistics.mean(exact["ngrams"]) if any(exact["ngrams"]) else None
    print(json.dumps({"vesl_over_ngrams": ratio, **points}))


def cell(runs: list[dict[str, float]], measure: str) -> str:
    """Mean over seeds and its standard error."""
    if measure not in runs[0]:
        return "–"
    values = [metrics[measure] for metrics in runs]
    mean, error, _ = gain(values)
    if measure == "regions_per_image":
        return f"{mean:.2f} ± {error:.2f}"
    return f"{100 * mean:.1f} ± {100 * error:.1f} %"


if __name__ == "__main__":
    main()
