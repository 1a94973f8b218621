"""Pictures of what a model sees: regions with their best texts, the similarity of a text over an image, the matrix of
regions and texts, and sheets of retrieved images. Drawing needs matplotlib (`pip install pixclip-hf[eval]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .encoders.protocol import Encoder
from .images import open_image

# Of Okabe and Ito (2008) and Tol (2021), which people who confuse colors tell apart too; the ink of a number on each.
REGION_COLORS = (
    ("#d55e00", "white"), ("#0072b2", "white"), ("#e69f00", "black"), ("#009e73", "white"), ("#cc79a7", "black"),
    ("#56b4e9", "black"), ("#332288", "white"), ("#882255", "white"),
)  # fmt: skip
# What tells regions of one color apart.
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")
# Blue and vermilion, beside a mark each.
RIGHT, WRONG, UNKNOWN = "#0072b2", "#d55e00", "#888888"
# Of the legend: lines of a column before there is a second one, columns, letters of a line, inches of a column and of
# a line; and the most lines of one text.
LEGEND_LINES, LEGEND_COLUMNS, LEGEND_LETTERS, LEGEND_WIDTH, LINE_HEIGHT = 26, 6, 46, 3.7, 0.17
MOST_LINES = 9
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
    absent: float | None = None,
) -> None:
    """Writes a picture: the image with numbered regions, the best texts of each, and similarity maps.

    The picture grows with the number of regions and the length of their texts; a text of more than nine lines is cut.

    Args:
        path: path of the PNG file.
        image: RGB.
        boxes: xyxy in pixels.
        texts: for each region its best texts and their scores, best first.
        maps: for each text its [`similarity_map`]; all of them are drawn on one scale.
        masks: the masks of the regions `(H, W)`; outlined in place of the boxes.
        title: above the picture.
        truths: the right text of each region, where it is known: a best text is then marked ✓ or ✗, and a wrong one is
            followed by the right one.
        absent: the similarity below which a text counts as absent: a line in the maps and on their scale, and a word
            above a map that stays below it.

    Raises:
        ValueError: not one list of texts, mask or truth for each box.
    """
    for name, values in (("texts", texts), ("masks", masks), ("truths", truths)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"`{name}` must hold one entry per region, got {len(values)} for {len(boxes)} regions.")
    entries = [
        _legend_entry(number, best, None if truths is None else truths[number]) for number, best in enumerate(texts)
    ]
    lines = sum(len(entry) for entry in entries)
    columns = max(1, min(LEGEND_COLUMNS, -(-lines // LEGEND_LINES)))
    parts = _balanced(entries, columns)
    side = 3.4 if len(boxes) <= 8 else 3.4 + 0.1 * min(len(boxes) - 8, 52)
    tallest = max(sum(len(entry) for entry in part) for part in parts)
    height = max(side + 0.6, LINE_HEIGHT * tallest + 0.6, 4.2)
    widths = [side, *[LEGEND_WIDTH] * columns, *[3.4] * len(maps)]
    figure = _figure_class()(figsize=(sum(widths) + 0.8 * bool(maps), height), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    figure.suptitle(title, fontsize=11, **LITERAL)
    for axis in axes:
        axis.set_axis_off()
    _show_regions(axes[0], image, boxes, masks, side)
    axes[0].set_title("regions", fontsize=10)
    axes[0].set_anchor("N")
    for axis, part in zip(axes[1 : columns + 1], parts, strict=True):
        _write_legend(axis, part, LINE_HEIGHT / (height - 0.6))
    axes[1].set_title("best texts", fontsize=10)
    if maps:
        _show_maps(figure, list(axes[columns + 1 :]), image, maps, absent)
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
    told = []
    for i, (regions, given, right) in enumerate(zip(boxes, answers, truths, strict=True)):
        if not len(regions) == len(given) == len(right):
            raise ValueError(f"Image {i} has {len(regions)} regions, {len(given)} answers and {len(right)} truths.")
        told.append("\n".join(_answer(n, *pair) for n, pair in enumerate(zip(given, right, strict=True))))
    _draw_page(path, images, boxes, masks, told, title, columns)


def draw_labels(
    path: str | Path,
    images: Sequence[Image.Image],
    boxes: Sequence[Sequence[Sequence[float]]],
    texts: Sequence[Sequence[str]],
    masks: Sequence[Sequence[np.ndarray | None]] | None = None,
    title: str = "",
    columns: int = 3,
) -> None:
    """Writes a page of images with numbered regions, and below each what its annotations call them.

    Args:
        path: path of the PNG file.
        images: RGB.
        boxes: the boxes of the regions of each image, xyxy in pixels.
        texts: a text per region, for each image.
        masks: the masks of the regions `(H, W)`, outlined in place of the boxes; None for a region without one.
        title: above the page.
        columns: images side by side.

    Raises:
        ValueError: no image, or not one text per region.
    """
    if not images:
        raise ValueError("`images` must hold at least one image, got none.")
    told = []
    for i, (regions, given) in enumerate(zip(boxes, texts, strict=True)):
        if len(regions) != len(given):
            raise ValueError(f"Image {i} has {len(regions)} regions and {len(given)} texts.")
        told.append("\n".join(fill(f"{n}  {text}", 44, subsequent_indent="    ") for n, text in enumerate(given, 1)))
    _draw_page(path, images, boxes, masks, told, title, min(columns, len(images)))


def _draw_page(
    path: str | Path,
    images: Sequence[Image.Image],
    boxes: Sequence[Sequence[Sequence[float]]],
    masks: Sequence[Sequence[np.ndarray | None]] | None,
    told: Sequence[str],
    title: str,
    columns: int,
) -> None:
    """Images with numbered regions, and a text below each."""
    heights = []
    for start in range(0, len(images), columns):
        lines = max(text.count("\n") + 1 for text in told[start : start + columns])
        tallest = max(image.height / image.width for image in images[start : start + columns])
        heights += [min(2.6, 2.6 * tallest), LINE_HEIGHT * lines]
    figure = _figure_class()(figsize=(2.9 * columns, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11, **LITERAL)
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, image in enumerate(images):
        shown, below = (grid[2 * (i // columns) + part, i % columns] for part in (0, 1))
        _show_regions(shown, image, boxes[i], None if masks is None else masks[i], 2.5)
        below.text(0, 1, told[i], fontsize=8, va="top", transform=below.transAxes, **LITERAL)
    figure.savefig(path, dpi=110)


def _answer(number: int, answer: str, truth: str) -> str:
    """An answer and, where it is wrong, the truth, in lines of a column of a page."""
    wrapped = fill(f"{number + 1} {_mark(answer, truth)} {answer}", 44, subsequent_indent="      ")
    if answer == truth:
        return wrapped
    return wrapped + "\n" + fill(f"      is {truth}", 44, subsequent_indent="        ")


def _mark(answer: str, truth: str) -> str:
    return "✓" if answer == truth else "✗"


# A line of a legend: its text, whether it begins a region, and whether it is the region's best text.
Line = tuple[str, int | None, bool]


def _legend_entry(number: int, best: Sequence[tuple[str, float]], truth: str | None) -> list[Line]:
    """The lines of a region in the legend, an empty one behind them."""
    lines: list[Line] = []
    for rank, (text, score) in enumerate(best):
        mark = f"{_mark(text, truth)} " if rank == 0 and truth is not None else ""
        for i, line in enumerate(_wrapped(f"{mark}{score:.2f}  {text}", "")):
            lines.append((line, number if (rank, i) == (0, 0) else None, rank == 0))
    if truth is not None and best and best[0][0] != truth:
        lines += [(line, None, False) for line in _wrapped(f"is {truth}", "    ")]
    return [*(lines or [("", number, True)]), ("", None, False)]


def _wrapped(text: str, indent: str) -> list[str]:
    style: dict[str, Any] = {"max_lines": MOST_LINES, "placeholder": " …"}
    return wrap(text, LEGEND_LETTERS, initial_indent=indent, subsequent_indent="      ", **style)


def _balanced(entries: list[list[Line]], columns: int) -> list[list[list[Line]]]:
    """Entries in columns of about as many lines, in their order."""
    total = sum(len(entry) for entry in entries)
    parts: list[list[list[Line]]] = [[] for _ in range(columns)]
    passed = 0
    for entry in entries:
        middle = passed + len(entry) / 2
        parts[min(int(middle * columns / max(total, 1)), columns - 1)].append(entry)
        passed += len(entry)
    return parts


def _write_legend(axis: Any, entries: list[list[Line]], step: float) -> None:
    """Lines from the top of an axis down, `step` of its height apart, behind the numbers of their regions."""
    y = 1.0
    for text, number, is_best in (line for entry in entries for line in entry):
        place = {"va": "top", "fontsize": 8.5, "transform": axis.transAxes}
        if number is not None:
            axis.text(0.0, y, str(number + 1), **_label_style(number), **place)
        weight = "bold" if is_best else "normal"
        if text:
            axis.text(0.1, y, text, color="black" if is_best else "#444444", fontweight=weight, **place, **LITERAL)
        y -= step


def _label_style(number: int) -> dict[str, Any]:
    color, ink = REGION_COLORS[number % len(REGION_COLORS)]
    box = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
    return {"color": ink, "fontweight": "bold", "bbox": box}


def _show_regions(
    axis: Any,
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    masks: Sequence[np.ndarray | None] | None,
    side: float,
) -> None:
    """The image with its numbered regions; a number that would cover another one stands beside it. `side` is the width
    of the axis in inches."""
    from matplotlib.patches import Rectangle

    width, height = image.size
    axis.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    many = len(boxes) > 12
    line, size = (1.4, 7) if many else (2.2, 9)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        color, _ = REGION_COLORS[number % len(REGION_COLORS)]
        style = LINE_STYLES[number // len(REGION_COLORS) % len(LINE_STYLES)]
        if masks is None or masks[number] is None:
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=line, linestyle=style)
            frame.set_path_effects(_outlined("white", line + 1))
            axis.add_patch(frame)
        else:
            padded = np.pad(np.asarray(masks[number], dtype=float), 1)
            grid = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
            outline = axis.contour(*grid, padded, levels=[0.5], colors=[color], linewidths=line, linestyles=[style])
            outline.set_path_effects(_outlined("white", line + 1))
    # Of a letter, in pixels of the image: 72 points are an inch.
    letter = 0.62 * size / 72 * max(width, height) / side
    for number, (x, y) in enumerate(_label_places(boxes, letter, (width, height))):
        axis.text(x, y, str(number + 1), fontsize=size, va="top", **_label_style(number))


def _label_places(boxes: Sequence[Sequence[float]], letter: float, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Upper left corners of the numbers of regions: at that of the box, or as near to the right of it as no other
    number stands, on the next line where the image ends."""
    placed: list[tuple[float, float, float, float]] = []
    tall = 2.4 * letter
    for number, (x0, y0, _, _) in enumerate(boxes):
        wide = letter * (len(str(number + 1)) + 0.7)
        x, y = float(x0), float(y0)
        while blocking := [
            right
            for left, top, right, bottom in placed
            if x < right and left < x + wide and y < bottom and top < y + tall
        ]:
            x = max(blocking)
            if x + wide > size[0] and y + 2 * tall <= size[1]:
                x, y = float(x0) if x0 + wide <= size[0] else 0.0, y + tall
        placed.append((x, y, x + wide, y + tall))
    return [(x, y) for x, y, _, _ in placed]


