"""What a training step of CLOC and of PixCLIP costs beside one of a plain CLIP with the same towers.

Images of 224 pixels, a 12-layer text tower of width 512, image captions of 77 tokens; for CLOC four regions per image
with captions of 16 (or 77) tokens; for PixCLIP one region per image with a text of 77 tokens, branch by branch. A step
is forward, backward and AdamW. All models live in one process and take turns; random weights and inputs.

Runs without arguments: on a CPU with ViT-B/16 in float32, on a GPU with ViT-B/16 and ViT-L/14 in bfloat16. Prints
medians over rounds, the step's peak memory above what was held before it, and, last, one line of JSON (ViT-B/16).
"""

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pixclip_hf import CLOCConfig, CLOCModel, PixCLIPConfig, PixCLIPModel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCH, ROUNDS = (64, 15) if CUDA else (4, 3)
REGIONS, TOKENS, REGION_TOKENS, VOCABULARY = 4, 77, 16, 49408
CLOC_SHORT = f"CLOC, {REGIONS} regions of {REGION_TOKENS} tokens"
CLOC_LONG = f"CLOC, {REGIONS} regions of {TOKENS} tokens"
PIXCLIP = "PixCLIP, all three branches"
TEXT = CLIPTextConfig(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, projection_dim=512
)
VISION = {
    "ViT-B/16": CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
        image_size=224,
    ),
    "ViT-L/14": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=224,
    ),
}  # fmt: skip


class Step:
    """A training step of a model on one batch, with fields of its configuration set for it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], **fields):
        self.model, self.optimizer, self.fields = model, optimizer, fields
        self.batch = {name: value.to(DEVICE) for name, value in batch.items()}

    def __call__(self) -> None:
        for name, value in self.fields.items():
            setattr(self.model.config, name, value)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            loss = self.model(**self.batch, return_loss=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def texts(count: tuple[int, ...], tokens: int) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY - 2, (*count, tokens))
    ids[..., -1] = TEXT.eos_token_id
    return ids


def whole_images() -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(BATCH, 3, 224, 224),
        "input_ids": texts((BATCH,), TOKENS),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
    }


def boxes(count: int) -> torch.Tensor:
    corner = torch.rand(BATCH, count, 2) / 2
    return torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(BATCH, count, 2)], dim=-1)


def cloc_batch(region_tokens: int) -> dict[str, torch.Tensor]:
    return whole_images() | {
        "region_boxes": boxes(REGIONS),
        "region_attention_mask": torch.ones(BATCH, REGIONS, dtype=torch.long),
        "region_input_ids": texts((BATCH, REGIONS), region_tokens),
        "region_text_attention_mask": torch.ones(BATCH, REGIONS, region_tokens, dtype=torch.long),
    }


def pixclip_batch(crops: bool) -> dict[str, torch.Tensor]:
    masks = torch.zeros(BATCH, 1, 224, 224, dtype=torch.uint8)
    for mask, box in zip(masks[:, 0], (224 * boxes(1)[:, 0]).long().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 224, 224),
        "region_masks": masks,
        "region_attention_mask": torch.ones(BATCH, 1, dtype=torch.long),
        "region_input_ids": texts((BATCH, 1), TOKENS),
        "region_text_attention_mask": torch.ones(BATCH, 1, TOKENS, dtype=torch.long),
    }
    if crops:
        batch |= {"crop_pixel_values": torch.randn(BATCH, 1, 3, 224, 224), "crop_masks": masks.clone()}
    return batch


def build_steps(vision: CLIPVisionConfig) -> dict[str, Step]:
    """The steps to compare; those of one model differ in their batch or in the branches that are on."""
    towers = {"vision_config": vision.to_dict(), "text_config": TEXT.to_dict(), "projection_dim": 512}
    models = {
        "CLIP": CLIPModel(CLIPConfig(**towers)),
        "CLOC": CLOCModel(CLOCConfig(**towers)),
        "PixCLIP": PixCLIPModel(PixCLIPConfig(**towers, text_projection="linear")),
    }
    trained = {}
    for name, model in models.items():
        model.to(DEVICE).train()
        trained[name] = model, torch.optim.AdamW(model.parameters(), fused=True)
    return {
        "CLIP": Step(*trained["CLIP"], whole_images()),
        CLOC_SHORT: Step(*trained["CLOC"], cloc_batch(REGION_TOKENS)),
        CLOC_LONG: Step(*trained["CLOC"], cloc_batch(TOKENS)),
        "PixCLIP, mask branch": Step(*trained["PixCLIP"], pixclip_batch(False)),
        "PixCLIP, mask and crop": Step(*trained["PixCLIP"], pixclip_batch(True), local_global_loss_weight=0.0),
        PIXCLIP: Step(*trained["PixCLIP"], pixclip_batch(True), local_global_loss_weight=1.0),
    }


def seconds(step: Callable[[], None]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 2**10


def peak_memory(step: Step) -> float:
    """MiB that a step holds at its peak above weights, optimizer state and what else was there before."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier steps freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def matmul_rate() -> float:
    """Floating-point operations per second of large bfloat16 matrix products."""
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: left @ right) for _ in range(20)]
    return 2 * 8192**3 / statistics.median(times[5:])


def operations(step: Step) -> int:
    """Floating-point operations of a step's matrix products and attention, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(name: str) -> dict[str, float]:
    """Prints the table of a vision tower; returns the seconds of each step."""
    torch.manual_seed(0)
    steps = build_steps(VISION[name])
    for step in steps.values():  # warms up, and makes the optimizer's state
        step()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(ROUNDS):
        for kind, step in steps.items():
            times[kind].append(seconds(step))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    peak_rate = matmul_rate() if CUDA else None
    print(f"\n{name}, batch of {BATCH}, {'bfloat16' if CUDA else 'float32'}, median of {ROUNDS} rounds")
    print("| step | seconds | over CLIP | images/s | regions/s | peak MiB | share of matrix rate |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, step in steps.items():
        regions = step.batch["region_attention_mask"].numel() if "region_attention_mask" in step.batch else 0
        taken = medians[kind]
        share = f"{operations(step) / taken / peak_rate:.0%}" if CUDA else "–"
        print(
            f"| {kind} | {taken:.3f} | {taken / medians['CLIP']:.2f} | {BATCH / taken:,.1f} | "
            f"{regions / taken:,.1f} | {peak_memory(step):,.0f} | {share} |"
        )
    return medians


def main() -> None:
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {torch.get_num_threads()} threads")
    medians = compare("ViT-B/16")
    if CUDA:
        compare("ViT-L/14")
    ratios = {
        "cloc_over_clip": medians[CLOC_SHORT] / medians["CLIP"],
        "cloc_77_over_clip": medians[CLOC_LONG] / medians["CLIP"],
        "pixclip_over_clip": medians[PIXCLIP] / medians["CLIP"],
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
