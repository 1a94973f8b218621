"""The claims of both papers on scenes: small models trained with and without each part, seed by seed.

    python benchmarks/ablation.py [--seeds 3] [--arms cloc/clip cloc/roi_align …] [--processes 2]

Every arm trains from the same weights, scenes and batches as the base of its family, with fewer steps than the demo
and, but for `muon`, by AdamW; those of PixCLIP, but for `scratch`, start from the towers of the CLOC base of their
seed. The first table holds the mean difference to the base over seeds with its standard error, and what a paired
t-test says at 95 %; the second what one trained tower gives, read in four ways. Measures lie in benchmarks/measures,
with the recipe that they are of: what is there is not done again, on whatever machine.

Captions of VESL against n-grams of the alt text, on annotated data, are in benchmarks/vesl.py.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel, AutoProcessor

from pixclip_hf.data.whole_files import write_json
from pixclip_hf.encoders.region_encoder import load_model
from pixclip_hf.evaluation.report import markdown_table, with_current_names
from pixclip_hf.modeling import modeling_region_text
from pixclip_hf.modeling.modeling_gathered_loss import gathered_contrastive_loss
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.measures import CLIP_TOKENS, evaluate_scenes
from pixclip_hf.scenes.recipes import COMMON, start_from_towers
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer
from pixclip_hf.training import command

STEPS = {"cloc": 900, "pixclip": 300}
# By AdamW, and CLOC with batches of two thirds of the demo's.
TRAINING = {
    "cloc": (
        "--per_device_train_batch_size", "32", "--warmup_steps", "100", "--region_text", "caption", "category",
        "--mask_prompt_share", "0.6", "--learning_rate", "1e-3",
    ),
    "pixclip": (
        "--per_device_train_batch_size", "48", "--warmup_steps", "50", "--regions_per_image", "2",
        "--region_text", "long_caption", "caption", "caption", "category", "category", "--image_captions", "True",
        "--whole_image_share", "0", "--distillation_weight", "4", "--learning_rate", "1e-3",
    ),
}  # fmt: skip
TEST_IMAGES = 400
FOLDER = Path("runs/ablation")
MEASURES = Path("benchmarks/measures/ablation")
# Fields of an arm that change its model; the others are about the table.
TRAINED_WITH = ("config", "text_tokens", "before", "equal_texts_are_negatives", "frozen_at_zero", "inherits")
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
        before: an arm that this one continues from.
        equal_texts_are_negatives: of each other, in the region-text loss.
        frozen_at_zero: weights of the Prompter's layer that stay zero.
        inherits: a PixCLIP whose towers come from the CLOC base; else from random weights.
        against: the arm that this one is compared with.
        about_the_arm: the claim is that this arm is the better one.
    """

    claim: str
    measures: tuple[str, ...]
    config: dict = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    text_tokens: int | None = None
    other: str | None = None
    before: str | None = None
    equal_texts_are_negatives: bool = False
    frozen_at_zero: tuple[str, ...] = ()
    inherits: bool = True
    against: str = "base"
    about_the_arm: bool = False


