"""What many regions of one image cost beside one pass of the image tower, and beside a CLIP that reads crops.

ViT-B/16 at 224 pixels, random weights, float32 on a CPU, bfloat16 on a GPU. What is compared takes turns in one
process; a ratio is the median over rounds of the ratio within a round. Runs without arguments; prints a table and,
last, one line of JSON with the ratios.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pixclip_hf import CLOCConfig, CLOCProcessor, CLOCVisionModel, PixCLIPConfig, PixCLIPVisionModel
from pixclip_hf.processing.image_processing_region import RegionImageProcessor

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# A GPU is not busy with one image: there a pass holds several, each with as many regions.
IMAGES, PROMPTED, ROUNDS = (64, 512, 30) if CUDA else (1, 16, 11)
SIDE, PATCH, PHOTOGRAPH = 224, 16, (1024, 768)
CROP_BATCHES, FILE_BATCHES = (1, 8, 32), (1, 4)
VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": PATCH, "image_size": SIDE,
}  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round; a round before the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            taken = seconds(way)
            if turn:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], name: str, over: str) -> float:
    return statistics.median(one / other for one, other in zip(times[name], times[over], strict=True))


def random_boxes(count: int, size: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """(count, 4) xyxy within (width, height)."""
    corner = torch.rand(count, 2) * 0.6
    boxes = torch.cat([corner, corner + 0.1 + 0.3 * torch.rand(count, 2)], dim=-1)
    return boxes * torch.tensor([*size, *size])


def random_masks(count: int) -> torch.Tensor:
    """(count, SIDE, SIDE) bool rectangles."""
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, random_boxes(count, (SIDE, SIDE)).long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def photograph(path: Path) -> None:
    """A JPEG file about as hard to decode as a photograph: smooth colors with some noise."""
    width, height = PHOTOGRAPH
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(np.int16) + generator.integers(-12, 13, (height, width, 3), dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def from_files(cloc: CLOCVisionModel, clip: CLIPModel) -> float:
    """Regions per second from JPEG files to embeddings: CLOC with 32 boxes each, over CLIP on 32 crops, both at the
    best batch size."""
    boxes = random_boxes(32, PHOTOGRAPH).tolist()
    ours, theirs = CLOCProcessor(RegionImageProcessor()), CLIPImageProcessorPil()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photograph.jpg")
        photograph(path)

        def embed_regions(batch: int) -> torch.Tensor:
            inputs = ours(images=[str(path)] * batch, boxes=[boxes] * batch).to(DEVICE, DTYPE)
            return cloc.get_region_features(**inputs).pooler_output.cpu()

        def embed_crops(batch: int) -> torch.Tensor:
            image = Image.open(path).convert("RGB")
            crops = [image.crop(tuple(round(edge) for edge in box)) for box in boxes]
            parts = []
            for start in range(0, len(crops), batch):
                inputs = theirs(crops[start : start + batch], return_tensors="pt").to(DEVICE, DTYPE)
                parts.append(clip.get_image_features(**inputs).pooler_output)
            return torch.cat(parts).cpu()

        embed_crops(CROP_BATCHES[-1])  # warms up
        best = min(CROP_BATCHES, key=lambda batch: seconds(lambda: embed_crops(batch)))
        files = min(FILE_BATCHES, key=lambda batch: seconds(lambda: embed_regions(batch)) / batch)
        times = take_turns(
            {"CLOC": lambda: embed_regions(files), "crops": lambda: embed_crops(best)}, 30 if CUDA else 3
        )
    times["CLOC"] = [taken / files for taken in times["CLOC"]]
    print(f"\nJPEG of {PHOTOGRAPH[0]} × {PHOTOGRAPH[1]} pixels to the embeddings of 32 regions")
    print("| way | ms | regions/s |\n| --- | ---: | ---: |")
    for name, label in (("CLOC", f"CLOC, {files} file(s) a batch"), ("crops", f"CLIP on crops, {best} a batch")):
        taken = statistics.median(times[name])
        print(f"| {label} | {1000 * taken:,.1f} | {32 / taken:,.0f} |")
    return ratio(times, "crops", "CLOC")


def show(title: str, times: dict[str, list[float]], images: dict[str, int], over: str) -> None:
    print(f"\n{title}\n| way | ms | over {over} | images or regions/s |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        taken = statistics.median(values)
        print(f"| {name} | {1000 * taken:,.1f} | {ratio(times, name, over):.3f} | {images[name] / taken:,.0f} |")


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    cloc = CLOCVisionModel(CLOCConfig(vision_config={"model_type": "clip_vision_model", **VISION}))
    pixclip = PixCLIPVisionModel(PixCLIPConfig(vision_config={"model_type": "clip_vision_model", **VISION}))
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config={"num_hidden_layers": 1}))
    for model in (cloc, pixclip, clip):
        model.to(DEVICE, DTYPE).eval()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {torch.get_num_threads()} threads, {DTYPE}")

    pixels = torch.randn(IMAGES, 3, SIDE, SIDE, device=DEVICE, dtype=DTYPE)
    boxes = {count: random_boxes(count).expand(IMAGES, -1, -1).to(DEVICE) for count in (32, 100)}
    masks = random_masks(32).expand(IMAGES, -1, -1, -1).to(DEVICE)
    times = take_turns(
        {
            "CLOC, image alone": lambda: cloc.get_image_features(pixels),
            "CLOC, 32 regions": lambda: cloc.get_region_features(pixels, boxes[32]),
            "CLOC, 100 regions": lambda: cloc.get_region_features(pixels, boxes[100]),
            "PixCLIP, image alone": lambda: pixclip.get_image_features(pixels),
            "PixCLIP, 32 regions pooled": lambda: pixclip.get_region_features(pixels, masks, mode="pooled"),
        },
        ROUNDS,
    )
    units = dict(zip(times, (IMAGES, 32 * IMAGES, 100 * IMAGES, IMAGES, 32 * IMAGES), strict=True))
    show(f"{IMAGES} image(s) a pass", times, units, "CLOC, image alone")

    image, prompts = pixels[:1], random_masks(PROMPTED)[None].to(DEVICE)
    many = torch.randn(PROMPTED, 3, SIDE, SIDE, device=DEVICE, dtype=DTYPE)
    prompted = take_turns(
        {
            "CLIP, as many images": lambda: clip.get_image_features(many),
            "PixCLIP, prompted": lambda: pixclip.get_region_features(image, prompts),
        },
        ROUNDS if CUDA else 5,
    )
    show(f"{PROMPTED} regions of one image", prompted, dict.fromkeys(prompted, PROMPTED), "CLIP, as many images")
    ratios = {
        "cloc_32_over_one_pass": ratio(times, "CLOC, 32 regions", "CLOC, image alone"),
        "cloc_100_over_one_pass": ratio(times, "CLOC, 100 regions", "CLOC, image alone"),
        "cloc_over_crop_clip": from_files(cloc, clip),
        "pixclip_prompted_over_clip_passes": ratio(prompted, "PixCLIP, prompted", "CLIP, as many images"),
        "pixclip_pooled_32_over_one_pass": ratio(times, "PixCLIP, 32 regions pooled", "PixCLIP, image alone"),
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
