"""What ONNX Runtime, int8 and bfloat16 give on a CPU: speed of the text tower, and what becomes of the ranking.

Speed is of a text tower of CLIP ViT-B/16's size with random weights, and of the image half in bfloat16. The ranking is
that of the demo's CLOC (`make demo`), a trained model: the regions of unseen scenes by the similarity of texts, where
only the texts' embeddings change. Without the demo it says so and leaves the ranking out.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor

from pixclip_hf import CLOCConfig, CLOCModel, RegionEncoder
from pixclip_hf.export import TextHalf, export_text_half
from pixclip_hf.scenes.dataset import all_descriptions, make_scene

DEMO = Path("runs/demo/cloc")
TEXTS, LENGTH, REPEATS, SCENES, TOP = 8, 64, 7, 200, 10


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    seconds = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def text_halves(model: CLOCModel) -> dict[str, Callable[..., dict[str, torch.Tensor]]]:
    """The text half of a model in float32 as it is, in ONNX Runtime, in ONNX Runtime with int8, and in bfloat16."""
    plain = TextHalf(model)
    half = TextHalf(type(model)(model.config).to(torch.bfloat16).eval())
    half.load_state_dict(plain.state_dict())
    return {"eager": plain, "onnx": export_text_half(model), "int8": export_text_half(model, int8=True), "bf16": half}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    # ViT-B/16 at 224 px is what CLIPVisionConfig has but for its patches; CLIP's text tower is what it has.
    config = CLOCConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "image_size": 224,
            "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
        },
        text_config={"model_type": "clip_text_model", "hidden_size": 512, "intermediate_size": 2048,
                     "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 8192},
        projection_dim=512,
    )  # fmt: skip
    model = CLOCModel(config).eval()
    halves = text_halves(model)
    tokens = {"input_ids": torch.randint(3, 8000, (TEXTS, LENGTH))}
    tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
    seconds = medians({name: partial(half, **tokens) for name, half in halves.items()})
    del halves
    image = {"pixel_values": torch.randn(1, 3, 224, 224), "region_boxes": torch.rand(1, 32, 4).sort(-1).values}
    half_image = {"pixel_values": image["pixel_values"].bfloat16(), "region_boxes": image["region_boxes"]}
    half_model = CLOCModel(config).to(torch.bfloat16).eval()
    images = medians(
        {
            "eager": partial(model.get_region_features, **image),
            "bf16": partial(half_model.get_region_features, **half_image),
        }
    )
    print(f"{'text tower':<12} {'median ms':>9}   {TEXTS} texts of {LENGTH} tokens, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:<12} {1e3 * value:>9.1f}")
    print(f"{'image half':<12} {'median ms':>9}   one image, 32 regions")
    for name, value in images.items():
        print(f"{name:<12} {1e3 * value:>9.1f}")
    # Speedups: above 1 is faster than eager float32.
    ratios = {f"{name}_text_speedup": seconds["eager"] / seconds[name] for name in ("onnx", "int8", "bf16")}
    ratios["bf16_image_speedup"] = images["eager"] / images["bf16"]
    if DEMO.exists():
        ratios |= ranking()
    else:
        print(f"ranking left out: {DEMO} is not there (make demo)")
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


def ranking() -> dict[str, float]:
    """Share of the texts whose best region stays, and of their best regions that stay among the best."""
    model, processor = AutoModel.from_pretrained(DEMO).eval(), AutoProcessor.from_pretrained(DEMO)
    records = [make_scene(index, "test") for index in range(SCENES)]
    regions = torch.cat(RegionEncoder(model, processor).encode_records(records, convert_to_tensor=True))
    tokens = processor(text=all_descriptions(), return_tensors="pt")
    best = {
        name: (F.normalize(half(**tokens)["text_embeds"].float(), dim=-1) @ regions.T).topk(TOP).indices
        for name, half in text_halves(model).items()
    }
    ratios = {}
    for name in ("onnx", "int8", "bf16"):
        kept = (best[name][:, :, None] == best["eager"][:, None, :]).any(-1).float().mean().item()
        first = (best[name][:, 0] == best["eager"][:, 0]).float().mean().item()
        print(f"{name}: of {len(best[name])} texts {100 * first:.1f} % keep their first of {len(regions)} regions, "
              f"{100 * kept:.1f} % of the first {TOP} stay")  # fmt: skip
        ratios |= {f"{name}_top1_kept": first, f"{name}_top{TOP}_kept": kept}
    return ratios


if __name__ == "__main__":
    main()
