"""The towers of today, tiny, and which test covers which of them.

The table of towers in docs/models.md is made of this: `python tests/modeling/towers.py` writes it.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- towers: written by tests/modeling/towers.py -->\n", "<!-- end of towers -->\n"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"intermediate_size": 48, **SIZES}
IMAGES = {"hidden_size": 32, "image_size": 32, "patch_size": 8}
NAFLEX = {"hidden_size": 32, "patch_size": 8, "num_patches": 16, **WIDTHS}
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59}
TEXTS = {"hidden_size": 24, "max_position_embeddings": 40, **WIDTHS, **TOKENS}

# A name in the table: `model_type` and settings of the tower, and for texts the pooling.
VISION = {
    "CLIP": ("clip_vision_model", {**IMAGES, **WIDTHS}),
    "SigLIP, SigLIP 2 of fixed resolution": ("siglip_vision_model", {**IMAGES, **WIDTHS}),
    "SigLIP 2 of variable resolution (NaFlex)": ("siglip2_vision_model", NAFLEX),
    "EVA02-CLIP": ("eva02_vision_model", {**IMAGES, **WIDTHS}),
    "DINOv2": ("dinov2", {**IMAGES, **SIZES, "mlp_ratio": 2}),
    "DINOv2 with registers": ("dinov2_with_registers", {**IMAGES, **SIZES, "mlp_ratio": 2, "num_register_tokens": 3}),
    "DINOv3 (ViT)": ("dinov3_vit", {**IMAGES, **WIDTHS, "num_register_tokens": 3}),
    "ViT": ("vit", {**IMAGES, **WIDTHS}),
}
TEXT = {
    "CLIP": ("clip_text_model", TEXTS, "eos"),
    "BERT": ("bert", TEXTS, "cls"),
    "RoBERTa": ("roberta", TEXTS, "mean"),
    "Llama": ("llama", TEXTS, "mean"),
    # Its head brings its states to the width of the images, as in the giant SigLIP 2.
    "SigLIP, SigLIP 2": ("siglip_text_model", {**TEXTS, "projection_size": 32}, "tower"),
    "Qwen3": ("qwen3", {**TEXTS, "num_key_value_heads": 2, "head_dim": 8}, "last"),
}
SIGLIP_VISION = ("SigLIP, SigLIP 2 of fixed resolution", "SigLIP 2 of variable resolution (NaFlex)")
SIGLIP_TEXT = "SigLIP, SigLIP 2"
# Every vision tower with one language model, SigLIP's with its own text tower, every other text tower with one CLIP.
PAIRS = [
    *((vision, "Llama") for vision in VISION),
    *((vision, SIGLIP_TEXT) for vision in SIGLIP_VISION),
    *(("CLIP", text) for text in TEXT if text not in ("Llama", SIGLIP_TEXT)),
]
# A column of the table: the pairs that its test in test_towers.py runs on.
COVERED = {
    "step 0": PAIRS,
    "export": [pair for pair in PAIRS if pair[0] != SIGLIP_VISION[1]],
    "int8": PAIRS,
    "LoRA": PAIRS,
}
# What a test says is refused, by column.
REFUSED = {"export": [pair for pair in PAIRS if pair[0] == SIGLIP_VISION[1]]}


def build(side, name):
    """A model of transformers with that tower, its weights wide enough to matter: for CLIP on the image side a whole
    CLIP, whose projection counts."""
    kind, settings = (VISION if side == "vision" else TEXT)[name][:2]
    torch.manual_seed(sum(map(ord, kind)))
    if kind == "clip_vision_model":
        model = CLIPModel(CLIPConfig(vision_config=settings, text_config=TEXTS, projection_dim=16))
    else:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def mark(column, pair):
    """What the table says of a pair."""
    if pair in COVERED[column]:
        return "yes"
    return "refused" if pair in REFUSED.get(column, ()) else "not tested"


def table():
    """The table in Markdown."""
    rows = ["| vision tower | text tower | " + " | ".join(COVERED) + " |", "| --- " * (2 + len(COVERED)) + "|"]
    for pair in PAIRS:
        marks = [mark(column, pair) for column in COVERED]
        rows.append(f"| {' | '.join((*pair, *marks))} |")
    return "\n".join(rows) + "\n"


def documented(page):
    """(before, table, behind) of the page."""
    before, rest = page.split(BEGIN)
    found, behind = rest.split(END)
    return before, found, behind


if __name__ == "__main__":
    before, _, behind = documented(DOCS.read_text(encoding="utf-8"))
    DOCS.write_text(before + BEGIN + table() + END + behind, encoding="utf-8")