DESCRIBED, CAPTIONED, MASKED, DETAIL = (
    "region_description_exact",
    "image_to_text_recall@1",
    "same_box_by_mask",
    "late_detail",
)
BY_MASK, SAME_BOX, GROUNDED, POOLED = (
    "region_description_exact_mask",
    "same_box_by_mask_caption",
    "grounding_accuracy",
    "region_description_exact_pooled",
)
CLIP = {"region_text_loss_weight": 0.0, "grounding_loss_weight": 0.0}
BRANCH = (DESCRIBED, MASKED, DETAIL)
NO_DISTILLATION = ("--distillation_weight", "0")
BOXES, MASKS = ("--mask_prompt_share", "0"), ("--mask_prompt_share", "1")
# The product of queries and keys of a region prompt, and its part that reads content.
PRODUCT = ("position_query", "position_key", "content_query")
CONTENT = ("content_query",)
ARMS = {
    "cloc": {
        "base": Arm("", ()),
        "clip": Arm(
            "CLOC describes regions better than CLIP on crops", (DESCRIBED,), CLIP, other="crop_description_exact"
        ),
        "clip_images": Arm("… and whole images no worse (by one point)", (CAPTIONED,), CLIP),
        "roi_align": Arm("the Prompter is better than RoIAlign", (DESCRIBED,), {"region_readout": "roi_align"}),
        "no_prior": Arm("the coverage prior helps", (DESCRIBED, BY_MASK, SAME_BOX), {"prompter_prior": False}),
        "first_layer": Arm(
            "the layer is better than that of the first edition", (DESCRIBED, GROUNDED), {"prompter_layer": "first"}
        ),
        "prior_alone": Arm("queries and keys help beside the prior", (DESCRIBED, BY_MASK), frozen_at_zero=PRODUCT),
        "positions_and_prior": Arm("content in the queries of regions helps", (DESCRIBED,), frozen_at_zero=CONTENT),
        "positions_alone": Arm(
            "the prior helps where regions look by position alone",
            (DESCRIBED,),
            {"prompter_prior": False},
            frozen_at_zero=CONTENT,
            against="positions_and_prior",
        ),
        "boxes_alone": Arm("masks among the prompts help boxes", (DESCRIBED,), arguments=BOXES),
        "masks_alone": Arm("boxes among the prompts help masks", (BY_MASK,), arguments=MASKS),
        "by_box": Arm("masks say more than boxes", (BY_MASK,), other=DESCRIBED),
        "two_heads": Arm("8 heads are better than 2", (DESCRIBED,), {"prompter_num_attention_heads": 2}),
        "four_heads": Arm("8 heads are better than 4", (DESCRIBED,), {"prompter_num_attention_heads": 4}),
        "no_grounding": Arm("the grounding loss helps", (DESCRIBED,), {"grounding_loss_weight": 0.0}),
        "no_filter": Arm("leaving out negatives of equal text helps", (DESCRIBED,), equal_texts_are_negatives=True),
        "similar_texts": Arm(
            "leaving out negatives of similar text (0.9), from random weights on, helps more",
            (DESCRIBED,),
            {"text_similarity_threshold": 0.9},
            about_the_arm=True,
        ),
        "two_regions": Arm("4 regions per image are better than 2", (DESCRIBED,), {}, ("--regions_per_image", "2")),
        "sigmoid": Arm(
            "a softmax is better than a sigmoid", (DESCRIBED, CAPTIONED), {"contrastive_objective": "sigmoid"}
        ),
        "muon": Arm(
            "Muon learns more in as many steps than AdamW",
            (DESCRIBED, BY_MASK, CAPTIONED, GROUNDED),
            arguments=("--muon", "vision", "text", "prompter"),
            about_the_arm=True,
        ),
    },
    "pixclip": {
        "base": Arm("", ()),
        # Random weights are nothing to stay near.
        "scratch": Arm(
            "starting from trained towers helps", (*BRANCH, CAPTIONED), arguments=NO_DISTILLATION, inherits=False
        ),
        "no_distillation": Arm(
            "staying near the towers keeps whole images", (CAPTIONED, DESCRIBED), arguments=NO_DISTILLATION
        ),
        "no_images": Arm(
            "image captions keep whole images",
            (CAPTIONED, DESCRIBED),
            arguments=(*NO_DISTILLATION, "--image_captions", "False"),
            against="no_distillation",
        ),
        "no_mask_text": Arm("branch 1 (mask and text) helps", BRANCH, {"mask_text_loss_weight": 0.0}),
        "no_crop_text": Arm("branch 2 (crops) helps", BRANCH, {"crop_text_loss_weight": 0.0}),
        "no_local_global": Arm(
            "branch 3 (local and global) helps", (*BRANCH, POOLED), {"local_global_loss_weight": 0.0}
        ),
        # What is cut is all that late details differ in: that row holds by construction where the base learns.
        "cut_captions": Arm("long captions are better than cut ones", (MASKED, DETAIL), text_tokens=CLIP_TOKENS),
        "short": Arm("", (), {}, ("--region_text", "caption")),
        "lora": Arm("", (), {}, ("--lora_r", "8"), before="short"),
        "frozen": Arm(
            "LoRA on the text tower is better than a frozen one",
            (MASKED, DETAIL),
            {},
            ("--freeze_text",),
            before="short",
            against="lora",
        ),
    },
}
# Arms without a training of their own.
SAME_MODEL = {"clip_images": "clip", "by_box": "base"}


