"""What the demo asks of a model: pure functions from an image, its regions and texts to results, without Gradio."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..encoders.base import logit_scale_and_bias
from ..encoders.protocol import Encoder
from ..mask_models import MaskModel, masks_from_points
from ..processing.processing_regions import mask_box
from ..visualization import draw_hit, similarity_map

KINDS = ("box", "mask", "point")


@dataclass(frozen=True)
class Region:
    """A region as it was drawn: exactly one of box, mask and points.

    Args:
        box: xyxy in pixels.
        mask: `(H, W)` bool.
        points: `[x, y]` in pixels each.
        point_labels: 1 for a point on the region, 0 for one beside it.

    Raises:
        ValueError: none or several of the three, or not one label per point.
    """

    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    points: tuple[tuple[float, float], ...] = ()
    point_labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("box", "mask") if getattr(self, name) is not None] + ["points"] * bool(self.points)
        if len(given) != 1:
            raise ValueError(f"A region must have one of box, mask and points, got {', '.join(given) or 'none'}.")
        if len(self.points) != len(self.point_labels):
            raise ValueError(
                f"`point_labels` must hold one label per point, got {len(self.point_labels)} for {len(self.points)}."
            )

    @property
    def kind(self) -> str:
        """`"box"`, `"mask"` or `"point"`."""
        return "box" if self.box is not None else "mask" if self.mask is not None else "point"


@dataclass(frozen=True)
class TextScore:
    """How well a text describes a region.

    Attributes:
        text: the text.
        cosine: the cosine similarity of the two embeddings.
        share: the probability in [0, 1] that the model gives the text, among all texts or, for a model with a sigmoid,
            by itself.
    """

    text: str
    cosine: float
    share: float


@dataclass(frozen=True)
class TextPlace:
    """Where a text is in an image.

    Attributes:
        values: `(24, 24)` float32, the cosine of the text and a window around each point of a grid.
        box: xyxy in pixels, from the grounding head of CLOC; None for other models.
        score: the cosine of the text and the region in the box, lower where the text is absent; None without a box.
    """

    values: np.ndarray
    box: list[float] | None
    score: float | None


@dataclass(frozen=True)
class Found:
    """A hit of a search.

    Attributes:
        id, cosine, category: of the hit, see [`Hit`].
        image: the surroundings of the hit, with its box.
    """

    id: str
    cosine: float
    category: str | None
    image: Image.Image = field(repr=False)


def region_kinds(encoder: Encoder, mask_model: MaskModel | None = None) -> tuple[str, ...]:
    """How a region may be drawn. Boxes and masks stand in for each other; points need a model that reads them, or a
    mask model that makes masks of them."""
    return KINDS if "point" in encoder.prompts or mask_model is not None else KINDS[:2]


def box_of_corners(
    first: tuple[float, float], second: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The box between two opposite corners in any order, at least a pixel wide and high.

    Args:
        first, second: `(x, y)` in pixels; inside of the image, which includes its edges.
        size: `(width, height)` of the image.
    """
    edges = []
    for a, b, most in zip(first, second, size, strict=True):
        low = min(max(min(a, b), 0.0), most - 1.0)
        edges.append((low, min(max(a, b, low + 1.0), float(most))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


def mask_of_layers(layers: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """The mask `(H, W)` bool of what was painted on layers over an image.

    Args:
        layers: RGBA, of any size.
        size: `(width, height)` of the image.

    Raises:
        ValueError: nothing is painted.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    for layer in layers:
        # Opaque on most of a pixel; of a stroke that is thinner than that everywhere, its densest pixel.
        painted = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value >= 128))
        share = np.asarray(painted.resize(size, Image.Resampling.BOX))
        if share.any():
            mask |= share >= min(128, int(share.max()))
    if not mask.any():
        raise ValueError("Nothing is painted: draw over the region with the brush first.")
    return mask


def read_texts(lines: str | None) -> list[str]:
    """The texts of a field that holds one per line.

    Raises:
        ValueError: no text, or one twice.
    """
    texts = [line.strip() for line in (lines or "").splitlines() if line.strip()]
    if not texts:
        raise ValueError("No text is given: write one per line.")
    if repeated := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise ValueError(f"Texts must differ from each other, got {repeated[0]!r} more than once.")
    return texts


def cut_texts(encoder: Encoder, texts: Sequence[str]) -> int:
    """How many texts are longer than the model reads."""
    return encoder.text_keys(texts)[1]


def embed_regions(
    encoder: Encoder, image: Image.Image, regions: Sequence[Region], mask_model: MaskModel | None = None
) -> np.ndarray:
    """Embeds the regions of an image: `(R, D)` float32, normalized.

    Args:
        encoder: the model. Where it is not prompted by what a region was drawn as, a box becomes a rectangular mask,
            a mask its tight box, and points a mask by the mask model.
        image: RGB.
        regions: at least one.
        mask_model: see [`region_kinds`].

    Raises:
        ValueError: no regions, a region outside of the image, or points that neither model takes.
    """
    if not regions:
        raise ValueError("No region is drawn: draw at least one.")
    regions = [_as_mask(encoder, image, region, mask_model) for region in regions]
    rows: dict[int, np.ndarray] = {}
    # Each kind by itself: a processor takes boxes and masks together for the same regions only.
    for kind in KINDS:
        numbers = [number for number, region in enumerate(regions) if region.kind == kind]
        if not numbers:
            continue
        drawn = [regions[number] for number in numbers]
        given: dict[str, Any]
        if kind == "point":
            given = {
                "points": [[list(point) for point in region.points] for region in drawn],
                "point_labels": [list(region.point_labels) for region in drawn],
            }
        elif kind == "box":
            given = {"boxes": [region.box for region in drawn]}
        else:
            given = {"masks": [region.mask for region in drawn]}
        prompt = kind if kind in encoder.prompts else None
        found = encoder.encode_regions(image, **given, prompt=prompt, show_progress_bar=False)
        rows |= dict(zip(numbers, found, strict=True))
    return np.stack([rows[number] for number in range(len(regions))])


def _as_mask(encoder: Encoder, image: Image.Image, region: Region, mask_model: MaskModel | None) -> Region:
    """The region itself, or the mask of its points where the model reads none."""
    if region.kind != "point" or "point" in encoder.prompts:
        return region
    if mask_model is None:
        raise ValueError("This model reads no points: draw a box or a mask, or start with `--mask_model`.")
    return mask_of_points(mask_model, image, region)


def mask_of_points(mask_model: MaskModel, image: Image.Image, region: Region) -> Region:
    """A region given by points as the mask that a mask model makes of them."""
    points = [[list(point) for point in region.points]]
    masks: list[Any] = masks_from_points(mask_model, image, points, [list(region.point_labels)])
    return Region(mask=masks[0])


def score_regions(
    encoder: Encoder,
    image: Image.Image,
    regions: Sequence[Region],
    texts: Sequence[str],
    mask_model: MaskModel | None = None,
) -> list[list[TextScore]]:
    """For each region all texts, best first.

    Args:
        encoder, image, regions, mask_model: as in [`embed_regions`].
        texts: labels or descriptions of any length, which differ from each other.

    Raises:
        ValueError: as [`embed_regions`], or no texts.
    """
    embeds = torch.as_tensor(embed_regions(encoder, image, regions, mask_model))
    found = encoder.encode_texts(list(texts), show_progress_bar=False, convert_to_tensor=True)
    cosines = encoder.similarity(embeds, found)
    shares = _shares(encoder.model, cosines)
    order = cosines.argsort(dim=-1, descending=True, stable=True)
    return [
        [TextScore(texts[i], float(row[i]), float(own[i])) for i in best]
        for row, own, best in zip(cosines, shares, order.tolist(), strict=True)
    ]


@torch.no_grad()
def _shares(model: Any, cosines: torch.Tensor) -> torch.Tensor:
    """Cosines `(R, T)` as probabilities, by the scale and the bias that the model was trained with."""
    scale, bias = logit_scale_and_bias(model)
    logits = scale.float().cpu() * cosines
    return logits.softmax(dim=-1) if bias is None else (logits + bias.float().cpu()).sigmoid()


def find_text(encoder: Encoder, image: Image.Image, text: str) -> TextPlace:
    """Where a text is in an image.

    Args:
        encoder: the model.
        image: RGB.
        text: of any length.

    Raises:
        ValueError: an empty text.
    """
    if not text.strip():
        raise ValueError("No text is given: write what to look for.")
    values = similarity_map(encoder, image, text)
    if not encoder.grounds:
        return TextPlace(values, None, None)
    boxes, scores = encoder.find_scored_boxes(image, [text])
    return TextPlace(values, boxes[0].tolist(), float(scores[0]))


def search_text(collection: Any, text: str, top: int = 6) -> list[Found]:
    """The regions of a collection that are nearest to a text.

    Args:
        collection: a [`pixclip_hf.search.Collection`].
        text: what to look for.
        top: how many hits.

    Raises:
        ValueError: as [`Collection.search`].
        FileNotFoundError: the images of the collection are no longer where they were embedded from.
    """
    from ..search import Query

    return _search(collection, Query(text=text), top)


def search_region(
    collection: Any, image: Image.Image, region: Region, top: int = 6, mask_model: MaskModel | None = None
) -> list[Found]:
    """The regions of a collection that are nearest to a region of an image.

    Args:
        collection, top: as in [`search_text`].
        image, region: an image and a region of it.
        mask_model: makes a mask of the points of a region.

    Raises:
        ValueError, FileNotFoundError: as [`search_text`]; or points without a mask model.
    """
    from ..search import Query

    if region.kind == "point":
        if mask_model is None:
            raise ValueError("A search takes a box or a mask: draw one, or start with `--mask_model`.")
        region = mask_of_points(mask_model, image, region)
    return _search(collection, Query(image=image, box=region.box, mask=region.mask), top)


def _search(collection: Any, query: Any, top: int) -> list[Found]:
    (hits,) = collection.search(query, top=top)
    images = collection.open_images(hits)
    return [Found(hit.id, hit.cosine, hit.category, draw_hit(images[hit.image_id], hit.box)) for hit in hits]


def box_of(region: Region) -> list[float]:
    """A box around a region, xyxy in pixels; that of points is around them."""
    if region.box is not None:
        return list(region.box)
    if region.mask is not None:
        return [float(edge) for edge in mask_box(region.mask)]
    x, y = zip(*region.points, strict=True)
    return [min(x), min(y), max(x), max(y)]
