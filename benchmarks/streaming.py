"""Whether a streamed dataset keeps up with training: batches per second of the loader beside steps of the small model.

Scenes of 64 pixels in Parquet shards, read with shuffle buffer and checks, decoded, sampled and collated by worker
processes, as `examples/run_pretrain.py --streaming` does. Runs without arguments in under two minutes. Prints medians
over rounds and, last, one line of JSON: above 1 the loader is faster than the step that waits for it.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import torch

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.streaming import RecordStream, StreamLoader, stream_records
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

IMAGES, SHARDS, WORKERS, BATCH = 1024, 4, 2, 32
ROUNDS, BATCHES, WAITING = 3, 8, 2 * WORKERS


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / BATCHES


def compare(folder: str, model_type: str) -> dict[str, float]:
    """Median seconds per batch: from the loader alone, of a step alone, and of a step that takes its batch from it."""
    torch.manual_seed(0)
    model, processor = small_model(model_type, scenes_tokenizer())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    options = {"regions_per_image": 1, "region_text": "long_caption", "image_captions": False, "crops": True}
    collator = RegionCollator(processor, **({} if model_type == "cloc" else options))
    stream = RecordStream(stream_records(folder, "train"), shuffle_buffer=256)
    batches = iter(StreamLoader(stream, collator, BATCH, num_workers=WORKERS))
    batch = next(batches)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = {
        "step": lambda: [step(batch) for _ in range(BATCHES)],
        "both": lambda: [step(fresh) for fresh in islice(batches, BATCHES)],
        "loader": lambda: [None for _ in islice(batches, BATCHES)],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if name == "loader":  # what the workers made ahead is no work of theirs now
                list(islice(batches, WAITING))
            times[name].append(seconds(way))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        records = scenes_dataset(IMAGES)
        for shard in range(SHARDS):
            records.shard(SHARDS, shard).to_parquet(f"{folder}/data/train-{shard:05d}.parquet", batch_size=64)
        for model_type in ("cloc", "pixclip"):
            results[model_type] = compare(f"{folder}/data", model_type)
    print(f"images per second, batch of {BATCH}, {WORKERS} workers, {torch.get_num_threads()} threads")
    print("| model | loader alone | step alone | step with loader |")
    print("| --- | ---: | ---: | ---: |")
    for model_type, taken in results.items():
        print(
            f"| {model_type} | "
            + " | ".join(f"{BATCH / taken[way]:,.0f}" for way in ("loader", "step", "both"))
            + " |"
        )
    ratios = {f"{name}_loader_over_step": round(taken["step"] / taken["loader"], 2) for name, taken in results.items()}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
