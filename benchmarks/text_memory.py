"""What a pass of texts through a language-model tower takes in memory beside the weights: embedded by a model of ours,
against the same tower called as it is, which keeps the keys and values of all its layers.

Memory is the peak of resident memory (`VmHWM`) in a fresh process each, less what was resident before the pass; on a
GPU, the peak of what is allocated there, less what was allocated before.
"""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from pixclip_hf.modeling.modeling_text import encode_text

TEXTS, TOKENS, LAYERS, WIDTH = 32, 256, 24, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_tower() -> PreTrainedModel:
    """A decoder of the family of Llama, its weights random."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=1000,
        max_position_embeddings=TOKENS,
    )
    return AutoModel.from_config(config).eval().to(DEVICE)


def embed(tower: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return encode_text(tower, input_ids, None, "mean").pooler_output


def call(tower: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return tower(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state.mean(1)


WAYS: dict[str, Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]] = {"embedded": embed, "called": call}


def resident(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def extra_memory(name: str) -> int:
    """Bytes at the peak of a pass beyond those before it."""
    tower = build_tower()
    input_ids = torch.randint(1000, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    WAYS[name](tower, input_ids[:1, :8])  # starts threads and loads kernels
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[name](tower, input_ids)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    WAYS[name](tower, input_ids)
    return resident("VmHWM") - before


def main() -> None:
    memory = {}
    for name in WAYS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            memory[name] = pool.submit(extra_memory, name).result()
    print(f"{TEXTS} texts of {TOKENS} tokens, {LAYERS} layers of width {WIDTH}, {DEVICE}")
    for name, size in memory.items():
        print(f"{name:<9} {size / 2**20:>6,.0f} MiB beside the weights")
    print(json.dumps({"memory_ratio": round(memory["embedded"] / memory["called"], 3)}))


if __name__ == "__main__":
    main()
