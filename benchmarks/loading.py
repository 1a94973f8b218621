"""Memory and time of building a model from two towers, against loading the towers alone; a fresh process each.

ViT-B/16 as part of a CLIP, and a Llama of 0.53 billion random parameters in shards of 500 MB. Before a process
reports, it reads every weight once: transformers maps files into memory, and what was never read is not there yet. The
peak is the largest resident set (`VmHWM` of Linux), pages of mapped files included, less what the process had before
it began: Python and the libraries, about 400 MB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 17,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}
# Stored and built as; published language models are bfloat16, and float32 is what a model is built in if nothing is
# said.
CASES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
REPEATS = 3
MB = 1e6


def resident(field: str) -> int:
    """Bytes: `VmRSS` now, or `VmHWM` at most until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def store(folder: Path, dtype: str) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaModel

    sources = {
        "clip": (CLIPModel, CLIPConfig(vision_config={"patch_size": 16})),
        "llama": (LlamaModel, LlamaConfig(**LLAMA)),
    }
    for name, (model_class, config) in sources.items():
        model = model_class._from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder / dtype / name, max_shard_size="500MB")


def measure(what: str, folder: Path, stored: str, built: str) -> None:
    import torch
    from transformers import AutoModel, CLIPModel, LlamaModel  # noqa: F401 - imports are not part of the time
    from transformers.utils import logging

    from pixclip_hf import PixCLIPModel

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    dtype = getattr(torch, built)
    names = [str(folder / stored / name) for name in ("clip", "llama")]
    before, start = resident("VmRSS"), time.perf_counter()
    if what == "build":
        models = [PixCLIPModel.from_vision_text_pretrained(*names, dtype=dtype)]
    else:
        models = [AutoModel.from_pretrained(name, dtype=dtype) for name in names]
    for model in models:
        for weight in model.state_dict().values():
            weight.sum()
    seconds = time.perf_counter() - start
    size = sum(weight.nbytes for model in models for weight in model.state_dict().values())
    peak = resident("VmHWM")
    print(json.dumps({"seconds": seconds, "before": before, "peak": peak, "model": size}))


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds; each measures everything once")
    repeats = parser.parse_args().repeats
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in {stored for stored, _ in CASES}:
            run("store", folder, dtype)
        for _ in range(repeats):
            for case in CASES:
                for what in ("load", "build"):
                    line = run(what, folder, *case).splitlines()[-1]
                    results.setdefault((case, what), []).append(json.loads(line))
    print(f"{'stored':<9} {'built as':<9} {'model MB':>9} {'peak MB':>9} {'of it before':>13} {'over model':>11} "
          f"{'build s':>8} {'load s':>7} {'build/load':>11}")  # fmt: skip
    peaks, ratios, within = {}, {}, True
    for case in CASES:
        built, loaded = results[case, "build"], results[case, "load"]
        worst = max(built, key=lambda result: result["peak"] - result["before"])
        seconds = [statistics.median(result["seconds"] for result in side) for side in (built, loaded)]
        name = "_as_".join(dict.fromkeys(case))
        peaks[name] = round((worst["peak"] - worst["before"]) / worst["model"], 3)
        pairs = zip(built, loaded, strict=True)
        ratios[name] = round(statistics.median(one["seconds"] / other["seconds"] for one, other in pairs), 3)
        within &= all(result["peak"] <= 1.15 * result["model"] + 300 * MB for result in built)
        print(f"{case[0]:<9} {case[1]:<9} {worst['model'] / MB:>9.0f} {worst['peak'] / MB:>9.0f} "
              f"{worst['before'] / MB:>13.0f} {peaks[name]:>11.3f} {seconds[0]:>8.2f} {seconds[1]:>7.2f} "
              f"{ratios[name]:>11.3f}")  # fmt: skip
    print(f"The whole process within 1.15 × the model + 300 MB: {within}")
    print(json.dumps({"peak_over_model": max(peaks.values()), "build_over_load": max(ratios.values()), **peaks}))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "store":
        store(Path(sys.argv[2]), sys.argv[3])
    elif len(sys.argv) > 1 and sys.argv[1] in ("build", "load"):
        measure(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
