"""Exports the two halves of a model, one for images with regions and one for texts, and compares them with the model.

    python examples/export_onnx.py --model runs/demo/cloc --output_dir runs/onnx
    python examples/export_onnx.py --model runs/demo/pixclip --mode pooled --int8 --output_dir runs/onnx-int8

`image/model.onnx` and `text/model.onnx` run in ONNX Runtime; `--format torch` writes `model.pt2` of torch.export.
Needs `pip install pixclip-hf[onnx]`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor
from transformers.exporters import ExportedModel

from pixclip_hf import CLOCVisionModel, PixCLIPVisionModel
from pixclip_hf.export import EXPORT_FORMATS, export_image_half, export_text_half
from pixclip_hf.scenes.dataset import make_scene

VISION_MODELS = {"cloc": CLOCVisionModel, "pixclip": PixCLIPVisionModel}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id of a CLOC or PixCLIP")
    parser.add_argument("--format", choices=EXPORT_FORMATS, default="onnx")
    parser.add_argument(
        "--mode", choices=("prompted", "pooled"), default="prompted", help="how PixCLIP reads its regions"
    )
    parser.add_argument("--opset", type=int, help="ONNX operator set; torch chooses by default")
    parser.add_argument("--int8", action="store_true", help="8-bit weights in the text half")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/onnx"))
    arguments = parser.parse_args(argv)

    # 1. Both halves to disk.
    model, processor = (
        AutoModel.from_pretrained(arguments.model).eval(),
        AutoProcessor.from_pretrained(arguments.model),
    )
    vision = VISION_MODELS[model.config.model_type].from_pretrained(arguments.model).eval()
    image = export_image_half(vision, arguments.format, arguments.mode, arguments.opset)
    text = export_text_half(model, arguments.format, arguments.opset, arguments.int8)
    for name, half in {"image": image, "text": text}.items():
        half.save_pretrained(arguments.output_dir / name)

    # 2. Read back, on other shapes than they were traced with.
    image, text = (ExportedModel.from_pretrained(arguments.output_dir / name) for name in ("image", "text"))
    scene = make_scene(0, split="test")
    boxes = [region["box"] for region in scene["regions"]]
    inputs = processor(images=[scene["image"]], boxes=[boxes], return_tensors="pt")
    inputs.pop("region_attention_mask")
    mode = {"mode": arguments.mode} if model.config.model_type == "pixclip" else {}
    expected = vision(**inputs, **mode)
    found = image(**inputs)
    differences = {
        name: (found[name] - expected[name]).abs().max().item() for name in ("image_embeds", "region_embeds")
    }
    if model.text_model is not None:
        tokens = processor(text=[region["caption"] for region in scene["regions"]], return_tensors="pt")
        embeds = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        differences["text_embeds"] = (text(**tokens)["text_embeds"] - embeds).abs().max().item()
    for name, difference in differences.items():
        print(f"{name:<14} differs from the model by at most {difference:.1e}")
    print(f"written: {arguments.output_dir}")
    return differences


if __name__ == "__main__":
    main()
