"""The contrastive loss in tiles against one matrix of all pairs: seconds of a forward and backward pass, and the
memory that it takes beside its inputs.

Memory is the peak of resident memory (`VmHWM`) in a fresh process each, less what was resident before the pass; on a
GPU, the peak of what is allocated there, less what was allocated before.
"""

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from pixclip_hf.modeling.modeling_losses import contrastive_loss
from pixclip_hf.modeling.modeling_tiled_loss import TILE_SIZE

ROWS, WIDTH = 16384, 512
REPEATS = 3
TILE_SIZES = {"plain": 0, "tiled": TILE_SIZE}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows: int) -> dict[str, torch.Tensor]:
    """Embeddings, texts of which some are the same, and a temperature as in training."""
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=-1).to(DEVICE) for _ in range(2)]
    return {
        "embeds": sides[0].requires_grad_(),
        "text_embeds": sides[1].requires_grad_(),
        "logit_scale": torch.tensor(20.0, device=DEVICE, requires_grad=True),
        "ids": torch.randint(0, 2 * rows, (rows,), generator=generator).to(DEVICE),
        "valid": torch.ones(rows, dtype=torch.bool, device=DEVICE),
    }


def step(name: str, inputs: dict[str, torch.Tensor]) -> float:
    """One pass, forward and backward; returns the loss."""
    for value in inputs.values():
        value.grad = None
    loss = contrastive_loss(**inputs, tile_size=TILE_SIZES[name])
    loss.backward()
    return loss.item()


def resident(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def extra_memory(name: str) -> int:
    """Bytes at the peak of a pass beyond those before it."""
    inputs = problem(ROWS)
    step(name, problem(64))  # starts threads and loads kernels
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, inputs)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    step(name, inputs)
    return resident("VmHWM") - before


def main() -> None:
    memory = {}
    for name in TILE_SIZES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            memory[name] = pool.submit(extra_memory, name).result()
    inputs = problem(ROWS)
    for name in TILE_SIZES:
        step(name, problem(64))
    losses, times = {}, {name: [] for name in TILE_SIZES}
    for _ in range(REPEATS):
        for name in TILE_SIZES:
            start = time.perf_counter()
            losses[name] = step(name, inputs)
            times[name].append(time.perf_counter() - start)
    print(f"{ROWS:,} rows of width {WIDTH}, {DEVICE}, {torch.get_num_threads()} threads")
    print(f"{'loss':<8} {'value':>10} {'median s':>9} {'min s':>7} {'max s':>7} {'MiB beside the inputs':>22}")
    for name, values in times.items():
        row = f"{name:<8} {losses[name]:>10.6f} {statistics.median(values):>9.2f} {min(values):>7.2f}"
        print(f"{row} {max(values):>7.2f} {memory[name] / 2**20:>22,.0f}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        "memory_ratio": round(memory["tiled"] / memory["plain"], 4),
        "time_ratio": round(medians["tiled"] / medians["plain"], 3),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
