"""The claims of both papers on scenes: small models trained with and without each part, seed by seed.

    python benchmarks/ablation.py [--seeds 3] [--arms cloc/clip cloc/roi_align …] [--processes 2]

Every arm trains from the same weights, scenes and batches as the base of its family, on the recipe of the demo with
fewer steps. The table holds the mean difference to the base over seeds with its standard error, and what a paired
t-test says at 95 %. What is done lies in runs/ablation and is not done again: 45 models with three seeds.

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
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel, AutoProcessor

from pixclip_hf.data.scenes import make_scene
from pixclip_hf.data.tokenizer import scenes_tokenizer
from pixclip_hf.evaluation.report import markdown_table
from pixclip_hf.evaluation.scenes import CLIP_TOKENS, evaluate_scenes
from pixclip_hf.modeling import modeling_cloc
from pixclip_hf.modeling.modeling_region_text import gathered_contrastive_loss
from pixclip_hf.training.from_scratch import small_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import COMMON, RECIPES  # noqa: E402
from run_pretrain import main as run_pretrain  # noqa: E402

STEPS = {"cloc": 900, "pixclip": 400}
TEST_IMAGES = 400
FOLDER = Path("runs/ablation")
# Fields of an arm that change its model; the others are about the table.
TRAINED_WITH = ("config", "text_tokens", "before", "equal_texts_are_negatives")
# Points that whole images may lose.
NOT_WORSE = 1.0
# Quantiles of Student's t for one side, of 1 to 9 degrees of freedom: 2 to 10 seeds.
STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


@dataclass(frozen=True)
class Arm:
    """A model with one thing changed.

    Args:
        claim: what the paper says of the base against this arm; none for an arm that others start from.
        measures: of `evaluate_scenes`, a row each.
        config: fields that are changed.
        arguments: of the training script, in place of the recipe's.
        text_tokens: the tokenizer's limit.
        other: measure of this arm, where it is not that of the base.
        before: an arm that this one goes on from.
        equal_texts_are_negatives: of each other, in the region-text loss.
    """

    claim: str
    measures: tuple[str, ...]
    config: dict = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    text_tokens: int | None = None
    other: str | None = None
    before: str | None = None
    equal_texts_are_negatives: bool = False


DESCRIBED, CAPTIONED, MASKED, DETAIL = (
    "region_description_exact",
    "image_to_text_recall@1",
    "same_box_by_mask",
    "late_detail",
)
CLIP = {"region_text_loss_weight": 0.0, "grounding_loss_weight": 0.0}
BRANCH = (MASKED, DETAIL)
ARMS = {
    "cloc": {
        "base": Arm("", ()),
        "clip": Arm(
            "CLOC describes regions better than CLIP on crops", (DESCRIBED,), CLIP, other="crop_description_exact"
        ),
        "clip_images": Arm("… and whole images no worse (by one point)", (CAPTIONED,), CLIP),
        "roi_align": Arm("the Prompter is better than RoIAlign", (DESCRIBED,), {"region_readout": "roi_align"}),
        "no_grounding": Arm("the grounding loss helps", (DESCRIBED,), {"grounding_loss_weight": 0.0}),
        "no_filter": Arm("leaving out negatives of equal text helps", (DESCRIBED,), equal_texts_are_negatives=True),
        "similar_texts": Arm(
            "leaving out negatives of similar text (0.9), from random weights on, helps more",
            (DESCRIBED,),
            {"text_similarity_threshold": 0.9},
        ),
        "two_regions": Arm("4 regions an image are better than 2", (DESCRIBED,), {}, ("--regions_per_image", "2")),
    },
    "pixclip": {
        "base": Arm("", ()),
        "no_mask_text": Arm("branch 1 (mask and text) helps", BRANCH, {"mask_text_loss_weight": 0.0}),
        "no_crop_text": Arm("branch 2 (crops) helps", BRANCH, {"crop_text_loss_weight": 0.0}),
        "no_local_global": Arm("branch 3 (local and global) helps", BRANCH, {"local_global_loss_weight": 0.0}),
        # What is cut off is all that late details differ in: that row holds by construction where the base learns.
        "cut_captions": Arm("long captions are better than cut ones", BRANCH, text_tokens=CLIP_TOKENS),
        "short": Arm("", (), {}, ("--region_text", "caption")),
        "lora": Arm("", (), {}, ("--lora_r", "8"), before="short"),
        "frozen": Arm(
            "LoRA on the text tower is better than a frozen one", BRANCH, {}, ("--freeze_text",), before="short"
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


def distinct_texts(rows, texts, scale, ids, *arguments, **options):
    """The contrastive loss of one process, with no text equal to another where similar ones would be left out."""
    if "similarity_threshold" in options:
        ids = torch.arange(len(ids), device=ids.device)
    return gathered_contrastive_loss(rows, texts, scale, ids, *arguments, **options)


def done_before(folder: Path, recipe: dict) -> dict[str, float] | None:
    """Measures that [`keep`] wrote, if it did.

    Raises:
        ValueError: they are of another recipe.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["recipe"] != json.loads(json.dumps(recipe)):
        raise ValueError(f"{file} is of another recipe, {found['recipe']}, not {recipe}: move {folder} away.")
    return found["metrics"]