def start(family: str, arm: Arm, seed: int, folder: Path) -> None:
    """The model of an arm before its training: weights of the seed, the same in every arm of a family; for PixCLIP the
    towers of the CLOC base of that seed, where the arm inherits."""
    torch.manual_seed(seed)
    if family == "pixclip" and arm.inherits:
        start_from_towers(trained("cloc", "base", seed), folder)
        model, processor = (part.from_pretrained(folder) for part in (AutoModel, AutoProcessor))
        for name, value in arm.config.items():
            setattr(model.config, name, value)
        if arm.text_tokens is not None:
            processor.tokenizer.model_max_length = arm.text_tokens
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    tokenizer = scenes_tokenizer()
    model, processor = small_model(family, tokenizer)
    if arm.config:
        # Built by its own configuration; what the arm has of the base has the weights of the base.
        weights, config = model.state_dict(), model.config
        for name, value in arm.config.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = type(model)(config)
        own = model.state_dict()
        shared = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
        model.load_state_dict({**own, **shared})
    with torch.no_grad():
        for name in arm.frozen_at_zero:
            getattr(model.prompter.layer, name).weight.zero_()
    if arm.text_tokens is not None:
        processor.tokenizer.model_max_length = arm.text_tokens
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def distinct_texts(rows, texts, scale, ids, *arguments, **options):
    """The contrastive loss of one process, with no text equal to another where similar ones would be left out."""
    if "similarity_threshold" in options:
        ids = torch.arange(len(ids), device=ids.device)
    return gathered_contrastive_loss(rows, texts, scale, ids, *arguments, **options)


def freezing(names: tuple[str, ...]) -> Callable:
    """The training program's own freezing, and that of weights of the Prompter's layer."""
    freeze = command.freeze

    def freeze_more(model, arguments) -> None:
        freeze(model, arguments)
        for name in names:
            getattr(model.prompter.layer, name).requires_grad_(False)

    return freeze_more


def done_before(file: Path, recipe: dict) -> dict[str, float] | None:
    """Measures that [`keep`] wrote, if it did.

    Raises:
        ValueError: they are of another recipe.
    """
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["recipe"] != json.loads(json.dumps(recipe)):
        raise ValueError(f"{file} is of another recipe, {found['recipe']}, not {recipe}: move it away.")
    return with_current_names(found["metrics"])


def keep(file: Path, recipe: dict, metrics: dict[str, float]) -> None:
    """Writes the measures of a model, and how it was made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"recipe": recipe, "metrics": metrics})


def plan(family: str, name: str, seed: int) -> tuple[Path, dict]:
    """Where the measures of an arm's model go, and its recipe."""
    name = SAME_MODEL.get(name, name)
    arm = ARMS[family][name]
    arguments = ["--max_steps", str(STEPS[family]), *TRAINING[family], *COMMON, *arm.arguments]
    changes = {key: value for key, value in asdict(arm).items() if key in TRAINED_WITH}
    return MEASURES / family / f"{name}-{seed}.json", {"arguments": arguments, "test_images": TEST_IMAGES, **changes}


def run(family: str, name: str, seed: int) -> dict[str, float]:
    """Measures of an arm, trained unless that was done before.

    Raises:
        ValueError: it was done with another recipe.
    """
    file, recipe = plan(family, name, seed)
    if (metrics := done_before(file, recipe)) is not None:
        return metrics
    metrics = measured(trained(family, SAME_MODEL.get(name, name), seed), seed)
    keep(file, recipe, metrics)
    return metrics


def measured(folder: Path, seed: int) -> dict[str, float]:
    """Measures of a saved model on unseen scenes."""
    # On an accelerator, where there is one.
    model = load_model(str(folder), None, "auto", "main")
    processor = AutoProcessor.from_pretrained(folder)
    return evaluate_scenes(model, processor, [make_scene(i, "test", seed) for i in range(TEST_IMAGES)])


