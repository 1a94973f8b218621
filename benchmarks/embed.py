"""Embedding a collection of JPEG files: whether it keeps up with its model, and what a reduced scale is worth.

CLOC with a ViT-B/16 at 224 pixels, random weights, float32 on a CPU, bfloat16 on a GPU; files of 640 × 480 pixels with
14 windows each. On a GPU a run is compared with the model on ready batches, on a CPU, where reading and the model
share the cores, with decoding, processing and the model one after another (the serial bound). Large photographs are
enlarged to 12 megapixels: file to tensor with all pixels and at a reduced scale, and the cosine of both embeddings.
Runs without arguments; prints a table and, last, one line of JSON.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from pixclip_hf import CLOCConfig, CLOCModel, CLOCProcessor
from pixclip_hf.embedding.encoder_choice import EncoderChoice, cached_encoder
from pixclip_hf.embedding.reading import reduced_regions
from pixclip_hf.embedding.regions import Grid, grid_boxes, new_region
from pixclip_hf.embedding.run import REDUCED_SIDES, embed
from pixclip_hf.images import open_image
from pixclip_hf.processing.image_processing_region import RegionImageProcessor

CUDA = torch.cuda.is_available()
IMAGES, SHARD, BATCH, ROUNDS = (16_384, 2_048, 64, 3) if CUDA else (48, 8, 4, 3)
FILES, WIDTH, HEIGHT = 64, 640, 480
LARGE = (4000, 3000)
GRID = Grid((1, 2, 3))
VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 224,
}  # fmt: skip


def save_model(folder: Path) -> str:
    torch.manual_seed(0)
    config = CLOCConfig(
        vision_config={"model_type": "clip_vision_model", **VISION}, text_config=None, text_hidden_size=512
    )
    CLOCModel(config).save_pretrained(folder)
    CLOCProcessor(RegionImageProcessor(size={"height": 224, "width": 224})).save_pretrained(folder)
    return str(folder)


def save_images(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(FILES):
        coarse = Image.fromarray(generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        noise = generator.integers(-12, 13, (HEIGHT, WIDTH, 3), dtype=np.int16)
        pixels = (np.asarray(coarse).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for i in range(IMAGES):
        (folder / f"{i:05d}.jpg").write_bytes(encoded[i % FILES])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def embed_rate(model: str, photos: Path, output: Path) -> float:
    """Images per second of a run between its first shard and its last: without the start of readers."""
    choice = EncoderChoice(model)
    source = ["images", f"folder={photos}"]
    embed(source, choice, output, regions=GRID, batch_size=BATCH, shard_size=SHARD, progress=False)
    times = sorted(path.stat().st_mtime for path in (output / "shards").glob("*.json"))
    return (len(times) - 1) * SHARD / (times[-1] - times[0])


def parts_of_an_image(model: str, photos: Path) -> dict[str, float]:
    """Seconds per image to decode, to process, and of the model on ready batches."""
    encoder = cached_encoder(EncoderChoice(model, precision="bfloat16" if CUDA else "auto"))
    paths = sorted(photos.iterdir())[:FILES][: max(BATCH, 16)]
    images: list[Image.Image] = []
    decode = seconds(lambda: images.extend(open_image({"bytes": path.read_bytes()}) for path in paths))
    regions = [[new_region(i, box) for i, box in enumerate(grid_boxes(WIDTH, HEIGHT, GRID.counts))] for _ in images]
    prepare, ready = encoder.preparation(), []
    starts = range(0, len(images), BATCH)
    process = seconds(lambda: ready.extend(prepare(images[i : i + BATCH], regions[i : i + BATCH]) for i in starts))
    if CUDA:
        ready = [batch.pin_memory() for batch in ready] * 20
    seconds(lambda: encoder.encode_prepared(ready[0]))
    embedded = seconds(lambda: [encoder.encode_prepared(batch)[0] for batch in ready])
    count = sum(len(batch.counts) for batch in ready)
    return {"decode": decode / len(paths), "process": process / len(paths), "model": embedded / count}


def large_photographs(model: str, photos: str | None) -> tuple[dict[str, float], float]:
    """Milliseconds from a file of 12 megapixels to a tensor, and the lowest cosine between both embeddings of a region
    or an image."""
    encoder = cached_encoder(EncoderChoice(model))
    own = [Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")]
    paths = own if photos is None else sorted(Path(photos).glob("*.jpg"))[:8]
    prepare, sides = encoder.preparation(), REDUCED_SIDES * encoder.processor.image_processor.size["height"]
    times: dict[str, list[float]] = {"full": [], "reduced": []}
    lowest = 1.0
    for path in paths:
        buffer = io.BytesIO()
        open_image(path).resize(LARGE, Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=92)
        data = buffer.getvalue()
        regions = [new_region(i, box) for i, box in enumerate(grid_boxes(*LARGE, GRID.counts))]
        embeds = {}
        for _ in range(ROUNDS):
            for name, at_least in (("full", None), ("reduced", sides)):
                start = time.perf_counter()
                image = open_image({"bytes": data}, at_least)
                batch = prepare([image], [reduced_regions(regions, LARGE, image.size)])
                times[name].append(time.perf_counter() - start)
                embeds[name] = torch.cat([part.float().cpu() for part in encoder.encode_prepared(batch)])
        lowest = min(lowest, float((embeds["full"] * embeds["reduced"]).sum(-1).min()))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}, lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of JPEGs to enlarge, in place of one photograph of matplotlib")
    parser.add_argument("--model", help="a trained CLOC for the cosines, in place of random weights")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder, "model"))
        photos = Path(folder, "photos")
        save_images(photos)
        ratios, rates = [], []
        for number in range(ROUNDS):
            parts = parts_of_an_image(model, photos)
            rate = embed_rate(model, photos, Path(folder, f"run{number}"))
            bound = parts["model"] if CUDA else sum(parts.values())
            ratios.append(rate * bound)
            rates.append(rate)
        for name, value in parts.items():
            print(f"{name:<28} {1000 * value:8.2f} ms per image")
        print(f"{'embed':<28} {1000 / statistics.median(rates):8.2f} ms per image")
        times, cosine = large_photographs(arguments.model or model, arguments.photos)
    for name, value in times.items():
        print(f"12 megapixels, {name:<13} {value:8.1f} ms from file to tensor")
    line = {
        "embed_over_model": round(statistics.median(ratios), 3),
        "reduced_over_full": round(times["full"] / times["reduced"], 2),
        "reduced_cosine": round(cosine, 5),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
