import colorsys
import hashlib
import json
import re

import numpy as np
import pytest

from pixclip_hf.record import record_features, validate_record
from pixclip_hf.scenes.dataset import (
    COLORS,
    SHAPES,
    TEXTURES,
    all_descriptions,
    describe,
    late_detail_pairs,
    make_scene,
    same_box_pairs,
    scene_texts,
    scenes_dataset,
)
from pixclip_hf.scenes.layout import DrawStream, same_box_shapes, silhouette

SCENES = 300
HUES = {"red": 357, "orange": 31, "yellow": 53, "green": 130, "cyan": 183, "blue": 230, "purple": 279, "pink": 328}


def plain_decode(rle):
    """COCO's compressed run lengths, one character at a time."""
    runs, position, text = [], 0, rle["counts"]
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[position]) - 48
            value |= (code & 31) << shift
            shift += 5
            position += 1
            more = bool(code & 32)
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    flat = [bit for i, run in enumerate(runs) for bit in [i % 2] * run]
    return np.array(flat, dtype=bool).reshape(rle["size"][::-1]).T


def content(record):
    rest = {name: value for name, value in record.items() if name != "image"}
    return record["image"].tobytes() + json.dumps(rest, sort_keys=True).encode()


def words(text):
    return text.replace(".", "").replace(",", "").lower().split()


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index) for index in range(SCENES)]


@pytest.fixture(scope="module")
def masks(scenes):
    return [[plain_decode(region["mask"]) for region in record["regions"]] for record in scenes]


def test_every_combination_has_its_own_description():
    descriptions = all_descriptions()
    assert len(descriptions) == len(set(descriptions)) == 256 == len(SHAPES) * len(COLORS) * len(TEXTURES)
    assert describe("star", "red", "striped") == "a striped red star"
    with pytest.raises(ValueError, match="`color` must be one of .*'beige'"):
        describe("star", "beige", "striped")


def test_records_keep_to_the_schema(scenes):
    for record in scenes:
        validate_record(record)
        assert record["image"].mode == "RGB" and record["image"].size == (64, 64)
        assert 3 <= len(record["regions"]) <= 5
        for region in record["regions"]:
            assert region["caption"] in all_descriptions()
            assert region["category"] == region["caption"].split()[-1]


@pytest.mark.parametrize("size", [32, 33, 100, 224])
@pytest.mark.parametrize("setting", ["default", "hard"])
def test_any_size_and_setting(size, setting):
    for index in range(25):
        record = make_scene(index, "test", seed=3, size=size, setting=setting)
        validate_record(record)
        assert (record["width"], record["height"]) == (size, size) == record["image"].size


def test_sides_keep_to_their_setting(scenes):
    def longer_sides(records):
        boxes = np.array([region["box"] for record in records for region in record["regions"]])
        return np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / 64

    default, hard = longer_sides(scenes), longer_sides([make_scene(i, setting="hard") for i in range(SCENES)])
    assert 0.2 <= default.min() < 0.22 and 0.42 < default.max() <= 0.45
    assert 0.08 <= hard.min() < 0.11 and 0.42 < hard.max() <= 0.45
    assert (hard < 0.2).mean() > 0.2


def test_same_arguments_give_the_same_record():
    for arguments in [(0, "train", 0), (7, "test", 2**70), (2**48 - 1, "validation", 5)]:
        assert content(make_scene(*arguments)) == content(make_scene(*arguments))
    assert content(make_scene(3)) != content(make_scene(4))