def trained(family: str, name: str, seed: int) -> Path:
    """Folder of an arm's trained model; trained where it is not there. Its measures may come from another machine."""
    arm, folder = ARMS[family][name], FOLDER / family / f"{name}-{seed}"
    recipe = plan(family, name, seed)[1]
    if done_before(folder / "recipe.json", recipe) is not None:
        return folder / "trained"
    if arm.before is None:
        begin = folder / "start"
        start(family, arm, seed, begin)
    else:
        begin = trained(family, arm.before, seed)
    loss = distinct_texts if arm.equal_texts_are_negatives else gathered_contrastive_loss
    with (
        patch.object(modeling_region_text, "gathered_contrastive_loss", loss),
        patch.object(command, "freeze", freezing(arm.frozen_at_zero)),
    ):
        command.main(
            ["--model_type", family, "--model_name_or_path", str(begin), "--output_dir", str(folder / "trained")]
            + ["--seed", str(seed), "--scenes_seed", str(seed), "--disable_tqdm", "True", *recipe["arguments"]]
        )
    keep(folder / "recipe.json", recipe, {})
    return folder / "trained"


def needed(chosen: list[str], seeds: int) -> list[list[tuple[str, str, int]]]:
    """The models that rows are made of, each once, seed by seed; in waves, so that what a model continues from is
    there: first CLOC and what starts from random weights, then PixCLIP from CLOC's towers, then what continues
    from those."""
    waves: list[list[tuple[str, str, int]]] = [[], [], []]

    def add(family: str, name: str, seed: int) -> int:
        arm = ARMS[family][name]
        depth = 0
        if arm.before is not None:
            depth = 1 + add(family, arm.before, seed)
        elif family == "pixclip" and arm.inherits:
            depth = 1 + add("cloc", "base", seed)
        if (family, name, seed) not in waves[depth]:
            waves[depth].append((family, name, seed))
        return depth

    for seed in range(seeds):
        for row in chosen:
            family, name = row.split("/")
            for one in (ARMS[family][name].against, SAME_MODEL.get(name, name)):
                add(family, one, seed)
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
    # One process per model, so that the Trainer's state and the random generators start fresh.
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
    arm, against = ARMS[family][name], ARMS[family][name].against
    own, base = ([run(family, one, seed) for seed in range(seeds)] for one in (name, against))
    rows = []
    for measure in arm.measures:
        of_own = [100 * metrics[arm.other or measure] for metrics in own]
        of_base = [100 * metrics[measure] for metrics in base]
        differences = [one - other for one, other in zip(of_base, of_own, strict=True)]
        if arm.about_the_arm:
            differences = [-difference for difference in differences]
        mean, error, verdict = gain(differences, NOT_WORSE if name == "clip_images" else 0.0)
        sides = [
            f"{one} {gain(values)[0]:.1f} ± {gain(values)[1]:.1f} %"
            for one, values in ((against, of_base), (name, of_own))
        ]
        rows.append([arm.claim, f"`{measure}`", *sides, f"{mean:+.1f} ± {error:.1f}", verdict])
    return rows


def one_tower(seeds: int) -> list[list[str]]:
    """Rows of the second table: regions described from the tower of the CLOC base, seed by seed, in four ways."""
    cloc, pixclip = ([run(family, "base", seed) for seed in range(seeds)] for family in ("cloc", "pixclip"))
    before = [inherited(seed) for seed in range(seeds)]
    rows = []
    for label, runs, measure in (
        ("Prompter by mask, one pass per image", cloc, BY_MASK),
        ("mask-pooled features, as inherited", before, POOLED),
        ("mask-pooled features, after PixCLIP's training", pixclip, POOLED),
        ("mask-prompted pass, after PixCLIP's training", pixclip, DESCRIBED),
    ):
        mean, error, _ = gain([100 * metrics[measure] for metrics in runs])
        rows.append([label, f"{mean:.1f} ± {error:.1f} %"])
    return rows


def inherited(seed: int) -> dict[str, float]:
    """Measures of the PixCLIP base before its training."""
    file, recipe = MEASURES / "pixclip" / f"inherited-{seed}.json", plan("cloc", "base", seed)[1]
    if (metrics := done_before(file, recipe)) is None:
        folder = FOLDER / "pixclip" / f"inherited-{seed}"
        start("pixclip", ARMS["pixclip"]["base"], seed, folder)
        metrics = measured(folder, seed)
        keep(file, recipe, metrics)
    return metrics


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
    if arguments.arms is None:
        header = [f"one trained tower, {arguments.seeds} seeds", f"`{DESCRIBED}`"]
        table += f"\n\n{markdown_table(header, one_tower(arguments.seeds))}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(json.dumps({f"{row[0]}, {row[1]}": row[-2] for row in rows}, ensure_ascii=False))


if __name__ == "__main__":
    main()
