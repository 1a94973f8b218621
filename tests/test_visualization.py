"""Similarity maps and the pictures: regions with texts, heat maps, matrices and retrieval sheets."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pixclip_hf
from pixclip_hf.processing.processing_regions import decode_rle
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.visualization import (
    REGION_COLORS,
    RIGHT,
    WRONG,
    draw_answers,
    draw_heat_map,
    draw_labels,
    draw_matrix,
    draw_regions,
    draw_retrieval,
    similarity_map,
)


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_similarity_map(family, request):
    model, processor = request.getfixturevalue(f"tiny_{family}")
    image = make_scene(0)["image"].crop((0, 0, 64, 48))
    values = similarity_map(pixclip_hf.RegionEncoder(model, processor), image, "a red disc", grid=4, side=0.5)
    assert values.shape == (4, 4) and values.dtype == np.float32
    assert np.abs(values).max() <= 1 + 1e-6 and values.std() > 0
    # Row 1, column 2: the window around (0.625, 0.375); row 0, column 0 is cut at the border.
    boxes = [[0.375 * 64, 0.125 * 48, 0.875 * 64, 0.625 * 48], [0, 0, 0.375 * 64, 0.375 * 48]]
    inputs = processor(images=image, boxes=boxes, text="a red disc")
    mode = {} if family == "cloc" else {"mode": "pooled"}
    with torch.no_grad():
        output = model(**inputs, **mode)
    cosines = (output.region_embeds[0] @ output.text_embeds[0]).numpy()
    assert values[[1, 0], [2, 0]] == pytest.approx(cosines, abs=1e-5)


@pytest.mark.parametrize("masked", (False, True))
def test_draw_regions(masked, tmp_path):
    scene = make_scene(3)
    regions = scene["regions"]
    draw_regions(
        tmp_path / "regions.png",
        scene["image"],
        [region["box"] for region in regions],
        [[("costs $5 or $6_{", 0.9), ("a long text " * 20, 0.1)] for _ in regions],
        {"from $5_{ to $6": np.zeros((4, 4), dtype=np.float32), "b": np.eye(4, dtype=np.float32)},
        masks=[decode_rle(region["mask"]) for region in regions] if masked else None,
        title="scene $3 $_{",
    )
    picture = Image.open(tmp_path / "regions.png")
    picture.load()
    assert picture.format == "PNG" and picture.width > 3 * picture.height
    # The regions' own colors are in the picture: outlines and numbers.
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == rgb(REGION_COLORS[0][0])).all(-1).sum() > 50


def test_right_and_wrong_answers_are_marked(tmp_path, monkeypatch):
    """What is written on the page: a mark per region, and the right text behind a wrong one."""
    from matplotlib.axes import Axes

    written = []
    original = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **k: written.append((x, s)) or original(self, x, y, s, **k)
    )
    scenes = [make_scene(i, "test") for i in range(5)]
    boxes = [[region["box"] for region in scene["regions"]] for scene in scenes]
    truths = [[region["caption"] for region in scene["regions"]] for scene in scenes]
    answers = [list(row) for row in truths]
    answers[3][0] = "a dotted $_{ thing"
    images = [scene["image"] for scene in scenes]
    draw_answers(tmp_path / "page.png", images, boxes, answers, truths, columns=3, title="five scenes")
    page = Image.open(tmp_path / "page.png")
    assert page.width > 600 and page.height > 600
    texts = "\n".join(s for _, s in written)
    regions = sum(map(len, boxes))
    assert texts.count("✓") == regions - 1 and texts.count("✗") == 1
    assert f"1 ✗ a dotted $_{{ thing\n      is {truths[3][0]}" in texts

    written.clear()
    best = [[(answer, 0.5), ("another", 0.1)] for answer in answers[3]]
    draw_regions(tmp_path / "one.png", images[3], boxes[3], best, {}, truths=truths[3])
    lines = [s for _, s in written]
    assert sum("✗" in line for line in lines) == 1 and sum("✓" in line for line in lines) == len(boxes[3]) - 1
    assert f"    is {truths[3][0]}" in lines


def test_numbers_of_regions_in_one_place_stand_side_by_side(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    places = {}
    original = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **k: places.update({s: (x, y)}) or original(self, x, y, s, **k)
    )
    box = [10.0, 12.0, 30.0, 40.0]
    draw_answers(tmp_path / "same.png", [make_scene(0)["image"]], [[box, box]], [["a", "b"]], [["a", "b"]])
    assert places["1"] != places["2"] and places["1"][1] == places["2"][1]


def test_answers_that_do_not_fit_their_regions(tmp_path):
    image = make_scene(0)["image"]
    with pytest.raises(ValueError, match="Image 0 has 1 regions, 2 answers and 1 truths"):
        draw_answers(tmp_path / "x.png", [image], [[[0, 0, 9, 9]]], [["a", "b"]], [["a"]])
    with pytest.raises(ValueError, match="`images` must hold at least one image"):
        draw_answers(tmp_path / "x.png", [], [], [], [])


def test_draw_one_region_without_maps(tmp_path):
    full = np.ones((32, 32), dtype=bool)
    image = make_scene(0, size=32)["image"]
    draw_regions(tmp_path / "one.png", image, [[0, 0, 32, 32]], [[("all", 1.0)]], {}, masks=[full])
    assert Image.open(tmp_path / "one.png").size[0] > 0


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def written(monkeypatch):
    """What is written into pictures from now on: (x, y, text)."""
    from matplotlib.axes import Axes

    texts = []
    original = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **k: texts.append((x, y, s)) or original(self, x, y, s, **k)
    )
    return texts


def test_sixty_regions_with_long_texts_stay_apart(tmp_path, monkeypatch):
    texts = written(monkeypatch)
    image = Image.new("RGB", (640, 480), (200, 200, 200))
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.7, (60, 2)) * [640, 480]
    boxes = np.concatenate([corners, corners + rng.uniform(30, 150, (60, 2))], axis=1)
    boxes[10:14] = boxes[10]  # equal boxes
    boxes[20] = boxes[21] + 1  # all but equal ones
    best = [[("a long text about a thing " * (1 + i % 9), 0.5), ("another", 0.25)] for i in range(60)]
    draw_regions(tmp_path / "many.png", image, boxes, best, {}, title="sixty")
    picture = Image.open(tmp_path / "many.png")
    assert picture.width < 4000 and picture.height < 2500
    numbers = texts[:60]
    assert [s for _, _, s in numbers] == [str(i + 1) for i in range(60)]
    # No number covers another one: each is about 14 pixels high and 8 wide in a letter.
    for i, (x, y, s) in enumerate(numbers):
        for other_x, other_y, other in numbers[:i]:
            assert abs(y - other_y) > 8 or x >= other_x + 5 * len(other) or other_x >= x + 5 * len(s)
    x, y, _ = numbers[10]
    assert all(numbers[i][1] == y or numbers[i][0] >= 0 for i in range(11, 14))
    # Every text is in the legend, and its lines are apart.
    assert sum(s == str(i + 1) for i in range(60) for _, _, s in texts[60:]) == 60
    places = [(x, y) for x, y, s in texts[60:] if s.startswith("0.")]
    assert len(places) == 120


def test_maps_share_a_scale_that_shows_what_is_absent(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    scales, titles, lines = [], [], []
    show, title = Axes.imshow, Axes.set_title
    monkeypatch.setattr(
        Axes, "imshow", lambda self, *a, **k: scales.append((k.get("vmin"), k.get("vmax"))) or show(self, *a, **k)
    )
    monkeypatch.setattr(Axes, "set_title", lambda self, s, **k: titles.append(s) or title(self, s, **k))
    line = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: lines.append(y) or line(self, y, **k))
    image = make_scene(0)["image"]
    low, high = np.full((4, 4), 0.1) + 0.1 * np.eye(4), np.eye(4) * 0.7
    draw_heat_map(tmp_path / "two.png", image, ["a", "b"], [low, high], absent=0.3)
    assert [scale for scale in scales if scale[0] is not None] == [(0.0, 0.7)] * 2
    assert titles == ["“a” (absent)", "“b”"] and lines == [0.3]
    scales.clear()
    draw_regions(tmp_path / "regions.png", image, [], [], {"a": low, "b": high})
    assert [scale for scale in scales if scale[0] is not None] == [(0.0, 0.7)] * 2 and len(lines) == 1
    with pytest.raises(ValueError, match="`values` must hold one map per text, got 1 for 2 texts"):
        draw_heat_map(tmp_path / "no.png", image, ["a", "b"], [low])


def test_lists_of_other_lengths(tmp_path):
    with pytest.raises(ValueError, match="`truths` must hold one entry per region, got 2 for 1 regions"):
        draw_regions(tmp_path / "x.png", make_scene(0)["image"], [[0, 0, 9, 9]], [[("a", 1.0)]], {}, truths=["a", "b"])


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).reshape(-1, 3)


def count(path, color):
    return (pixels(path) == color).all(-1).sum()


def test_draw_heat_map(tmp_path):
    image = Image.new("RGB", (64, 48), (10, 200, 30))
    draw_heat_map(tmp_path / "cold.png", image, "for $5_{ or more", np.zeros((4, 4), dtype=np.float32))
    draw_heat_map(tmp_path / "warm.png", image, "for $5_{ or more", np.eye(4, dtype=np.float32))
    # The image stands beside the map in its own color; the map follows the values.
    assert count(tmp_path / "cold.png", (10, 200, 30)) > 10000
    assert not np.array_equal(pixels(tmp_path / "cold.png"), pixels(tmp_path / "warm.png"))


def test_draw_labels(tmp_path):
    """A page of annotations: a mask where there is one, else the box; nothing is marked as right or wrong."""
    scenes = [make_scene(i) for i in range(2)]
    boxes = [[region["box"] for region in scene["regions"]] for scene in scenes]
    texts = [[region["caption"] for region in scene["regions"]] for scene in scenes]
    masks = [[decode_rle(region["mask"]) for region in scenes[0]["regions"]], [None] * len(boxes[1])]
    images = [scene["image"] for scene in scenes]
    draw_labels(tmp_path / "boxes.png", images, boxes, texts)
    draw_labels(tmp_path / "masks.png", images, boxes, texts, masks)
    assert (tmp_path / "boxes.png").read_bytes() != (tmp_path / "masks.png").read_bytes()
    assert count(tmp_path / "masks.png", rgb(REGION_COLORS[0][0])) > 50
    with pytest.raises(ValueError, match=r"Image 1 has \d regions and 1 texts"):
        draw_labels(tmp_path / "no.png", images, boxes, [texts[0], ["one"]])
    with pytest.raises(ValueError, match="`images` must hold at least one image"):
        draw_labels(tmp_path / "no.png", [], [], [])


def test_draw_matrix(tmp_path):
    scores = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.1]])
    names = ["first $_{", "second"], ["a", "a long text " * 10, "c"]
    draw_matrix(tmp_path / "plain.png", scores, *names)
    draw_matrix(tmp_path / "right.png", scores, *names, right=[0, 1], title="$5")
    draw_matrix(tmp_path / "wrong.png", scores, *names, right=[0, 2], title="$5")
    framed = {
        name: [count(tmp_path / f"{name}.png", rgb(color)) > 50 for color in (RIGHT, WRONG)]
        for name in ("plain", "right", "wrong")
    }
    # What is right is framed, and what is wrong and ahead of it.
    assert framed == {"plain": [False, False], "right": [True, False], "wrong": [True, True]}
    with pytest.raises(ValueError, match=r"`scores` must have shape \(2, 3\), got \(3, 2\)"):
        draw_matrix(tmp_path / "no.png", scores.T, *names)


def test_draw_retrieval(tmp_path):
    blue = Image.new("RGB", (40, 30), (0, 0, 200))
    rows = [[(blue, 0.9, True), (blue, 0.2, False)], [(blue, 0.5, False)]]
    draw_retrieval(tmp_path / "sheet.png", ["costs $5", "a long query " * 9], rows, title="sheet")
    right, wrong = (count(tmp_path / "sheet.png", color) for color in (rgb(RIGHT), rgb(WRONG)))
    assert right > 50 and wrong == pytest.approx(2 * right, rel=0.2)
    assert count(tmp_path / "sheet.png", (0, 0, 200)) > 1000
    with pytest.raises(ValueError, match="`found` must hold one row per query, got 2 for 1 queries"):
        draw_retrieval(tmp_path / "no.png", ["one"], rows)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Pictures need matplotlib: `pip install pixclip-hf\[eval\]`"):
        draw_matrix(tmp_path / "no.png", np.zeros((1, 1)), ["a"], ["b"])
