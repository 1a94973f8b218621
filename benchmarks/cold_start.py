"""A search from a cold start: `pixclip-hf search` in a fresh process, against importing torch and transformers alone.

A small CLOC (two layers of width 32, random weights) embeds the regions of 40 drawn scenes. Each search is timed until
its hits are printed and until its sheet is drawn, with LanceDB, the default, and with the exact store, which needs no
library of its own. Runs without arguments; prints a table and, last, one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from pixclip_hf import CLOCConfig, CLOCModel, CLOCProcessor
from pixclip_hf.embedding.encoder_choice import EncoderChoice
from pixclip_hf.embedding.run import embed
from pixclip_hf.processing.image_processing_region import RegionImageProcessor
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

IMPORTS = "import torch\nfrom transformers import AutoModel, AutoProcessor"
SEARCH = "import sys\nfrom pixclip_hf.cli import main\nsys.exit(main())"
QUERY = "a plain red disc"
STORES = ("lance", "exact")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = scenes_tokenizer()
    ids = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLOCConfig(
        vision_config={"model_type": "clip_vision_model", **SIZE, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "clip_text_model", **SIZE, **ids},
        projection_dim=16,
    )
    CLOCModel(config).save_pretrained(folder)
    CLOCProcessor(RegionImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def import_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - start


def search_seconds(folder: Path, store: str) -> tuple[float, float]:
    """Until the first line below the query is there, and until the process has ended."""
    start = time.perf_counter()
    command = [sys.executable, "-c", SEARCH, "search", str(folder), QUERY, "--store", store]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    answered = 0.0
    for line in process.stdout:
        if not answered and line.startswith("  "):
            answered = time.perf_counter() - start
    assert process.wait() == 0 and answered
    return answered, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    times: dict[str, list[float]] = {"imports": []}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"))
        output = Path(folder, "embeddings")
        embed("scenes:40", EncoderChoice(str(Path(folder, "model"))), output, kinds=["region"], progress=False)
        for store in STORES:  # builds it, and fills the disk cache
            search_seconds(output, store)
        for _ in range(arguments.repeats):
            times["imports"].append(import_seconds())
            for store in STORES:
                for name, seconds in zip(("hits", "sheet"), search_seconds(output, store), strict=True):
                    times.setdefault(f"{store}, {name}", []).append(seconds)
    print(f"{'':<16}{'median s':>10}{'over imports':>14}")
    ratios = {}
    for name, values in times.items():
        pairs = zip(values, times["imports"], strict=True)
        ratios[name] = statistics.median(value / imports for value, imports in pairs)
        print(f"{name:<16}{statistics.median(values):>10.2f}{ratios[name]:>14.2f}")
    line = {"hits_over_imports": ratios["lance, hits"], "exact_hits_over_imports": ratios["exact, hits"]}
    print(json.dumps({name: round(ratio, 3) for name, ratio in line.items()}))


if __name__ == "__main__":
    main()