def keep(folder: Path, recipe: dict, metrics: dict[str, float]) -> None:
    """Writes the measures of a model, and how it was made."""
    (folder / "metrics.json").write_text(json.dumps({"recipe": recipe, "metrics": metrics}, indent=1) + "\n")


def plan(family: str, name: str, seed: int) -> tuple[Path, dict]:
    """Folder and recipe of an arm's model."""
    name = SAME_MODEL.get(name, name)
    arm = ARMS[family][name]
    arguments = ["--max_steps", str(STEPS[family]), *RECIPES[family][2:], *COMMON, *arm.arguments]
    changes = {key: value for key, value in asdict(arm).items() if key in TRAINED_WITH}
    return FOLDER / family / f"{name}-{seed}", {"arguments": arguments, "test_images": TEST_IMAGES, **changes}


def run(family: str, name: str, seed: int) -> dict[str, float]:
    """Measures of an arm, trained unless that was done before.

    Raises:
        ValueError: it was done with another recipe.
    """
    arm = ARMS[family][SAME_MODEL.get(name, name)]
    folder, recipe = plan(family, name, seed)
    if (metrics := done_before(folder, recipe)) is not None:
        return metrics
    if arm.before is None:
        begin = folder / "start"
        start(family, arm, seed, begin)
    else:
        run(family, arm.before, seed)
        begin = FOLDER / family / f"{arm.before}-{seed}" / "trained"
    loss = distinct_texts if arm.equal_texts_are_negatives else gathered_contrastive_loss
    with patch.object(modeling_cloc, "gathered_contrastive_loss", loss):
        run_pretrain(
            ["--model_type", family, "--model_name_or_path", str(begin), "--output_dir", str(folder / "trained")]
            + ["--seed", str(seed), "--scenes_seed", str(seed), "--disable_tqdm", "True", *recipe["arguments"]]
        )
    model, processor = (part.from_pretrained(folder / "trained") for part in (AutoModel, AutoProcessor))
    metrics = evaluate_scenes(model, processor, [make_scene(i, "test", seed) for i in range(TEST_IMAGES)])
    keep(folder, recipe, metrics)
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


def side_by_side(train: Callable, plan: Callable, waves: list[list[tuple]], processes: int) -> None:
    """Calls `train` with each tuple of a wave that is not done, so many at once: small models use two cores better
    that way than one after another. A wave starts when the one before is done."""
    waves = [[model for model in wave if done_before(*plan(*model)) is None] for wave in waves]
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


def compare(family: str, name: str, seeds: int) -> list[list[str]]:
    """Rows of the table: claim, both measures, the difference over paired seeds, and what it says."""
    arm, against = ARMS[family][name], AGAINST.get(name, "base")
    own, base = ([run(family, one, seed) for seed in range(seeds)] for one in (name, against))
    rows = []
    for measure in arm.measures:
        of_own = [100 * metrics[arm.other or measure] for metrics in own]
        of_base = [100 * metrics[measure] for metrics in base]
        differences = [one - other for one, other in zip(of_base, of_own, strict=True)]
        # A claim is about the base; this one is about the arm itself.
        if name == "similar_texts":
            differences = [-difference for difference in differences]
        mean, error, verdict = gain(differences, NOT_WORSE if name == "clip_images" else 0.0)
        sides = [
            f"{one} {gain(values)[0]:.1f} ± {gain(values)[1]:.1f} %"
            for one, values in ((against, of_base), (name, of_own))
        ]
        rows.append([arm.claim, f"`{measure}`", *sides, f"{mean:+.1f} ± {error:.1f}", verdict])
    return rows


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
    side_by_side(run, plan, needed(chosen, arguments.seeds), arguments.processes)
    rows = [row for name in chosen for row in compare(*name.split("/"), arguments.seeds)]
    header = ["claim", "measure", "base", "changed", f"for the claim, {arguments.seeds} seeds", "here"]
    table = markdown_table(header, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(table + "\n")
    print(table)
    print(json.dumps({f"{row[0]}, {row[1]}": row[-2] for row in rows}, ensure_ascii=False))


if __name__ == "__main__":
    main()
