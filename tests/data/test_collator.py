"""The collator: which regions and texts it draws, and the batch that comes out."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixclip_hf.data.collator import RegionCollator, RegionDataset, region_inputs
from pixclip_hf.data.points import point_of, training_points
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle
from pixclip_hf.scenes.dataset import make_scene

FAMILIES = ("cloc", "pixclip")


class Recorder:
    """A processor that keeps what it is called with."""

    def __init__(self, masked=False):
        self.prompts = ("mask",) if masked else ("box", "mask")

    def __call__(self, **arguments):
        self.arguments = arguments
        return {}


def region(number, caption="a thing", long_caption="a long thing"):
    texts = {"caption": caption and f"{caption} {number}", "long_caption": long_caption and f"{long_caption} {number}"}
    return {"id": number, "box": [number, 0, number + 4, 4], "mask": None, **texts}


def record(regions, captions=("an image",), key=None):
    made = {"image": Image.new("RGB", (20, 10)), "captions": list(captions), "regions": regions}
    return made if key is None else made | {"sample_key": key}


def draw(records, masked=False, **arguments):
    """What the processor is given for these records."""
    processor = Recorder(masked)
    assert RegionCollator(processor, **arguments)(records) == {"return_loss": True}
    return processor.arguments


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, size=32) for index in range(6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch(family, scenes, request):
    model, processor = request.getfixturevalue(f"tiny_{family}")
    masked = family == "pixclip"
    batch = RegionCollator(processor, regions_per_image=3, crops=masked)(scenes)
    shapes = {
        "pixel_values": (6, 3, 32, 32),
        "region_attention_mask": (6, 3),
        "input_ids": (6, 128),
        "attention_mask": (6, 128),
    }
    if masked:
        shapes |= {
            "region_masks": (6, 3, 32, 32),
            "crop_pixel_values": (6, 3, 3, 32, 32),
            "crop_masks": (6, 3, 32, 32),
        }
    else:
        shapes |= {"region_boxes": (6, 3, 4)}
    length = batch["region_input_ids"].shape[-1]
    shapes |= {"region_input_ids": (6, 3, length), "region_text_attention_mask": (6, 3, length)}
    assert batch.pop("return_loss") is True
    assert {name: tuple(values.shape) for name, values in batch.items()} == shapes
    assert batch["region_attention_mask"].all()
    assert torch.isfinite(model(**batch, return_loss=True).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_image_captions(family, scenes, request):
    _, processor = request.getfixturevalue(f"tiny_{family}")
    batch = RegionCollator(processor, image_captions=False)(scenes[:2])
    assert "input_ids" not in batch and "crop_pixel_values" not in batch


def test_draws_without_replacement_and_in_order():
    seen = set()
    for key in range(200):
        given = draw([record([region(i) for i in range(6)], key=(0, key))], regions_per_image=3)
        starts = [box[0] for box in given["boxes"][0]]
        assert starts == sorted(set(starts)) and len(starts) == 3
        assert given["region_text"][0] == [f"a thing {start}" for start in starts]
        seen.add(tuple(starts))
    assert len(seen) == 20  # all of 6 choose 3


def test_takes_all_regions_when_there_are_fewer():
    given = draw([record([region(0), region(1)]), record([region(5)])], regions_per_image=4)
    assert given["region_text"] == [["a thing 0", "a thing 1"], ["a thing 5"]]


def test_leaves_regions_without_the_text_out():
    regions = [region(0, caption=None), region(1), region(2, caption=None, long_caption=None), region(3, caption="")]
    assert draw([record(regions)])["region_text"] == [["a thing 1"]]
    given = draw([record(regions), record([])], region_text="long_caption")
    assert given["region_text"] == [["a long thing 0", "a long thing 1", "a long thing 3"], []]
    assert given["boxes"][1] == []


def test_draws_depend_on_seed_and_key_alone():
    regions = [region(i) for i in range(8)]
    captions = [f"caption {i}" for i in range(9)]
    keyed = [record(regions, captions, key=(0, i)) for i in range(5)]

    def texts(records, **arguments):
        given = draw(records, regions_per_image=2, **arguments)
        return list(zip(given["text"], map(tuple, given["region_text"]), strict=True))

    first = texts(keyed)
    assert len(set(first)) == 5
    assert texts(keyed[::-1]) == first[::-1]
    assert texts(keyed[2:3]) == first[2:3]
    assert texts(keyed, seed=1) != first
    assert texts([record(regions, captions, key=(1, i)) for i in range(5)]) != first


def test_records_without_a_key_always_draw_the_same_but_not_alike():
    records = [record([region(j + 10 * i) for j in range(8)]) for i in range(40)]
    given = draw(records, regions_per_image=2, whole_image_share=0.5)
    assert given["region_text"] == draw(records, regions_per_image=2, whole_image_share=0.5)["region_text"]
    whole = [texts[0] == "an image" for texts in given["region_text"]]
    assert 8 <= sum(whole) <= 32
    drawn = [texts for texts in given["region_text"] if texts[0] != "an image"]
    places = {tuple(int(text.split()[-1]) % 10 for text in texts) for texts in drawn}
    assert len(places) > 5


@pytest.mark.parametrize("share", (0.0, 0.5, 1.0))
def test_whole_image_share(share):
    records = [record([region(i) for i in range(5)], key=(0, i)) for i in range(400)]
    given = draw(records, masked=True, whole_image_share=share, regions_per_image=3, image_captions=False)
    assert "text" not in given
    whole = 0
    for masks, texts in zip(given["masks"], given["region_text"], strict=True):
        assert len(masks) == len(texts) == 3
        assert "an image" not in texts[1:]
        if texts[0] == "an image":
            assert masks[0] == [[0, 0, 20, 0, 20, 10, 0, 10]]
            whole += 1
    assert abs(whole / 400 - share) < (0.1 if share == 0.5 else 1e-9)


def test_whole_image_takes_the_only_slot_and_the_caption_of_the_image():
    records = [record([region(0)], [f"caption {i}" for i in range(5)], key=(0, i)) for i in range(10)]
    given = draw(records, regions_per_image=1, whole_image_share=1)
    assert given["region_text"] == [[caption] for caption in given["text"]]
    assert given["boxes"] == [[[0, 0, 20, 10]]] * 10


def test_an_image_without_regions_is_a_whole_image_where_those_are_wanted():
    records = [record([], key=(0, 0)), record([region(1, caption=None)], key=(0, 1))]
    assert draw(records, whole_image_share=0.01)["region_text"] == [["an image"], ["an image"]]
    with pytest.raises(ValueError, match="No region has a `caption` and image captions are not used"):
        draw(records, image_captions=False)


def test_whole_image_is_a_full_mask(tiny_pixclip, scenes):
    _, processor = tiny_pixclip
    batch = RegionCollator(processor, regions_per_image=2, whole_image_share=1)(scenes[:2])
    assert batch["region_masks"][:, 0].all() and not batch["region_masks"][:, 1].all()
    width = min(batch["input_ids"].shape[-1], batch["region_input_ids"].shape[-1])
    assert torch.equal(batch["region_input_ids"][:, 0, :width], batch["input_ids"][:, :width])


def test_a_region_without_mask_is_its_rectangle():
    scene = make_scene(0, size=32)
    mask = scene["regions"][0]["mask"]
    regions = [{"box": [1.0, 2.0, 9.0, 7.0], "mask": None}, {"box": [0.0, 0.0, 5.0, 5.0], "mask": mask}]
    assert region_inputs([regions], "mask") == {"masks": [[[[1, 2, 9, 2, 9, 7, 1, 7]], mask]]}
    assert region_inputs([regions], "box") == {"boxes": [[[1, 2, 9, 7], [0, 0, 5, 5]]]}


def test_rectangles_become_exact_masks(tiny_pixclip):
    _, processor = tiny_pixclip
    regions = [[{"box": [4.0, 8.0, 20.0, 12.0], "mask": None}]]
    image = Image.new("RGB", (32, 32))
    masks = processor(images=[image], **region_inputs(regions, "mask"))["region_masks"]
    expected = np.zeros((32, 32), dtype=bool)
    expected[8:12, 4:20] = True
    assert np.array_equal(masks[0, 0].numpy(), expected)


def test_a_share_of_the_batches_prompts_by_masks():
    collator = RegionCollator(Recorder(), mask_prompt_share=0.25)
    records = [record([region(number)], key=(0, number)) for number in range(400)]
    prompts = []
    for one in records:
        collator([one])
        prompts.append("masks" if "masks" in collator.processor.arguments else "boxes")
        assert len(collator.processor.arguments.keys() & {"masks", "boxes"}) == 1
    assert 0.18 < prompts.count("masks") / 400 < 0.32
    by_box = RegionCollator(Recorder())
    for one, prompt in zip(records[:20], prompts, strict=False):
        collator([one])
        assert prompt in collator.processor.arguments
        # What prompts is drawn apart: regions and texts are those of any other share.
        by_box([one])
        assert by_box.processor.arguments["region_text"] == collator.processor.arguments["region_text"]
        assert "boxes" in by_box.processor.arguments
    with pytest.raises(ValueError, match="`mask_prompt_share` must be 1"):
        RegionCollator(Recorder(masked=True), mask_prompt_share=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regions_per_image": 0}, "`regions_per_image` must be at least 1, got 0"),
        ({"region_text": "alt_text"}, "`region_text` must be one .* got 'alt_text'"),
        ({"whole_image_share": 1.1}, r"`whole_image_share` must lie in \[0, 1\], got 1.1"),
        ({"whole_image_share": -0.1}, "`whole_image_share`"),
        ({"whole_image_share": float("nan")}, "`whole_image_share`"),
        ({"mask_prompt_share": 1.5}, r"`mask_prompt_share` must lie in \[0, 1\], got 1.5"),
        ({"mask_prompt_share": -0.5}, "`mask_prompt_share`"),
        ({"point_prompt_share": 1.5}, r"`point_prompt_share` must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionCollator(Recorder(), **arguments)


def test_a_share_of_the_batches_prompts_by_points(scenes):
    processor = Recorder()
    processor.prompts = ("box", "mask", "point")
    collator = RegionCollator(processor, point_prompt_share=0.25, mask_prompt_share=0.5)
    records = [record([region(number % 16)], key=(0, number)) for number in range(400)]
    kinds = []
    for one in records:
        collator([one])
        kinds.append(processor.arguments.get("prompt"))
    assert 0.18 < kinds.count("point") / 400 < 0.32 and set(kinds) == {"point", None}
    # The others prompt as they would without points.
    without = RegionCollator(Recorder(), mask_prompt_share=0.5)
    for one, kind in zip(records[:20], kinds, strict=False):
        collator([one])
        without([one])
        if kind is None:
            assert processor.arguments == without.processor.arguments
        else:
            assert processor.arguments["boxes"] == [[one["regions"][0]["box"]]]
            assert processor.arguments["region_text"] == without.processor.arguments["region_text"]
    always = RegionCollator(processor, point_prompt_share=1.0)
    always(scenes)
    drawn = processor.arguments["points"]
    always(scenes)
    assert processor.arguments["points"] == drawn
    always([{**scene, "sample_key": (1, index)} for index, scene in enumerate(scenes)])
    assert processor.arguments["points"] != drawn


def test_points_lie_inside_and_beside_their_regions():
    counts = []
    for index in range(30):
        scene = make_scene(index)
        for one in scene["regions"]:
            mask = decode_rle(one["mask"])
            points, labels = training_points(one, scene["image"].size, np.random.default_rng(index))
            assert [bool(mask[int(y), int(x)]) for x, y in points] == [label == 1 for label in labels]
            counts.append((labels.count(1), labels.count(0)))
            x, y = point_of(one)
            assert mask[int(y), int(x)] and point_of(dict(one)) == [x, y]
    assert {positive for positive, _ in counts} == {1, 2, 3} and {negative for _, negative in counts} == {0, 1, 2}
    for rows in range(20):
        box = region(rows)
        points, labels = training_points(box, (40, 20), np.random.default_rng(rows))
        x0, y0, x1, y1 = box["box"]
        assert [x0 <= x <= x1 and y0 <= y <= y1 for x, y in points] == [label == 1 for label in labels]


def test_points_are_drawn_uniformly_from_a_mask():
    mask = np.zeros((6, 9), dtype=bool)
    mask[[0, 5, 2, 2], [0, 8, 3, 4]] = True
    one = {"box": [0, 0, 9, 6], "mask": encode_rle(mask)}
    rng = np.random.default_rng(0)
    drawn = [training_points(one, (9, 6), rng)[0][0] for _ in range(400)]
    places = [(int(y), int(x)) for x, y in drawn]
    for place in ((0, 0), (5, 8), (2, 3), (2, 4)):
        assert 60 < places.count(place) < 140


def test_points_of_polygons():
    triangle = {"box": [2, 3, 12, 9], "mask": [[2, 3, 12, 3, 2, 9]]}
    for seed in range(50):
        points, labels = training_points(triangle, (20, 12), np.random.default_rng(seed))
        for (x, y), label in zip(points, labels, strict=True):
            # Half a pixel to either side of the long edge.
            side = (x - 2) / 10 + (y - 3) / 6
            assert side < 1.15 if label else (side > 0.85 or x < 2.5 or y < 3.5)
    assert point_of(triangle) == point_of(triangle)


def test_points_prompt_a_model_that_takes_them(tiny_cloc, scenes):
    batch = RegionCollator(tiny_cloc[1], point_prompt_share=1.0)(scenes)
    assert batch["region_points"].shape[:2] == batch["region_boxes"].shape[:2] == (6, 4)
    real = batch["region_attention_mask"].bool()
    assert ((batch["region_point_labels"] == 1).any(-1) == real).all() and real.any()
    with pytest.raises(ValueError, match="`point_prompt_share` must be 0: points prompt no such model, got 0.5"):
        RegionCollator(Recorder(masked=True), point_prompt_share=0.5)
    with pytest.raises(ValueError, match="`point_prompt_share` must be 0 with `whole_image_share`"):
        RegionCollator(tiny_cloc[1], point_prompt_share=0.5, whole_image_share=0.1)


def test_crops_are_for_models_that_take_them(tiny_cloc):
    with pytest.raises(ValueError, match="`crops` must be False: a CLOCProcessor makes none, got True"):
        RegionCollator(tiny_cloc[1], crops=True)


def test_missing_image_caption():
    records = [record([region(0)]), record([region(1)], captions=()), record([region(2)], captions=(" ",))]
    for options in ({}, {"image_captions": False}, {"image_captions": False, "whole_image_share": 1}):
        own = "an image" if "whole_image_share" in options else "a thing 0"
        given = draw(records, regions_per_image=1, **options)
        assert given["region_text"] == [[own], ["a thing 1"], ["a thing 2"]]
    assert draw(records)["text"][0] == "an image"


def lacking(scenes):
    """Scenes that lack something: captions, regions, the texts of regions, all of it, nothing."""
    found = [{**scene, "regions": [dict(region) for region in scene["regions"]]} for scene in scenes]
    found[1]["captions"] = []
    found[2]["regions"] = []
    found[3] |= {"captions": None, "regions": None}
    for entry in found[4]["regions"]:
        entry["caption"] = None
    found[5]["regions"][0]["caption"] = " "
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_part_is_the_mean_over_what_it_has(family, scenes, request):
    """Values and gradients are those of the images that have captions, and of those that have regions with a text."""
    model, processor = request.getfixturevalue(f"tiny_{family}")
    collator = RegionCollator(processor, regions_per_image=2, crops=family == "pixclip")
    batch = collator(lacking(scenes))
    captioned = batch["attention_mask"].any(-1)
    prompted = batch["region_attention_mask"].any(-1)
    assert captioned.tolist() == [True, False, True, False, True, True]
    assert prompted.tolist() == [True, True, False, False, False, True]

    def losses(rows):
        part = {name: value[rows] for name, value in batch.items() if name != "return_loss"}
        return model(**part, return_loss=True).loss_parts

    whole = model(**batch).loss_parts
    reference = {
        name: part for name, part in losses(prompted).items() if name != "image_text"
    } | {"image_text": losses(captioned)["image_text"]}  # fmt: skip
    assert whole.keys() == reference.keys() and len(whole) == 4
    for name, part in whole.items():
        torch.testing.assert_close(part, reference[name], atol=1e-6, rtol=1e-6)
        expected, found = (
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            for loss in (reference[name], part)
        )
        assert any(value is not None and value.abs().max() > 1e-4 for value in expected)
        for one, other in zip(expected, found, strict=True):
            if one is None:
                assert other is None or not other.any()
            else:
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


def test_a_batch_of_nothing(tiny_cloc, scenes):
    """Refused by name with what would help, or on request a batch like any other whose loss is 0."""
    model, processor = tiny_cloc
    nothing = [lacking(scenes)[3] | {"sample_key": (2, 7)}]
    with pytest.raises(ValueError, match=r"no image has a caption.*with the field `caption`.*sample key \(2, 7\)"):
        RegionCollator(processor)(nothing)
    without_texts = [lacking(scenes)[4]]
    without_texts[0]["image"].filename = "photos/five.jpg"
    with pytest.raises(ValueError, match=r"(?s)--region_text long_caption category.*--image_captions True.*five\.jpg"):
        RegionCollator(processor, image_captions=False)(without_texts)
    whole = RegionCollator(processor)(scenes[:1])
    batch = RegionCollator(processor, allow_nothing=True)(nothing)
    assert batch.keys() == whole.keys()
    output = model(**batch)
    assert output.loss == 0 and output.loss_parts.keys() == model(**whole).loss_parts.keys()
    output.loss.backward()


def test_the_check_of_all_records(tiny_cloc, scenes):
    from pixclip_hf.scenes.dataset import scenes_dataset

    _, processor = tiny_cloc
    dataset = scenes_dataset(3, size=32)
    RegionCollator(processor).check(dataset, "train_dataset")
    bare = dataset.map(lambda row: {"regions": [], "captions": []}, features=dataset.features)
    with pytest.raises(ValueError, match="the 3 records of `train_dataset`. There are no regions and no image has"):
        RegionCollator(processor).check(bare, "train_dataset")


def test_dataset_names_epoch_and_record():
    records = RegionDataset([{"image": i} for i in range(3)])
    assert len(records) == 3
    assert records[2] == {"image": 2, "sample_key": (0, 2)}
    records.set_epoch(4)
    assert records.epoch == 4
    assert records[1] == {"image": 1, "sample_key": (4, 1)}


def batches(processor, records, epochs=2, **loader):
    """The batches of an accelerate data loader, epoch by epoch."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import DataLoader

    loader = DataLoader(
        RegionDataset(records),
        batch_size=2,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=RegionCollator(processor, regions_per_image=1, whole_image_share=0.3),
        **loader,
    )
    # As `Trainer` has it: the order comes from seed and epoch.
    settings = DataLoaderConfiguration(use_seedable_sampler=True)
    loader = Accelerator(cpu=True, dataloader_config=settings).prepare(loader)
    return [list(loader) for _ in range(epochs)]


