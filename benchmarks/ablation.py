"""The claims of both papers on scenes: small models trained with and without each part, seed by seed.

    python benchmarks/ablation.py [--seeds 3] [--arms cloc/base cloc/roi_align …]

Every arm trains from the same weights, scenes and batches as the base of its family, on the recipe of the demo with
fewer steps; three seeds. The table holds the mean difference to the base over seeds with its standard error. What is
done lies in runs/ablation and is not done again. All arms are 42 models of three to five minutes on two CPU cores.

Captions of VESL against n-grams of the alt text, on annotated data, are in benchmarks/vesl.py.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

from pixclip_hf.data.scenes import make_scene
from pixclip_hf.data.tokenizer import scenes_tokenizer
from pixclip_hf.evaluation.report import markdown_table
from pixclip_hf.evaluation.scenes import CLIP_TOKENS, evaluate_scenes
from pixclip_hf.training.from_scratch import small_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import COMMON, RECIPES  # noqa: E402
from run_pretrain import main as run_pretrain  # noqa: E402

STEPS = {"cloc": 900, "pixclip": 400}
TEST_IMAGES = 400
FOLDER = Path("runs/ablation")


@dataclass(frozen=True)
class Arm:
    """A model with one thing changed.

    Args:
        claim: what the paper says of the base against this arm; none for an arm that others start from.
        measure: of `evaluate_scenes`.
        config: fields that are changed.
        arguments: of the training script, in place of the recipe's.
        text_tokens: the tokenizer's limit.
        other: measure of this arm, where it is not `measure`.
        before: an arm that this one goes on from.
    """

    claim: str
    measure: str
    config: dict = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    text_tokens: int | None = None
    other: str | None = None
    before: str | None = None


DESCRIBED, CAPTIONED, MASKED, DETAIL = (
    "region_description_exact",
    "image_to_text_recall@1",
    "same_box_by_mask",
    "late_detail",
)
CLIP = {"region_text_loss_weight": 0.0, "grounding_loss_weight": 0.0}
ARMS = {
    "cloc": {
        "base": Arm("", DESCRIBED),
        "clip": Arm(
            "CLOC describes regions better than CLIP on crops", DESCRIBED, CLIP, other="crop_description_exact"
        ),
        "clip_images": Arm("… and whole images no worse", CAPTIONED, CLIP),
        "roi_align": Arm("the Prompter is better than RoIAlign", DESCRIBED, {"region_readout": "roi_align"}),
        "no_grounding": Arm("the grounding loss helps", DESCRIBED, {"grounding_loss_weight": 0.0}),
        "text_filter": Arm(
            "leaving out negatives of similar text (0.9) helps; equal texts are left out in both",
            DESCRIBED,
            {"text_similarity_threshold": 0.9},
        ),
        "two_regions": Arm("4 regions an image are better than 2", DESCRIBED, {}, ("--regions_per_image", "2")),
    },
    "pixclip": {
        "base": Arm("", MASKED),
        "no_mask_text": Arm("branch 1 (mask and text) helps", MASKED, {"mask_text_loss_weight": 0.0}),
        "no_crop_text": Arm("branch 2 (crops) helps", MASKED, {"crop_text_loss_weight": 0.0}),
        "no_local_global": Arm("branch 3 (local and global) helps", MASKED, {"local_global_loss_weight": 0.0}),
        "cut_captions": Arm("long captions are better than cut ones", DETAIL, text_tokens=CLIP_TOKENS),
        "short": Arm("", DETAIL, {}, ("--region_text", "caption")),
        "lora": Arm("", DETAIL, {}, ("--lora_r", "8"), before="short"),
        "frozen": Arm(
            "LoRA on the text tower is better than a frozen one", DETAIL, {}, ("--freeze_text",), before="short"
        ),
    },
}
# What an arm is held against, where it is not the base of its family.
AGAINST = {"frozen": "lora"}
# An arm without a training of its own.
SAME_MODEL = {"clip_images": "clip"}


def start(family: str, arm: Arm, seed: int, folder: Path) -> None:
    """The untrained model of an arm: weights of the seed, the same in every arm of a family."""
    torch.manual_seed(seed)
    tokenizer = scenes_tokenizer()
    model, processor = small_model(family, tokenizer)
    for name, value in arm.config.items():
        setattr(model.config, name, value)
    if arm.config.get("region_readout") == "roi_align":
        del model.prompter.box_fc1, model.prompter.box_fc2
    if arm.text_tokens is not None:
        processor.tokenizer.model_max_length = arm.text_tokens
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run(family: str, name: str, seed: int) -> dict[str, float]:
    """Measures of an arm, trained unless that was done before."""
    name = SAME_MODEL.get(name, name)
    arm, folder = ARMS[family][name], FOLDER / family / f"{name}-{seed}"
    done = folder / "metrics.json"
    if done.is_file():
        return json.loads(done.read_text())
    if arm.before is None:
        begin = folder / "start"
        start(family, arm, seed, begin)
    else:
        run(family, arm.before, seed)
        begin = FOLDER / family / f"{arm.before}-{seed}" / "trained"
    recipe = ["--max_steps", str(STEPS[family]), *RECIPES[family][2:], *COMMON, *arm.arguments]
    run_pretrain(
        ["--model_type", family, "--model_name_or_path", str(begin), "--output_dir", str(folder / "trained")]
        + ["--seed", str(seed), "--scenes_seed", str(seed), "--disable_tqdm", "True"]
        + recipe
    )
    model, processor = (part.from_pretrained(folder / "trained") for part in (AutoModel, AutoProcessor))
    metrics = evaluate_scenes(model, processor, [make_scene(i, "test", seed) for i in range(TEST_IMAGES)])
    done.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def compare(family: str, name: str, seeds: int) -> list[str]:
    """A row of the table: claim, both measures, the difference over paired seeds, and what it says."""
    arm, against = ARMS[family][name], AGAINST.get(name, "base")
    own = [100 * run(family, name, seed)[arm.other or arm.measure] for seed in range(seeds)]
    base = [100 * run(family, against, seed)[arm.measure] for seed in range(seeds)]
    differences = [one - other for one, other in zip(base, own, strict=True)]
    # A claim is about the base; that of `text_filter` is about the arm itself.
    if name == "text_filter":
        differences = [-difference for difference in differences]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if seeds > 1 else float("nan")
    if name == "clip_images":
        verdict = "holds" if mean > -2 * error else "does not hold at this scale"
    else:
        verdict = (
            "holds" if mean > 2 * error else "does not hold at this scale" if mean < -2 * error else "not decided"
        )
    shown = [f"{statistics.mean(values):.1f} %" for values in (base, own)]
    return [
        arm.claim,
        f"`{arm.measure}`",
        f"{against} {shown[0]}",
        f"{name} {shown[1]}",
        f"{mean:+.1f} ± {error:.1f}",
        verdict,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="family/arm; all by default")
    arguments = parser.parse_args()
    known = [f"{family}/{name}" for family, arms in ARMS.items() for name, arm in arms.items() if arm.claim]
    chosen = arguments.arms or known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"--arms must be among {', '.join(known)}, got {', '.join(unknown)}")
    rows = [compare(*name.split("/"), arguments.seeds) for name in chosen]
    header = ["claim", "measure", "base", "changed", f"for the claim, {arguments.seeds} seeds", "here"]
    table = markdown_table(header, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(table + "\n")
    print(table)
    print(json.dumps({name: row[-2] for name, row in zip(chosen, rows, strict=True)}))


if __name__ == "__main__":
    main()