def draw_heat_map(
    path: str | Path,
    image: Image.Image,
    text: str | Sequence[str],
    values: np.ndarray | Sequence[np.ndarray],
    absent: float | None = None,
) -> None:
    """Writes a picture: the image, and the similarity of one text or several laid over it, on one scale.

    Args:
        path: path of the PNG file.
        image: RGB.
        text: what was looked for, a text or a list of texts.
        values: its [`similarity_map`], or a list of them.
        absent: as in [`draw_regions`].

    Raises:
        ValueError: not one map per text.
    """
    texts = [text] if isinstance(text, str) else list(text)
    maps: list[Any] = [values] if isinstance(text, str) else list(values)
    if len(texts) != len(maps) or not texts:
        raise ValueError(f"`values` must hold one map per text, got {len(maps)} for {len(texts)} texts.")
    figure = _figure_class()(figsize=(4 + 4 * len(maps), 4.2), layout="constrained")
    plain, *mapped = figure.subplots(1, 1 + len(maps))
    width, height = image.size
    plain.set_axis_off()
    plain.imshow(image, extent=(0, width, height, 0))
    _show_maps(figure, mapped, image, dict(zip(texts, maps, strict=True)), absent)
    figure.savefig(path, dpi=110)


def _show_maps(
    figure: Any, axes: Sequence[Any], image: Image.Image, maps: Mapping[str, np.ndarray], absent: float | None
) -> None:
    """Similarity maps over an image in gray, on one scale, which is shown once."""
    width, height = image.size
    low, high = (float(edge([edge(values) for values in maps.values()])) for edge in (np.min, np.max))
    if absent is not None:
        low, high = min(low, absent), max(high, absent)
    for axis, (text, values) in zip(axes, maps.items(), strict=True):
        axis.set_axis_off()
        extent = (0, width, height, 0)
        axis.imshow(image.convert("L"), extent=extent, cmap="gray", alpha=0.55)
        style: dict[str, Any] = {"cmap": "inferno", "alpha": 0.75, "interpolation": "bilinear"}
        drawn = axis.imshow(values, extent=extent, vmin=low, vmax=high, **style)
        below = absent is not None and float(np.max(values)) < absent
        axis.set_title(fill(f"“{text}”" + " (absent)" * below, 34), fontsize=9, **LITERAL)
        if absent is not None and not below and float(np.min(values)) < absent:
            x = (np.arange(values.shape[1]) + 0.5) * width / values.shape[1]
            y = (np.arange(values.shape[0]) + 0.5) * height / values.shape[0]
            border = axis.contour(
                x, y, values, levels=[absent], colors=["white"], linewidths=1.2, linestyles=["dashed"]
            )
            border.set_path_effects(_outlined("black", 2.2))
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.7)
    if absent is not None:
        line = bar.ax.axhline(absent, color="white", linewidth=1.6, linestyle="dashed", clip_on=False)
        line.set_path_effects(_outlined("black", 2.8))
        bar.set_label(f"absent below {absent:.2f}", fontsize=8)


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
        right: for each region the index of its own text, framed as right; a wrong text ahead of it is framed as wrong.
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
    for row, own in enumerate([] if right is None else right):
        for column, frame in {int(scores[row].argmax()): WRONG, own: RIGHT}.items():
            # Inside of its cell, so that frames of neighbors stand side by side.
            place = (column - 0.47, row - 0.47)
            axis.add_patch(Rectangle(place, 0.94, 0.94, fill=False, edgecolor=frame, linewidth=2.4))
    axis.set_title(title, fontsize=10, **LITERAL)
    figure.savefig(path, dpi=110)