@pytest.mark.parametrize("persistent", (False, True))
def test_number_of_workers_changes_nothing(persistent, tiny_cloc, scenes):
    _, processor = tiny_cloc
    expected = batches(processor, scenes)
    found = batches(processor, scenes, num_workers=2, persistent_workers=persistent)
    for epoch, other in zip(expected, found, strict=True):
        for batch, same in zip(epoch, other, strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(same[name])) for name in batch)


def test_every_epoch_draws_anew(tiny_cloc, scenes):
    _, processor = tiny_cloc
    texts = []
    for epoch in batches(processor, scenes):
        rows = [row[row > 0].tolist() for batch in epoch for row in batch["region_input_ids"][:, 0]]
        texts.append(sorted(rows))
    assert texts[0] != texts[1]


def test_of_several_texts_each_batch_draws_one():
    regions = [{**region(i), "category": f"thing{i}"} for i in range(3)]
    kinds = {"category": "a thing0", "caption": "a thing 0", "long_caption": "a long thing 0"}
    drawn = []
    for index in range(60):
        records = [record(regions, key=(0, index)), record(regions, key=(0, 100 + index))]
        given = draw(records, region_text=("caption", "category"))["region_text"]
        assert given[0] == given[1]
        drawn.append(given[0][0])
    assert set(drawn) == {kinds["caption"], kinds["category"]}
    assert 15 < drawn.count(kinds["category"]) < 45
    assert draw(records, region_text="category")["region_text"][0] == ["a thing0", "a thing1", "a thing2"]
    with pytest.raises(ValueError, match="region_text"):
        draw(records, region_text=())
