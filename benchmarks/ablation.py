"""The claims of both papers on scenes: small models trained with and without each part, seed by seed.

    python benchmarks/ablation.py [--seeds 3] [--arms cloc/clip cloc/roi_align …] [--processes 2]

Every arm trains from the same weights, scenes and batches as the base of its family, on the recipe of the demo with
fewer steps. The table holds the mean difference to the base over seeds with its standard error, and what a paired
t-test says at 95 %. What is done lies in runs/ablation and is not done again: 42 models with three seeds.

Captions of VESL against n-grams of the alt text, on annotated data, are in benchmarks/vesl.py.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import chain
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
# Points that whole images may lose.
NOT_WORSE = 1.0
# Quantiles of Student's t for one side, of 1 to 9 degrees of freedom: 2 to 10 seeds.
STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


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
        "clip_images": Arm("… and whole images no worse (by one point)", CAPTIONED, CLIP),
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


def needed(chosen: list[str], seeds: int) -> list[list[tuple[str, str, int]]]:
    """The models that rows are made of, each once, seed by seed; first those that start anew, then those that go on
    from one of them."""
    waves: list[list[tuple[str, str, int]]] = [[], []]
    for seed in range(seeds):
        for row in chosen:
            family, name = row.split("/")
            for arm in (AGAINST.get(name, "base"), SAME_MODEL.get(name, name)):
                before = ARMS[family][arm].before
                for wave, model in ((0, before), (1, arm)) if before else ((0, arm),):
                    if (family, model, seed) not in waves[wave]:
                        waves[wave].append((family, model, seed))
    return waves


def side_by_side(train: Callable, waves: list[list[tuple]], processes: int) -> None:
    """Calls `train` with each tuple of a wave, so many at once: small models use two cores better that way than one
    after another. A wave starts when the one before is done."""
    if processes == 1:
        for model in chain.from_iterable(waves):
            train(*model)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # A process a model: the Trainer's state and the random generators start anew.
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
        max_tasks_per_child=1,
    ) as pool:
        begun = time.perf_counter()
        for wave in waves:
            futures = {pool.submit(train, *model): model for model in wave}
            for future in as_completed(futures):
                future.result()
                print(f"{futures[future]} done, minute {(time.perf_counter() - begun) / 60:.1f}", flush=True)


def gain(differences: list[float], margin: float = 0.0) -> tuple[float, float, str]:
    """Mean, standard error and verdict of paired differences in points: whether the mean is above `-margin` by
    Student's one-sided test at 95 %."""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return mean, float("nan"), "not decided"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    # Beyond ten seeds, the value of ten.
    bound = error * STUDENT_95[min(len(differences) - 2, len(STUDENT_95) - 1)]
    if mean - bound > -margin:
        return mean, error, "holds"
    return mean, error, "does not hold at this scale" if mean + bound < -margin else "not decided"


def compare(family: str, name: str, seeds: int) -> list[str]:
    """A row of the table: claim, both measures, the difference over paired seeds, and what it says."""
    arm, against = ARMS[family][name], AGAINST.get(name, "base")
    own = [100 * run(family, name, seed)[arm.other or arm.measure] for seed in range(seeds)]
    base = [100 * run(family, against, seed)[arm.measure] for seed in range(seeds)]
    differences = [one - other for one, other in zip(base, own, strict=True)]
    # A claim is about the base; that of `text_filter` is about the arm itself.
    if name == "text_filter":
        differences = [-difference for difference in differences]
    mean, error, verdict = gain(differences, NOT_WORSE if name == "clip_images" else 0.0)
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
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="models side by side")
    arguments = parser.parse_args()
    known = [f"{family}/{name}" for family, arms in ARMS.items() for name, arm in arms.items() if arm.claim]
    chosen = arguments.arms or known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"--arms must be among {', '.join(known)}, got {', '.join(unknown)}")
    side_by_side(run, needed(chosen, arguments.seeds), arguments.processes)
    rows = [compare(*name.split("/"), arguments.seeds) for name in chosen]
    header = ["claim", "measure", "base", "changed", f"for the claim, {arguments.seeds} seeds", "here"]
    table = markdown_table(header, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(table + "\n")
    print(table)
    print(json.dumps({name: row[-2] for name, row in zip(chosen, rows, strict=True)}))


if __name__ == "__main__":
    main()
