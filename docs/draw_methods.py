"""Draws the diagrams of methods.md: `python docs/draw_methods.py`.

A box names a part of the model, and the shape below is what that part returned when the demo's model, with new
weights, was given the first unseen scene. A part that no longer exists, or is not called, ends the script.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer

FOLDER = Path(__file__).parent
INPUT, TOWER, NEW, LOSS = "#eceff1", "#c5cae9", "#ffe0b2", "#ffffff"
WIDTH, HEIGHT = 1.75, 0.62


@dataclass
class Box:
    """A box of a diagram.

    Args:
        x, y: its middle.
        title: what it is.
        color: of its kind.
        part: the part of the model whose output shape stands below the title; without one, the shape of the input
            `given`, or nothing.
    """

    x: float
    y: float
    title: str
    color: str
    part: str | None = None
    given: str | None = None


CLOC = {
    "image": Box(0, 3, "image", INPUT, given="pixel_values"),
    "tower": Box(2.3, 3, "vision tower", TOWER, "vision_model"),
    "pooled": Box(4.6, 3.8, "image embedding", TOWER, "visual_projection"),
    "boxes": Box(0, 1.9, "boxes or masks", INPUT, given="region_boxes"),
    "prompter": Box(4.6, 2.5, "Prompter", NEW, "prompter"),
    "region": Box(6.9, 2.5, "region embedding", NEW, "region_projection"),
    "texts": Box(0, 0.7, "texts", INPUT, given="region_input_ids"),
    "language": Box(2.3, 0.7, "text tower", TOWER, "text_model"),
    "text": Box(4.6, 0.7, "text embedding", TOWER, "text_projection"),
    "ground": Box(6.9, 1.6, "box of the text", NEW, "box_head"),
    "image loss": Box(9.2, 3.8, "contrast with captions", LOSS),
    "region loss": Box(9.2, 2.5, "contrast with texts", LOSS),
    "box loss": Box(9.2, 1.6, "L1 and GIoU", LOSS),
}
CLOC_ARROWS = [
    ("image", "tower"), ("tower", "pooled"), ("tower", "prompter"), ("boxes", "prompter"), ("prompter", "region"),
    ("texts", "language"), ("language", "text"), ("text", "prompter"), ("prompter", "ground"),
    ("pooled", "image loss"), ("region", "region loss"), ("ground", "box loss"),
]  # fmt: skip
PIXCLIP = {
    "image": Box(0, 3.6, "image", INPUT, given="pixel_values"),
    "masks": Box(0, 2.6, "masks", INPUT, given="region_masks"),
    "patches": Box(2.3, 3.1, "patches with masks", NEW, "vision_model.embeddings.patch_embedding"),
    "tower": Box(4.6, 3.1, "vision tower", TOWER, "vision_model"),
    "region": Box(6.9, 3.1, "region embedding", TOWER, "visual_projection"),
    "crops": Box(0, 1.5, "crops with masks", INPUT, given="crop_pixel_values"),
    "crop": Box(6.9, 1.5, "crop embedding", TOWER),
    "same": Box(4.6, 1.5, "the same tower", TOWER),
    "pooled": Box(6.9, 4.2, "pooled patches", TOWER),
    "texts": Box(0, 0.4, "long texts", INPUT, given="region_input_ids"),
    "language": Box(2.3, 0.4, "language model", TOWER, "text_model"),
    "text": Box(6.9, 0.4, "text embedding", NEW, "text_projection"),
    "mask loss": Box(9.2, 3.1, "1  mask and text", LOSS),
    "crop loss": Box(9.2, 1.5, "2  crop and text", LOSS),
    "local loss": Box(9.2, 4.2, "3  pooled and crop", LOSS),
}
PIXCLIP_ARROWS = [
    ("image", "patches"), ("masks", "patches"), ("patches", "tower"), ("tower", "region"), ("tower", "pooled"),
    ("crops", "same"), ("same", "crop"), ("texts", "language"), ("language", "text"), ("region", "mask loss"),
    ("crop", "crop loss"), ("pooled", "local loss"), ("text", "crop loss"),
    ("text", "mask loss"), ("crop", "local loss"),
]  # fmt: skip
DIAGRAMS = {"cloc": (CLOC, CLOC_ARROWS), "pixclip": (PIXCLIP, PIXCLIP_ARROWS)}


def record_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what goes into a model and of what its parts return, by name."""
    torch.manual_seed(0)
    model, processor = small_model(family, scenes_tokenizer())
    scene = make_scene(0, split="test")
    regions: dict[str, Any] = {"boxes": [region["box"] for region in scene["regions"]]}
    if family == "pixclip":
        regions = {"masks": [region["mask"] for region in scene["regions"]], "return_crops": True}
    texts = [region["caption" if family == "cloc" else "long_caption"] for region in scene["regions"]]
    inputs = processor(images=scene["image"], text=scene["captions"][0], region_text=texts, **regions)
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = getattr(output, "last_hidden_state", output)
            shapes.setdefault(name, tuple(tensor.shape))

        return hook

    for box in DIAGRAMS[family][0].values():
        if box.part is not None:
            model.get_submodule(box.part).register_forward_hook(keep(box.part))
    names = ("pixel_values", "region_boxes", "region_masks", "region_attention_mask")
    with torch.no_grad():
        # The regions and their texts first: of parts that are called several times, the first call counts.
        model.eval().get_region_features(**{name: inputs[name] for name in names if name in inputs})
        model.get_text_features(inputs["region_input_ids"][0], inputs["region_text_attention_mask"][0])
        model(**inputs)
    return shapes


def label(box: Box, shapes: dict[str, tuple[int, ...]]) -> str:
    """What stands in a box.

    Raises:
        KeyError: a part of the model that was not called.
    """
    name = box.part or box.given
    return box.title if name is None else f"{box.title}\n{' × '.join(map(str, shapes[name]))}"


def draw(family: str, path: Path) -> None:
    """Writes the diagram of a method as SVG, its texts as text."""
    boxes, arrows = DIAGRAMS[family]
    shapes = record_shapes(family)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": family, "font.family": "sans-serif"}):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        axis = figure.subplots()
        axis.set_axis_off()
        axis.set_aspect("equal")
        axis.set_xlim(-1.1, 10.3)
        axis.set_ylim(0, 4.7)
        for start, end in arrows:
            one, other = boxes[start], boxes[end]
            # From side to side where there is a column between them, from edge to edge within a column.
            step = 0 if one.x == other.x else WIDTH / 2
            rise = 0 if step else HEIGHT / 2 * (1 if other.y > one.y else -1)
            axis.annotate(
                "",
                xy=(other.x - step, other.y - rise),
                xytext=(one.x + step, one.y + rise),
                arrowprops={"arrowstyle": "-|>", "color": "#546e7a", "linewidth": 1.1, "shrinkA": 2, "shrinkB": 2},
            )
        for box in boxes.values():
            corner = box.x - WIDTH / 2, box.y - HEIGHT / 2
            style = "round,pad=0,rounding_size=0.08"
            axis.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, facecolor=box.color, edgecolor="#546e7a"))
            axis.text(box.x, box.y, label(box, shapes), ha="center", va="center", fontsize=8.5, linespacing=1.4)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    for family in DIAGRAMS:
        draw(family, FOLDER / f"{family}.svg")
