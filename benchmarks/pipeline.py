"""Whether the pipeline keeps up with its model: images per second from JPEG files, beside the model on ready batches.

CLOC with a ViT-B/16 at 224 pixels, random weights, float32 on a CPU, bfloat16 on a GPU; files of 640 × 480 pixels with
1 to 50 boxes. The model alone takes batches that lie ready in memory, in the order of the images, at the best of
a few batch sizes; the pipeline takes paths and boxes at that size and gives dicts. Both take turns in one process; the
ratio is the median over rounds of the ratio within a round. Runs without arguments; prints a table and, last, one line
of JSON.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from pixclip_hf import CLOCConfig, CLOCModel, CLOCProcessor
from pixclip_hf.pipelines.region_batches import collate_images
from pixclip_hf.processing.image_processing_region import RegionImageProcessor

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
IMAGES, BATCH_SIZES, ROUNDS = (4096, (16, 32, 64, 128), 3) if CUDA else (32, (1, 4, 8), 3)
WORKERS, FILES = max(1, min((os.cpu_count() or 2) - 1, 12)), 32
WIDTH, HEIGHT = 640, 480
VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 224,
}  # fmt: skip


def make_items(folder: Path) -> list[dict]:
    """IMAGES paths, FILES different ones among them, each with its own 1 to 50 boxes."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(FILES):
        coarse = Image.fromarray(generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        noise = generator.integers(-12, 13, (HEIGHT, WIDTH, 3), dtype=np.int16)
        pixels = (np.asarray(coarse).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{i}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    items = []
    for i in range(IMAGES):
        corner = generator.uniform(0, 0.6, (generator.integers(1, 51), 2))
        boxes = np.concatenate([corner, corner + generator.uniform(0.1, 0.4, corner.shape)], axis=1)
        items.append({"image": paths[i % FILES], "boxes": (boxes * [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()})
    return items


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    config = CLOCConfig(
        vision_config={"model_type": "clip_vision_model", **VISION}, text_config=None, text_hidden_size=512
    )
    model, processor = CLOCModel(config).to(DEVICE, DTYPE).eval(), CLOCProcessor(RegionImageProcessor())
    extract = pipeline("region-feature-extraction", model=model, processor=processor, device=DEVICE)

    with tempfile.TemporaryDirectory() as folder:
        items = make_items(Path(folder))
        ready = [extract.preprocess(item) for item in items]
        for item in ready:
            del item["regions"]

        @torch.inference_mode()
        def raw(batches: list[dict[str, torch.Tensor]]) -> None:
            for batch in batches:
                features = model.get_region_features(**{name: value.to(DEVICE) for name, value in batch.items()})
                features.pooler_output.cpu()

        def piped(size: int) -> None:
            extract(items, batch_size=size, num_workers=WORKERS)

        ways = {
            size: [collate_images(ready[start : start + size]) for start in range(0, IMAGES, size)]
            for size in BATCH_SIZES
        }
        raw(ways[BATCH_SIZES[-1]][:2])  # warms up
        best = min(BATCH_SIZES, key=lambda size: seconds(lambda: raw(ways[size])))
        times: dict[str, list[float]] = {"model": [], "pipeline": []}
        for _ in range(ROUNDS):
            times["model"].append(seconds(lambda: raw(ways[best])))
            times["pipeline"].append(seconds(lambda: piped(best)))

    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {torch.get_num_threads()} threads, {WORKERS} worker(s)")
    print(f"{IMAGES} images of 1 to 50 regions, {best} a batch\n| way | s | images/s |\n| --- | ---: | ---: |")
    for name, values in times.items():
        taken = statistics.median(values)
        print(f"| {name} | {taken:.2f} | {IMAGES / taken:,.1f} |")
    share = statistics.median(raw / all_in for raw, all_in in zip(times["model"], times["pipeline"], strict=True))
    print(json.dumps({"pipeline_over_model": round(share, 3)}))


if __name__ == "__main__":
    main()