def draw_retrieval(
    path: str | Path,
    queries: Sequence[str],
    found: Sequence[Sequence[tuple[Image.Image, float, bool | None]]],
    title: str = "",
) -> None:
    """Writes a sheet of retrieved images: one row per text, best first, right ones framed in blue and marked ✓, wrong
    ones in vermilion and marked ✗.

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
            mark = {True: "✓ ", False: "✗ ", None: ""}[is_right]
            axis.set_title(f"{mark}{score:.2f}", fontsize=8)
            for spine in axis.spines.values():
                spine.set(edgecolor={True: RIGHT, False: WRONG, None: UNKNOWN}[is_right], linewidth=3)
    figure.savefig(path, dpi=110)


def draw_hit(image: Image.Image, box: Sequence[float] | None, context: float = 0.5) -> Image.Image:
    """What is around a box, on either side by `context` of its longer side, with the box drawn in; the whole image
    without a box."""
    if box is None:
        return image.resize([max(1, round(side * 256 / max(image.size))) for side in image.size])
    x0, y0, x1, y1 = box
    margin = context * max(x1 - x0, y1 - y0)
    left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
    crop = image.crop((left, top, min(image.width, int(x1 + margin)), min(image.height, int(y1 + margin))))
    scale = 256 / max(crop.size)
    crop = crop.resize([max(1, round(side * scale)) for side in crop.size])
    corners = [(side - start) * scale for side, start in zip(box, (left, top, left, top), strict=True)]
    ImageDraw.Draw(crop).rectangle(corners, outline="white", width=4)
    ImageDraw.Draw(crop).rectangle(corners, outline="black", width=2)
    return crop


def _outlined(color: str, width: float) -> list[Any]:
    """Path effects that draw a line over a wider one, so that it shows on any ground."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=width, foreground=color, alpha=0.7), Normal()]


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install pixclip-hf[eval]`.") from error
    return Figure
