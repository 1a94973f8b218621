"""What masks and images cost in the processor, beside one mask after the other through PIL, and beside CLIP's own.

A 1024-pixel image with 32 masks to 224 pixels. The loop decodes a mask at full size, makes it a PIL image, resizes it
bilinearly and cuts at a half. Both sides start from the same object; the image itself is in neither time. RLE and
polygons are also read without a look at any of their numbers, which is what the checks cost. What is
compared takes turns in one process; a ratio is the median over rounds of the ratio within a round. Runs without
arguments on one thread; prints a table and, last, one line of JSON with the ratios.
"""

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pixclip_hf import PixCLIPProcessor
from pixclip_hf.processing import processing_regions, processing_runs
from pixclip_hf.processing.image_processing_region import RegionImageProcessor
from pixclip_hf.processing.processing_geometry import sample_masks
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle, read_regions

SOURCE, SIDE, MASKS, IMAGES, ROUNDS = 1024, 224, 32, 4, 31
FORMS = ("RLE", "polygon", "PIL", "numpy")


def take_turns(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, over: str) -> float:
    return statistics.median(one / other for one, other in zip(times[name], times[over], strict=True))


def blobs(count: int) -> list[list[float]]:
    """Rings of 60 points around wavy blobs, small and large, as annotators draw them."""
    generator, angles = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 60, endpoint=False)
    rings = []
    for _ in range(count):
        radius = generator.uniform(20, 300) * (1 + 0.3 * np.sin(generator.integers(2, 6) * angles))
        center = generator.uniform(200, SOURCE - 200, 2)
        ring = center[:, None] + radius * np.stack([np.cos(angles), np.sin(angles)])
        rings.append(ring.clip(0, SOURCE).T.ravel().tolist())
    return rings


def draw(ring: list[float]) -> Image.Image:
    image = Image.new("L", (SOURCE, SOURCE))
    ImageDraw.Draw(image).polygon(ring, fill=255)
    return image


def pil_loop(masks: list[Any], form: str) -> np.ndarray:
    """(R, SIDE, SIDE) bool, one mask after the other through PIL."""
    results = []
    for mask in masks:
        if form == "PIL":
            image = mask
        else:
            values = decode_rle(mask) if form == "RLE" else np.asarray(draw(mask[0])) if form == "polygon" else mask
            image = Image.fromarray(values.astype(np.uint8) * 255 if values.dtype == bool else values, mode="L")
        results.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) >= 128)
    return np.stack(results)


def unchecked_rle(rle: dict[str, Any]) -> processing_runs.RunMask:
    """`read_rle` of a compressed code that is known to be right."""
    codes = np.frombuffer(rle["counts"].encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    position = np.arange(codes.size) - np.repeat(first, lengths)
    runs = np.add.reduceat((codes & 0x1F) << (5 * position), first)
    runs -= np.where(codes[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    edges = np.cumsum(runs)[: runs.size // 2 * 2]
    return processing_runs.RunMask.from_edges(tuple(rle["size"]), edges, by_columns=True)


# Form -> what reads it with checks, and the same without.
CHECKED = {
    "RLE": (processing_regions, "read_rle", unchecked_rle),
    "polygon": (processing_runs, "_ring_points", lambda ring: np.asarray(ring, dtype=np.float64).reshape(-1, 2)),
}


def without_checks(form: str, work: Callable[[], Any]) -> Any:
    module, name, unchecked = CHECKED[form]
    checked = getattr(module, name)
    setattr(module, name, unchecked)
    try:
        return work()
    finally:
        setattr(module, name, checked)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    torch.set_num_threads(1)
    rings = blobs(MASKS)
    drawn = [draw(ring) for ring in rings]
    arrays = [np.asarray(image) for image in drawn]
    masks = {
        "RLE": [encode_rle(array) for array in arrays],
        "polygon": [[ring] for ring in rings],
        "PIL": drawn,
        "numpy": arrays,
    }
    image_processor = RegionImageProcessor(size={"height": SIDE, "width": SIDE})
    (geometry,) = image_processor.get_geometries([(SOURCE, SOURCE)])

    def ours(form: str) -> np.ndarray:
        """What `PixCLIPProcessor` does with the masks of a call."""
        (regions,) = read_regions(masks[form], None, [(SOURCE, SOURCE)], False, "masks")
        return sample_masks(regions.get_masks(), geometry, regions.names)

    noise = np.random.default_rng(0).integers(0, 256, (SOURCE, SOURCE, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)] * IMAGES
    clip = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor = PixCLIPProcessor(image_processor)
    ways: dict[str, Callable[[], object]] = {
        "images": lambda: image_processor(images, return_tensors="pt"),
        "CLIP": lambda: clip(images, return_tensors="pt"),
        "call": lambda: processor(images=images[0], masks=masks["RLE"]),
    }
    for form in FORMS:
        ways[form] = lambda form=form: ours(form)
        ways[f"{form} loop"] = lambda form=form: pil_loop(masks[form], form)
    for form in CHECKED:
        ways[f"{form} unchecked"] = lambda form=form: without_checks(form, lambda: ours(form))
        assert np.array_equal(ways[form](), ways[f"{form} unchecked"]())
    times = take_turns(ways)

    print(f"{MASKS} masks of {SOURCE} × {SOURCE} to {SIDE} × {SIDE} pixels, one thread")
    print("| masks | ms | PIL loop, ms | times faster | peak, full-size masks | loop's | pixels that agree |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    faster = {}
    for form in FORMS:
        loop = f"{form} loop"
        faster[form] = ratio(times, loop, form)
        peaks = [peak_bytes(ways[name]) / SOURCE**2 for name in (form, loop)]
        agree = (ours(form) == pil_loop(masks[form], form)).mean()
        print(
            f"| {form} | {1000 * statistics.median(times[form]):.2f} | {1000 * statistics.median(times[loop]):.1f} | "
            f"{faster[form]:.1f} | {peaks[0]:.1f} | {peaks[1]:.1f} | {agree:.2%} |"
        )
    alone, theirs, call = (1000 * statistics.median(times[name]) for name in ("images", "CLIP", "call"))
    print(
        f"\n{IMAGES} images of {SOURCE} pixels: {alone:.1f} ms, CLIP's processor {theirs:.1f} ms; "
        f"one image with {MASKS} masks (RLE): {call:.1f} ms"
    )
    checks = {form: ratio(times, form, f"{form} unchecked") for form in CHECKED}
    shown = ", ".join(f"{form} {1000 * statistics.median(times[f'{form} unchecked']):.2f} ms" for form in CHECKED)
    print(f"without checks: {shown}")
    ratios = {
        "masks_over_pil_loop": min(faster["RLE"], faster["polygon"]),
        "images_over_clip_processor": ratio(times, "images", "CLIP"),
        **{f"{form.lower()}_masks_over_pil_loop": faster[form] for form in FORMS},
        **{f"{form.lower()}_checks_over_none": checks[form] for form in CHECKED},
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
