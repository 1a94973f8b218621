"""Pictures of what a model sees: regions with their best texts, the similarity of a text over an image, the matrix of
regions and texts, and sheets of retrieved images. Drawing needs matplotlib (`pip install pixclip-hf[eval]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from .encoders.protocol import Encoder
from .images import open_image

REGION_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
LITERAL = {"parse_math": False}  # a text may hold dollar signs


def similarity_map(encoder: Encoder, image: Any, text: str, grid: int = 24, side: float = 0.25) -> np.ndarray:
    """Cosine similarity of a text to a square window around each point of a grid.

    Args:
        encoder: a [`RegionEncoder`], whose model embeds all windows from one image pass (PixCLIP pools them), or any
            other [`Encoder`].
        image: in any form of `open_image`.
        text: what to look for.
        grid: points per side.
        side: the side of the window, as a share of the image's sides; windows are cut at the image's border.

    Returns:
        `(grid, grid)` float32 array, row by row from the top.
    """
    image = open_image(image)
    steps = (np.arange(grid) + 0.5) / grid
    x, y = (axis.ravel() for axis in np.meshgrid(steps, steps))
    boxes = np.clip(np.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], -1), 0, 1)
    windows = encoder.encode_regions(
        image,
        boxes=boxes * np.array([*image.size, *image.size]),
        show_progress_bar=False,
        convert_to_tensor=True,
        mode="pooled" if "pooled" in encoder.modes else None,
    )
    target = encoder.encode_texts(text, show_progress_bar=False, convert_to_tensor=True)
    return (windows @ target).reshape(grid, grid).numpy()


def draw_regions(
    path: str | Path,
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[Sequence[tuple[str, float]]],
    maps: Mapping[str, np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
    title: str = "",
    truths: Sequence[str] | None = None,
) -> None:
    """Writes a picture: the image with numbered regions, the best texts of each, and similarity maps.

    Args:
        path: path of the PNG file.
        image: RGB.
        boxes: xyxy in pixels.
        texts: for each region its best texts and their scores, best first.
        maps: for each text its [`similarity_map`].
        masks: the masks of the regions `(H, W)`; outlined in place of the boxes.
        title: above the picture.
        truths: the right text of each region, where it is known: a best text is then marked ✓ or ✗, and a wrong one is
            followed by the right one.
    """
    figure_class = _figure_class()
    columns = 2 + len(maps)
    figure = figure_class(figsize=(3.6 * columns, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, width_ratios=[1, 1.15] + [1] * len(maps))
    figure.suptitle(title, fontsize=11, **LITERAL)
    width, height = image.size
    for axis in axes:
        axis.set_axis_off()

    _show_regions(axes[0], image, boxes, masks)
    axes[0].set_title("regions", fontsize=10)

    axes[1].set_title("best texts", fontsize=10)
    y = 0.98
    for number, best in enumerate(texts):
        color = REGION_COLORS[number % len(REGION_COLORS)]
        for rank, (text, score) in enumerate(best):
            line = fill(f"{score:.2f}  {text}", 44, subsequent_indent="        ")
            mark = "" if truths is None else f"{_mark(text, truths[number])} "
            head = f"{number + 1}  {mark}" if rank == 0 else "    "
            style = {"fontweight": "bold", "color": color} if rank == 0 else {"color": "#444444"}
            axes[1].text(0, y, head + line, fontsize=8.5, va="top", transform=axes[1].transAxes, **style, **LITERAL)
            y -= 0.055 * (1 + line.count("\n"))
        if truths is not None and best[0][0] != truths[number]:
            line = fill(f"is {truths[number]}", 44, subsequent_indent="        ")
            axes[1].text(0, y, f"    {line}", fontsize=8.5, va="top", transform=axes[1].transAxes, **LITERAL)
            y -= 0.055 * (1 + line.count("\n"))
        y -= 0.02

    for axis, (text, values) in zip(axes[2:], maps.items(), strict=True):
        axis.imshow(image.convert("L"), extent=(0, width, height, 0), cmap="gray", alpha=0.55)
        drawn = axis.imshow(values, extent=(0, width, height, 0), cmap="inferno", alpha=0.75, interpolation="bilinear")
        axis.set_title(fill(f"“{text}”", 34), fontsize=9, **LITERAL)
        figure.colorbar(drawn, ax=axis, shrink=0.7)
    figure.savefig(path, dpi=110)


def draw_answers(
    path: str | Path,
    images: Sequence[Image.Image],
    boxes: Sequence[Sequence[Sequence[float]]],
    answers: Sequence[Sequence[str]],
    truths: Sequence[Sequence[str]],
    masks: Sequence[Sequence[np.ndarray]] | None = None,
    title: str = "",
    columns: int = 4,
) -> None:
    """Writes a page of images with numbered regions, and below each what was answered: ✓ or ✗, and the right text
    where the answer is wrong.

    Args:
        path: path of the PNG file.
        images: RGB.
        boxes: the boxes of the regions of each image, xyxy in pixels.
        answers, truths: a text per region, for each image.
        masks: the masks of the regions `(H, W)`; outlined in place of the boxes.
        title: above the page.
        columns: images side by side.

    Raises:
        ValueError: no image, or not one answer and one truth per region.
    """
    if not images:
        raise ValueError("`images` must hold at least one image, got none.")
    for i, (regions, given, right) in enumerate(zip(boxes, answers, truths, strict=True)):
        if not len(regions) == len(given) == len(right):
            raise ValueError(f"Image {i} has {len(regions)} regions, {len(given)} answers and {len(right)} truths.")
    rows = -(-len(images) // columns)
    lines = max(sum(1 + (a != t) for a, t in zip(*pair, strict=True)) for pair in zip(answers, truths, strict=True))
    figure = _figure_class()(figsize=(2.9 * columns, rows * (2.6 + 0.17 * lines)), layout="constrained")
    figure.suptitle(title, fontsize=11, **LITERAL)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.6, 0.17 * lines] * rows)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, image in enumerate(images):
        shown, told = (grid[2 * (i // columns) + part, i % columns] for part in (0, 1))
        _show_regions(shown, image, boxes[i], None if masks is None else masks[i])
        text = []
        for number, (answer, truth) in enumerate(zip(answers[i], truths[i], strict=True)):
            text.append(f"{number + 1} {_mark(answer, truth)} {answer}")
            if answer != truth:
                text.append(f"      is {truth}")
        told.text(0, 1, "\n".join(text), fontsize=8, va="top", transform=told.transAxes, **LITERAL)
    figure.savefig(path, dpi=110)


def _mark(answer: str, truth: str) -> str:
    return "✓" if answer == truth else "✗"


def _show_regions(
    axis: Any, image: Image.Image, boxes: Sequence[Sequence[float]], masks: Sequence[np.ndarray] | None
) -> None:
    """The image with its numbered regions; numbers of regions that begin in one place stand side by side."""
    from matplotlib.patches import Rectangle

    width, height = image.size
    axis.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    corners: list[tuple[float, float]] = []
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        color = REGION_COLORS[number % len(REGION_COLORS)]
        if masks is None:
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=2.2))
        else:
            padded = np.pad(np.asarray(masks[number], dtype=float), 1)
            grid = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
            axis.contour(*grid, padded, levels=[0.5], colors=[color], linewidths=2.2)
        shift = 0.07 * width * corners.count((x0, y0))
        corners.append((x0, y0))
        label = {"color": "white", "fontsize": 9, "fontweight": "bold", "va": "top"}
        box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
        axis.text(x0 + shift, y0, str(number + 1), bbox=box, **label)


def draw_heat_map(path: str | Path, image: Image.Image, text: str, values: np.ndarray) -> None:
    """Writes a picture: the image, and the similarity of a text laid over it.

    Args:
        path: path of the PNG file.
        image: RGB.
        text: what was looked for.
        values: its [`similarity_map`].
    """
    figure = _figure_class()(figsize=(8, 4.2), layout="constrained")
    plain, mapped = figure.subplots(1, 2)
    width, height = image.size
    for axis in (plain, mapped):
        axis.set_axis_off()
        axis.imshow(image if axis is plain else image.convert("L"), extent=(0, width, height, 0), cmap="gray")
    drawn = mapped.imshow(values, extent=(0, width, height, 0), cmap="inferno", alpha=0.7, interpolation="bilinear")
    figure.colorbar(drawn, ax=mapped, shrink=0.8)
    figure.suptitle(fill(f"“{text}”", 90), fontsize=10, **LITERAL)
    figure.savefig(path, dpi=110)


def draw_matrix(
    path: str | Path,
    scores: np.ndarray,
    regions: Sequence[str],
    texts: Sequence[str],
    right: Sequence[int] | None = None,
    title: str = "",
) -> None:
    """Writes the matrix of regions and texts with its numbers.

    Args:
        path: path of the PNG file.
        scores: `(R, T)`, such as cosine similarities.
        regions, texts: names of rows and columns.
        right: for each region the index of its own text, framed.
        title: above the matrix.

    Raises:
        ValueError: names that are not as many as rows and columns.
    """
    scores = np.asarray(scores)
    if scores.shape != (len(regions), len(texts)):
        raise ValueError(f"`scores` must have shape ({len(regions)}, {len(texts)}), got {scores.shape}.")
    figure_class = _figure_class()
    from matplotlib.patches import Rectangle

    figure = figure_class(figsize=(3 + 0.9 * len(texts), 2.2 + 0.5 * len(regions)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(scores, cmap="viridis", aspect="auto")
    figure.colorbar(drawn, ax=axis)
    axis.set_yticks(range(len(regions)), [fill(name, 30) for name in regions], fontsize=8, **LITERAL)
    wrapped = [fill(name, 26) for name in texts]
    axis.set_xticks(range(len(texts)), wrapped, fontsize=8, rotation=45, ha="right", **LITERAL)
    # White on dark and black on light, as the color map goes.
    middle = (scores.min() + scores.max()) / 2
    for row, column in np.ndindex(*scores.shape):
        color = "black" if scores[row, column] > middle else "white"
        axis.text(column, row, f"{scores[row, column]:.2f}", ha="center", va="center", fontsize=7, color=color)
    for row, column in enumerate([] if right is None else right):
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#e6194b", linewidth=2.2))
    axis.set_title(title, fontsize=10, **LITERAL)
    figure.savefig(path, dpi=110)


def draw_retrieval(
    path: str | Path,
    queries: Sequence[str],
    found: Sequence[Sequence[tuple[Image.Image, float, bool | None]]],
    title: str = "",
) -> None:
    """Writes a sheet of retrieved images: one row per text, best first, right ones framed in green, wrong ones in red.

    Args:
        path: path of the PNG file.
        queries: the texts.
        found: for each its images with their scores and whether they are right (None, framed in gray: not known).
        title: above the sheet.

    Raises:
        ValueError: no query, or not one row of images per query.
    """
    if not queries or len(queries) != len(found):
        raise ValueError(f"`found` must hold one row per query, got {len(found)} for {len(queries)} queries.")
    columns = 1 + max(len(row) for row in found)
    figure = _figure_class()(figsize=(2.4 + 1.6 * columns, 0.6 + 1.9 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns, squeeze=False, width_ratios=[1.6] + [1] * (columns - 1))
    figure.suptitle(title, fontsize=11, **LITERAL)
    for axes, query, images in zip(grid, queries, found, strict=True):
        for axis in axes[len(images) + 1 :]:
            axis.set_axis_off()
        axes[0].set_axis_off()
        axes[0].text(0, 0.5, fill(query, 32), fontsize=8.5, va="center", transform=axes[0].transAxes, **LITERAL)
        for axis, (image, score, is_right) in zip(axes[1:], images, strict=False):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{score:.2f}", fontsize=8)
            for spine in axis.spines.values():
                spine.set(edgecolor={True: "#3cb44b", False: "#e6194b", None: "#888888"}[is_right], linewidth=3)
    figure.savefig(path, dpi=110)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install pixclip-hf[eval]`.") from error
    return Figure