def test_records_are_the_published_ones():
    """The dataset is its code: whoever changes a pixel or a word of it must say so here."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for setting in ("default", "hard"):
            for index in range(5):
                digest.update(content(make_scene(index, split, seed=1, setting=setting)))
    assert digest.hexdigest() == "aa9df2f617ec0c56f0f0b57061484774ec7c90fd598d5c92b97bb74488b9eca5"


def test_streams_never_meet():
    numbers = [0, 1, 2, 3, 2**16, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40]
    seeds = [*numbers, 2**64, 2**64 + 1, 2**96, 10**40]
    streams = {
        DrawStream(split, seed, index).below(2**60)
        for split in ("train", "validation", "test")
        for seed in seeds
        for index in numbers
    }
    assert len(streams) == 3 * len(seeds) * len(numbers)


def test_images_of_the_splits_are_all_different():
    images = {
        make_scene(index, split, seed)["image"].tobytes()
        for split in ("train", "validation", "test")
        for seed in (0, 1, 2**32)
        for index in range(30)
    }
    assert len(images) == 3 * 3 * 30


def test_draws_are_even():
    draws = DrawStream("train", 0, 0)
    counts = np.bincount([draws.below(8) for _ in range(8000)], minlength=8)
    assert counts.min() > 880 and counts.max() < 1120
    orders = [tuple(draws.shuffled("abc")) for _ in range(1200)]
    assert {orders.count(order) > 150 for order in set(orders)} == {True} and len(set(orders)) == 6


def test_all_combinations_are_drawn_evenly(scenes):
    for names in (SHAPES, COLORS, TEXTURES):
        found = [name for record in scenes for region in record["regions"] for name in names
                 if name in region["caption"].split()]  # fmt: skip
        shares = [found.count(name) / len(found) * len(names) for name in names]
        assert min(shares) > 0.6 and max(shares) < 1.6, dict(zip(names, shares, strict=True))


def test_masks_are_disjoint_and_boxes_are_tight(scenes, masks):
    for record, pixels in zip(scenes, masks, strict=True):
        assert np.sum(pixels, axis=0).max() == 1
        for region, mask in zip(record["regions"], pixels, strict=True):
            rows, columns = np.where(mask)
            assert region["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_masks_lie_where_the_colors_and_textures_are(scenes, masks):
    """Color, texture and mask are read back from the pixels: hue, and where the dark tone is."""
    for record, pixels in zip(scenes, masks, strict=True):
        image = np.asarray(record["image"]).astype(float) / 255
        brightest, darkest = image.max(axis=2), image.min(axis=2)
        saturation = (brightest - darkest) / np.maximum(brightest, 1e-9)
        for region, mask in zip(record["regions"], pixels, strict=True):
            _, texture, color, _ = region["caption"].split()
            dark = mask & (brightest < 0.68 * np.quantile(brightest[mask], 0.95))
            ink = mask & ~dark
            assert saturation[ink].min() > 0.3
            hue = colorsys.rgb_to_hsv(*np.median(image[ink], axis=0))[0] * 360
            assert abs((hue - HUES[color] + 180) % 360 - 180) < 9, (color, hue)
            darks = dark.sum() / mask.sum()
            if texture == "plain":
                assert darks == 0
                continue
            assert 0.08 < darks < 0.8
            whole_rows = [dark[y][mask[y]].mean() in (0, 1) for y in range(64) if mask[y].sum() > 3]
            assert all(whole_rows) == (texture == "striped"), region["caption"]
            # Dots are single cells of a grid: no two dark cells touch at a corner, as those of chequers do.
            corners = dark[:-2, :-2] & dark[2:, 2:] & ~dark[:-2, 2:] & ~dark[2:, :-2]
            assert (corners.sum() > 0) == (texture == "chequered") or texture == "striped", region["caption"]


def test_background_is_muted_and_not_constant(scenes, masks):
    for record, pixels in zip(scenes, masks, strict=True):
        image = np.asarray(record["image"]).astype(int)[~np.any(pixels, axis=0)]
        assert np.ptp(image, axis=1).max() < 40
        assert image.std(axis=0).min() > 3


def test_silhouettes_differ_and_fill_their_box():
    for side in range(5, 60):
        for shape in SHAPES:
            pixels = silhouette(shape, side)
            assert pixels[0].any() and pixels[-1].any() and pixels[:, 0].any() and pixels[:, -1].any(), (shape, side)
    for side in (13, 20, 28):
        for i, first in enumerate(SHAPES):
            for second in SHAPES[:i]:
                a, b = silhouette(first, side), silhouette(second, side)
                assert (a & b).sum() / (a | b).sum() < 0.82, (first, second, side)


def test_every_side_has_same_box_shapes():
    for side in range(10, 120):
        backs = {back for back, _ in same_box_shapes(side)}
        assert {"square", "disc", "cross"} <= backs, side
        for back, front in same_box_shapes(side):
            visible = silhouette(back, side) & ~silhouette(front, side)
            assert back != front and visible.sum() >= 0.18 * silhouette(back, side).sum()


def test_same_box_pairs_are_told_apart_by_the_mask_alone(scenes, masks):
    holding = [(record, pixels) for record, pixels in zip(scenes, masks, strict=True) if same_box_pairs(record)]
    assert 0.25 < len(holding) / SCENES < 0.35
    for record, pixels in holding:
        for i, j in same_box_pairs(record):
            first, second = record["regions"][i], record["regions"][j]
            assert i < j and first["box"] == second["box"]
            assert first["box"][2] - first["box"][0] >= 0.3 * 64
            assert not (pixels[i] & pixels[j]).any()
            _, _, color, shape = first["caption"].split()
            assert not {color, shape} & set(second["caption"].split())


def test_twins_differ_only_late(scenes):
    holding = [record for record in scenes if late_detail_pairs(record)]
    assert 0.25 < len(holding) / SCENES < 0.35
    for record in scenes:
        looks = [region["caption"].split()[2:] for region in record["regions"]]
        twins = [(i, j) for i in range(len(looks)) for j in range(i + 1, len(looks)) if looks[i] == looks[j]]
        assert twins == late_detail_pairs(record)
    for record in holding:
        for i, j in late_detail_pairs(record):
            first, second = record["regions"][i], record["regions"][j]
            assert first["caption"].split()[2:] == second["caption"].split()[2:]
            assert first["caption"] != second["caption"]
            early = first["long_caption"].split()[:80]
            assert early == second["long_caption"].split()[:80]
            assert not set(words(" ".join(early))) & set(TEXTURES)
            assert first["long_caption"] != second["long_caption"]
            a, b = first["box"], second["box"]
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
            assert (a[2] - a[0], a[3] - a[1]) == (b[2] - b[0], b[3] - b[1])


def test_details_come_early_in_some_other_scenes(scenes):
    early = late = 0
    for record in scenes:
        is_late = [
            words(region["long_caption"]).index(region["caption"].split()[1]) >= 80 for region in record["regions"]
        ]
        early += not any(is_late)
        late += all(is_late)
    assert early + late == SCENES and early > SCENES * 0.2


def test_lengths_of_the_texts(scenes):
    lengths = np.array([len(region["long_caption"].split()) for record in scenes for region in record["regions"]])
    assert 90 <= lengths.min() and lengths.max() <= 160 and (lengths <= 125).mean() > 0.8
    for record in scenes:
        assert len(record["captions"]) in (1, 2)
        assert all(20 <= len(caption.split()) <= 60 for caption in record["captions"])
        assert len(record["alt_text"].split()) >= 2
    assert {len(record["captions"]) for record in scenes} == {1, 2}


def holds(relation, a, b):
    """Whether a region is where a text says, judged by masks: centers for directions, holes and contact otherwise."""
    (ay, ax), (by, bx) = (np.where(mask) for mask in (a, b))
    if relation == "to the left of":
        return ax.max() < bx.min()
    if relation == "to the right of":
        return ax.min() > bx.max()
    if relation == "above":
        return ay.max() < by.min()
    if relation == "below":
        return ay.min() > by.max()
    if relation in ("inside", "around"):
        inner, outer = ((ay, ax), (by, bx)) if relation == "inside" else ((by, bx), (ay, ax))
        return all(o.min() < i.min() and i.max() < o.max() for i, o in zip(inner, outer, strict=True))
    grown = np.zeros_like(a)
    grown[1:] |= a[:-1]
    grown[:-1] |= a[1:]
    grown[:, 1:] |= a[:, :-1]
    grown[:, :-1] |= a[:, 1:]
    return bool((grown & b).any())


RELATION = re.compile(r"(to the left of|to the right of|above|below|inside|around|in front of|behind) the (.+?)\.")


def test_texts_are_true(scenes, masks):
    kinds = set()
    numbers = {3: "three", 4: "four", 5: "five"}
    for record, pixels in zip(scenes, masks, strict=True):
        by_name = {region["caption"][2:]: mask for region, mask in zip(record["regions"], pixels, strict=True)}
        assert len(by_name) == len(pixels)
        for caption in record["captions"]:
            sentences = re.findall(r"The (\w+ \w+ \w+) is (.+?) the (\w+ \w+ \w+)\.", caption)
            assert sentences
            for item, relation, other in sentences:
                kinds.add(relation)
                assert holds(relation, by_name[item], by_name[other]), caption
            assert set(by_name) == {name for name in (d[2:] for d in all_descriptions()) if name in caption}
        for region, mask in zip(record["regions"], pixels, strict=True):
            _, texture, color, shape = region["caption"].split()
            text = region["long_caption"]
            assert numbers[len(pixels)] in words(text)
            own = re.sub(RELATION, "", text)
            assert [word for word in words(own) if word in TEXTURES] == [texture]
            assert re.search(rf"a (tiny|small|medium-sized|large) {color} {shape}\b", text)
            found = RELATION.findall(text)
            assert found
            for relation, look in found:
                others = [other for name, other in by_name.items() if name.endswith(look)]
                assert len(others) == 1, (look, text)
                assert holds(relation, mask, others[0]), text
            x0, y0, x1, y1 = region["box"]
            row = ("upper", "middle", "lower")[int((y0 + y1) / 2 / (64 / 3))]
            column = ("left", "middle", "right")[int((x0 + x1) / 2 / (64 / 3))]
            place = "middle" if row == column else f"{row} {column}"
            assert f"in the {place} part of" in text
    directions = {"to the left of", "to the right of", "above", "below"}
    assert kinds == directions | {"inside", "around", "in front of", "behind"}


def test_who_is_in_front_has_the_whole_shape(scenes, masks):
    """Of two that touch, the one in front is unbroken: its mask is a whole silhouette."""
    checked = 0
    for record, pixels in zip(scenes, masks, strict=True):
        for region, mask in zip(record["regions"], pixels, strict=True):
            whole = "in front of the" in region["long_caption"]
            hidden = "behind the" in region["long_caption"]
            if whole or hidden:
                x0, y0, x1, y1 = (int(edge) for edge in region["box"])
                side = max(x1 - x0, y1 - y0)
                square = (x1 - x0) == (y1 - y0)
                exact = square and (mask[y0:y1, x0:x1] == silhouette(region["category"], side)).all()
                assert exact == whole, region["long_caption"]
                checked += 1
    assert checked > 100


def test_pairs_of_hand_made_records():
    same = ["w"] * 80
    texts = [same + ["a"], same + ["b"], same + ["a"], ["v"] + same]
    boxes = [[0, 0, 4, 4], [0, 0, 4, 5], [0, 0, 4, 4], [0, 0, 4, 4]]
    pairs = zip(boxes, texts, strict=True)
    record = {"regions": [{"box": box, "long_caption": " ".join(text)} for box, text in pairs]}
    assert same_box_pairs(record) == [(0, 2), (0, 3), (2, 3)]
    assert late_detail_pairs(record) == [(0, 1), (1, 2)]
    assert late_detail_pairs(record, words=81) == []
    assert same_box_pairs({"regions": []}) == late_detail_pairs({"regions": []}) == []


def test_texts_without_pixels_are_those_of_the_record():
    for index in range(20):
        record, texts = make_scene(index, "test", 4), scene_texts(index, "test", 4)
        assert texts["captions"] == record["captions"] and texts["alt_text"] == record["alt_text"]
        pairs = zip(texts["descriptions"], texts["long_captions"], strict=True)
        assert sorted(pairs) == sorted((region["caption"], region["long_caption"]) for region in record["regions"])


def test_order_of_regions_does_not_tell_who_is_in_front(scenes):
    front_first = [
        "in front of" in record["regions"][i]["long_caption"] for record in scenes for i, _ in same_box_pairs(record)
    ]
    assert 0.3 < np.mean(front_first) < 0.7


def test_alt_text_is_noisy_but_not_unrelated(scenes):
    junk = mentioned = missing = wrong = 0
    for record in scenes:
        looks = {" ".join(region["caption"].split()[2:]) for region in record["regions"]}
        named = set(re.findall(rf"((?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}))", record["alt_text"]))
        mentioned += bool(named & looks)
        missing += bool(looks - named)
        wrong += bool(named - looks)
        junk += bool(re.search(r"\d|stock|vector|HD|free|clip|enlarge|poster|decor|logo", record["alt_text"]))
    assert mentioned == junk == SCENES
    assert missing / SCENES > 0.8 and 0.1 < wrong / SCENES < 0.5


def test_dataset_holds_the_same_records(scenes):
    pytest.importorskip("datasets")
    dataset = scenes_dataset(6, start=10)
    assert dataset.features == record_features()
    assert dataset.cache_files == []
    assert len(dataset) == 6
    for row, expected in zip(dataset, scenes[10:16], strict=True):
        validate_record(row)
        assert content(row) == content(expected)
    other = scenes_dataset(2, split="test", seed=9, size=32, setting="hard")
    assert content(other[1]) == content(make_scene(1, "test", 9, 32, "hard"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": -1}, ValueError, "`index` must not be negative, got -1"),
        ({"index": 2**48}, ValueError, "`index` must be below 2"),
        ({"index": 1.0}, TypeError, "`index` must be an integer, got 1.0"),
        ({"index": 0, "seed": -3}, ValueError, "`seed` must not be negative, got -3"),
        ({"index": 0, "seed": True}, TypeError, "`seed` must be an integer, got True"),
        ({"index": 0, "split": "dev"}, ValueError, "`split` must be one of .*'dev'"),
        ({"index": 0, "size": 31}, ValueError, "`size` must be at least 32 pixels, got 31"),
        ({"index": 0, "size": 64.0}, TypeError, "`size` must be an integer, got 64.0"),
        ({"index": 0, "setting": "easy"}, ValueError, "`setting` must be one of .*'easy'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_scene(**arguments)


def test_bad_dataset_arguments():
    with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
        scenes_dataset(0)
    with pytest.raises(ValueError, match="`start` must not be negative, got -2"):
        scenes_dataset(2, start=-2)
