"""Real checkpoints by name: do they start from what they are made of, and do they classify the regions of COCO?

    python examples/real_weights.py --towers openai/clip-vit-base-patch16 google/siglip2-base-patch16-224 \\
        --text any/llm --alpha_clip clip_b16_grit1m_fultune_8xe.pth --clip openai/clip-vit-base-patch16 \\
        --pixclip PixCLIP_B16.pth --pixclip_text microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned --coco data/coco

Everything is optional. What was not run is listed at the end, and why.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from pixclip_hf import PixCLIPModel, load_encoder
from pixclip_hf.conversion.convert import convert
from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.evaluation.tasks import run_task

# Top-1 on COCO by masked crops, class mean, in percent, by the width of the image tower: Alpha-CLIP, arXiv 2312.03818.
# The code published with PixCLIP prints no results.
PUBLISHED = {"clip": {768: 50.4, 1024: 55.4}, "alpha-clip": {768: 55.4, 1024: 58.8}}
PROTOCOLS = ("pixclip-coco", "pixclip-coco-official", "context-masks")
# A plain CLIP sees a region as a crop whatever the protocol.
VIEW_PROTOCOLS = ("context-masks",)
MEASURES = ("accuracy", "top5_accuracy", "class_mean_accuracy", "class_mean_top5_accuracy")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--towers", nargs="*", default=[], help="CLIP, SigLIP, SigLIP 2, DINO or ViT: Hub ids or folders")
parser.add_argument("--text", help="language model behind the towers; none by default")
parser.add_argument("--alpha_clip", help="file of an Alpha-CLIP")
parser.add_argument("--clip", help="the CLIP that it was trained from; for its tokenizer where the file is whole")
parser.add_argument("--clip_weights", action="store_true", help="take the text tower from --clip too: a visual half")
parser.add_argument("--pixclip", help="file of a PixCLIP")
parser.add_argument("--pixclip_text", help="its language model; without it, there are no texts to compare with")
parser.add_argument("--models", nargs="*", default=[], help="CLOC or PixCLIP: Hub ids or folders")
parser.add_argument("--coco", help="folder as `pixclip-hf evaluate --layouts` prints it")
parser.add_argument("--output_dir", type=Path, default=Path("runs/real-weights"))
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def check_step_0(name, text):
    """Whether a PixCLIP made of a tower gives the tower's own image features, whatever the mask: float32 on the CPU,
    where equal computations give equal bits."""
    options = {"text_hidden_size": 1} if text is None else {"text_pooling": "mean"}
    model = PixCLIPModel.from_vision_text_pretrained(name, text, **options)
    source = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    config = model.config.vision_config
    side = model.vision_adapter.whole_image_size(config)
    generator = torch.Generator().manual_seed(0)
    # Two images: of one alone, a CPU rounds the last product by where its weights lie in memory.
    inputs = {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    if model.takes_patches:
        grid = side // config.patch_size
        inputs = {
            "pixel_values": torch.randn(2, grid**2, 3 * config.patch_size**2, generator=generator),
            "pixel_attention_mask": torch.ones(2, grid**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[grid, grid]] * 2),
        }
    outputs = source.get_image_features(**inputs) if hasattr(source, "get_image_features") else source(**inputs)
    expected = model.vision_adapter.pooled_image(outputs)
    masks = [torch.rand(2, 1, side, side, generator=generator) > share for share in (0.5, 1.0)]
    found = [model.get_image_features(**inputs).pooler_output]
    found += [model.get_region_features(**inputs, region_masks=rows).pooler_output[:, 0] for rows in masks]
    return [(features - expected).abs().max().item() for features in found]


def main(argv=None):
    arguments = parser.parse_args(argv)
    not_run, models = [], []

    # 1. Step 0 of every tower. A tower with texts of its own is also measured below, on crops.
    for name in arguments.towers:
        largest = max(check_step_0(name, arguments.text))
        print(f"step 0, {name}: " + ("equal bit for bit" if largest == 0 else f"differs by up to {largest:.1e}"))
        config = AutoConfig.from_pretrained(name)
        if hasattr(config, "text_config"):
            models.append((config.model_type, name, name))
        else:
            not_run.append(f"classification by {name}: it has no text tower")

    # 2. Published files, converted: every weight of them is accounted for, or the conversion fails.
    alpha = {"tokenizer": arguments.clip} | ({"clip": arguments.clip} if arguments.clip_weights else {})
    for kind, file, options in (
        ("alpha-clip", arguments.alpha_clip, alpha),
        ("pixclip", arguments.pixclip, {"text_model": arguments.pixclip_text}),
    ):
        if file is None:
            not_run.append(f"{kind}: no file was given")
            continue
        folder = arguments.output_dir / kind
        if not folder.exists():
            report = convert(kind, file, folder, **options)
            print(f"{kind}, {file}: {len(report['targets'])} weights, {'; '.join(report['notes']) or 'no notes'}")
        if AutoProcessor.from_pretrained(folder).tokenizer is None:
            not_run.append(f"classification by {kind}: no tokenizer or language model was given")
        else:
            models.append((kind, file, str(folder)))

    models += [(AutoConfig.from_pretrained(name).model_type, name, name) for name in arguments.models]

    # 3. The regions of COCO, embedded once per protocol and kept in the cache, among its classes.
    if arguments.coco is None:
        not_run.append("classification: no --coco")
        models = []
    for kind, name, place in models:
        encoder = CachedEncoder(
            load_encoder(place, device=arguments.device, dtype="float32"),
            arguments.output_dir / "cache",
            progress=False,
            batch_size=arguments.batch_size,
        )
        width = encoder.encoder.model.config.vision_config.hidden_size
        published = PUBLISHED.get(kind, {}).get(width)
        sees_crops = encoder.encoder.view is not None
        for protocol in VIEW_PROTOCOLS if sees_crops else PROTOCOLS:
            task, options = "region-classification", {"protocol": protocol, "sensitivity_regions": 0}
            (result,) = run_task(encoder, task, arguments.coco, **options)
            figures = " ".join(f"{measure} {100 * result.metrics[measure]:.1f}" for measure in MEASURES)
            comparable = published is not None and (sees_crops or protocol != "context-masks")
            beside = f"{published} (class mean)" if comparable else "none"
            print(f"{name}, {protocol}, {result.metrics['region_count']} regions: {figures}; published: {beside}")

    # 4. What none of this says.
    not_run.append("referring expressions and retrieval: `pixclip-hf evaluate` has them")
    print("not run:", *not_run, sep="\n  ")


if __name__ == "__main__":
    main()
