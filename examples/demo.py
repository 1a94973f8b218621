"""The demo: trains a small CLOC or PixCLIP on scenes, evaluates it on unseen ones, and uses it from the pipeline.

    python examples/demo.py --model cloc --seed 0

Everything lands in runs/demo/<model>, with the code of model, processor and pipelines and a model card: the folder
loads with AutoModel, AutoProcessor and pipeline, here or where the package is not installed.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from run_pretrain import main as run_pretrain
from transformers import AutoModel, AutoProcessor, pipeline

from pixclip_hf import RegionEncoder
from pixclip_hf.cards import write_card
from pixclip_hf.data.scenes import all_descriptions, late_detail_pairs, make_scene, same_box_pairs
from pixclip_hf.evaluation.report import markdown_table, share
from pixclip_hf.evaluation.scenes import evaluate_scenes
from pixclip_hf.processing.processing_regions import decode_rle
from pixclip_hf.visualization import draw_regions, similarity_map

# Steps and batch sizes that stay within the training time of the README on two CPU cores.
RECIPES = {
    "cloc": [
        "--max_steps", "1800", "--per_device_train_batch_size", "32", "--warmup_steps", "100",
        "--region_text", "caption", "category",
    ],
    "pixclip": [
        "--max_steps", "700", "--per_device_train_batch_size", "16", "--warmup_steps", "150",
        "--regions_per_image", "4", "--region_text", "long_caption", "caption",
    ],
}  # fmt: skip
COMMON = [
    "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--weight_decay", "0.05", "--adam_beta2", "0.98",
    "--logging_steps", "100", "--save_strategy", "no", "--report_to", "none", "--dataloader_drop_last", "True",
]  # fmt: skip
TEST_IMAGES = 1000


def train(model_type: str, seed: int, folder: Path) -> float:
    """Trains into `folder`; returns the seconds spent in training."""
    start = time.perf_counter()
    trainer = run_pretrain(
        ["--model_type", model_type, "--output_dir", str(folder), "--seed", str(seed), "--scenes_seed", str(seed)]
        + RECIPES[model_type]
        + COMMON
    )
    print(f"set-up, training and saving took {time.perf_counter() - start:.0f} s")
    return next(log["train_runtime"] for log in reversed(trainer.state.log_history) if "train_runtime" in log)


def draw(model, processor, folder: Path, seed: int) -> None:
    """regions.png: an unseen scene, the best texts of its regions, and where the model sees one of them."""
    encoder = RegionEncoder(model, processor)
    masked = encoder.prompt == "mask"
    find = same_box_pairs if masked else late_detail_pairs
    scene = next(scene for scene in (make_scene(i, "test", seed) for i in range(10**6)) if find(scene))
    regions = scene["regions"]
    candidates = [region["long_caption"] for region in regions] if masked else all_descriptions()
    (embeds,) = encoder.encode_records([scene], convert_to_tensor=True)
    best = (embeds @ encoder.encode_texts(candidates, batch_size=128, convert_to_tensor=True).T).topk(
        2 if masked else 3
    )
    names = [region["caption"] for region in regions] if masked else candidates
    texts = [
        [(names[index], score) for index, score in zip(indices, scores, strict=True)]
        for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    captions = {index: candidates[index] if masked else regions[index]["caption"] for index in find(scene)[0]}
    maps = {
        regions[index]["caption"]: similarity_map(encoder, scene["image"], caption)
        for index, caption in captions.items()
    }
    draw_regions(
        folder / "regions.png",
        scene["image"],
        [region["box"] for region in regions],
        texts,
        maps,
        masks=[decode_rle(region["mask"]) for region in regions] if masked else None,
        title=f"{type(model).__name__} on an unseen scene",
    )


def report(model_type: str, metrics: dict, hard: dict, folder: Path) -> str:
    """report.md: what was measured, beside chance and the crop baseline."""
    rows = []
    if model_type == "cloc":
        for name, label, chance in (
            ("exact", "region description, exact of 256", "0.4 %"),
            ("texture", "… texture of 4", "25 %"),
            ("colour", "… colour of 8", "12.5 %"),
            ("shape", "… shape of 8", "12.5 %"),
        ):
            key = f"region_description_{name}"
            rows.append([label, *(share(m, key, "region_description_count") for m in (metrics, hard)), chance])
        key = "crop_description_exact"
        label = "region description from crops, same tower, exact"
        rows.append([label, *(share(m, key, "region_description_count") for m in (metrics, hard)), "0.4 %"])
    else:
        for name, label, chance in (
            ("same_box_by_mask", "same box, told apart by the mask", "50 %"),
            ("late_detail", "texts that differ only late, told apart", "50 %"),
            ("late_detail_cut_77", "… with the texts cut to 77 tokens", "50 %"),
            ("crop_same_box", "same box, from crops, same tower", "50 %"),
            ("crop_late_detail", "texts that differ only late, from crops", "50 %"),
        ):
            cells = [share(m, name, f"{name}_count") for m in (metrics, hard)]
            if name == "late_detail_cut_77":
                # The cut makes the texts equal: ties and no draws, a share without an error.
                cells = [f"{100 * m[name]:.1f} % of {int(m[f'{name}_count'])}" for m in (metrics, hard)]
            rows.append([label, *cells, chance])
    for name, label in (("image_to_text", "image to caption"), ("text_to_image", "caption to image")):
        key = f"{name}_recall@1"
        chance = f"{100 / metrics['image_count']:.1f} %"
        rows.append([f"{label}, recall@1", *(share(m, key, "image_count") for m in (metrics, hard)), chance])
    table = markdown_table(["measure", "scenes (objects 20–45 % of the side)", "hard (8–45 %)", "chance"], rows)
    text = (
        f"# {model_type} on scenes\n\n"
        f"Trained for {metrics['train_steps']} steps in {metrics['train_seconds']:.0f} s, seed {metrics['seed']}; "
        f"evaluated on {metrics['image_count']} unseen scenes. Shares with their standard error.\n\n{table}\n\n"
        "![regions](regions.png)\n"
    )
    (folder / "report.md").write_text(text)
    return text


def use_pipeline(folder: Path, seed: int) -> None:
    """The saved folder in the two pipelines."""
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
    folder = arguments.output_dir / arguments.model

    seconds = train(arguments.model, arguments.seed, folder)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    test, hard = (
        evaluate_scenes(
            model, processor, [make_scene(i, "test", arguments.seed, setting=setting) for i in range(TEST_IMAGES)]
        )
        for setting in ("default", "hard")
    )
    steps = int(RECIPES[arguments.model][1])
    run = {
        "dataset": "scenes",
        "split": "test",
        "seed": arguments.seed,
        "train_steps": steps,
        "train_seconds": seconds,
    }
    metrics = {**run, **test}
    metrics |= {f"hard_{name}": value for name, value in hard.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(model, processor, folder, arguments.seed)
    print(report(arguments.model, metrics, hard, folder))
    write_card(folder, str(folder))
    use_pipeline(folder, arguments.seed)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
