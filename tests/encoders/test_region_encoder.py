"""`RegionEncoder` against processor and model called by hand: forms of input and output, prompts, batches, errors."""

import inspect
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stand_ins import tiny_clip
from transformers.utils import logging as transformers_logging

import pixclip_hf
from pixclip_hf import RegionEncoder, ViewEncoder, load_encoder
from pixclip_hf.data.points import point_of
from pixclip_hf.encoders.protocol import Encoder
from pixclip_hf.images import StoredImage
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset

FAMILIES = ("tiny_cloc", "tiny_pixclip")


@pytest.fixture(params=FAMILIES)
def parts(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoder(parts):
    return RegionEncoder(*parts)


@pytest.fixture
def scenes():
    return [make_scene(index, size=48) for index in range(5)]


def boxes_of(scenes):
    return [[region["box"] for region in scene["regions"]] for scene in scenes]


def masks_of(scenes):
    return [[region["mask"] for region in scene["regions"]] for scene in scenes]


def images_of(scenes):
    return [scene["image"] for scene in scenes]


def by_hand(parts, image, **regions):
    model, processor = parts
    with torch.no_grad():
        features = model.get_region_features(**processor(images=image, **regions)).pooler_output[0]
    return F.normalize(features, dim=-1).numpy()


def test_regions_by_points(tiny_cloc, scenes):
    config = pixclip_hf.CLOCConfig(**{**tiny_cloc[0].config.to_dict(), "prompter_points": True})
    torch.manual_seed(0)
    parts = pixclip_hf.CLOCModel(config), tiny_cloc[1]
    encoder = RegionEncoder(*parts)
    assert encoder.prompt == "box" and encoder.prompts == ("box", "mask", "point")
    points = [[[point_of(region)] for region in scene["regions"]] for scene in scenes]
    found = encoder.encode_regions(images_of(scenes), points=points, batch_size=2)
    for scene, own, rows in zip(scenes, points, found, strict=True):
        np.testing.assert_allclose(rows, by_hand(parts, scene["image"], points=own), atol=1e-5)
    # Records prompt by a point inside each region.
    for rows, same in zip(found, encoder.encode_records(scenes, prompt="point"), strict=True):
        np.testing.assert_allclose(rows, same, atol=1e-5)
    usual = RegionEncoder(*parts, prompt="point").encode_records(scenes)
    np.testing.assert_allclose(found[0], usual[0], atol=1e-5)
    one = encoder.encode_regions(
        images_of(scenes)[0], points=points[0], point_labels=[[1]] * len(points[0]), boxes=[None] * len(points[0])
    )
    np.testing.assert_allclose(one, found[0], atol=1e-5)
    with pytest.raises(ValueError, match="`points` must be None: they prompt no such CLOCModel"):
        RegionEncoder(*tiny_cloc).encode_regions(images_of(scenes), points=points)


@pytest.mark.parametrize("kind", ("boxes", "masks"))
@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_regions_equal_the_models(parts, encoder, scenes, kind, batch_size):
    """By the prompt that the encoder has, whatever is given: a mask prompts CLOC by its tight box."""
    regions = {"boxes": boxes_of, "masks": masks_of}[kind](scenes)
    found = encoder.encode_regions(images_of(scenes), **{kind: regions}, batch_size=batch_size)
    assert isinstance(found, list) and len(found) == 5
    for scene, own, rows in zip(scenes, regions, found, strict=True):
        assert isinstance(rows, np.ndarray) and rows.dtype == np.float32
        expected = by_hand(parts, scene["image"], **{kind: own}, prompt=parts[1].prompts[0])
        np.testing.assert_allclose(rows, expected, atol=1e-5)
    # Rows differ, or the equality above would say nothing of their order.
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-4


def test_cloc_is_prompted_by_boxes_unless_it_is_said(tiny_cloc, scenes):
    encoder, given = RegionEncoder(*tiny_cloc), {"masks": masks_of(scenes), "boxes": boxes_of(scenes)}
    assert encoder.prompt == "box" and encoder.prompts == ("box", "mask")
    usual = np.concatenate(encoder.encode_regions(images_of(scenes), **given))
    by_box, by_mask = (
        np.concatenate(encoder.encode_regions(images_of(scenes), **given, prompt=prompt)) for prompt in ("box", "mask")
    )
    assert np.array_equal(usual, by_box) and np.abs(by_mask - by_box).max() > 1e-4
    other = RegionEncoder(*tiny_cloc, prompt="mask")
    assert np.array_equal(np.concatenate(other.encode_regions(images_of(scenes), **given)), by_mask)
    for one, prompt, expected in ((encoder, None, by_box), (encoder, "mask", by_mask), (other, None, by_mask)):
        assert np.array_equal(np.concatenate(one.encode_records(scenes, prompt=prompt)), expected)


def test_images_without_regions(encoder, scenes, monkeypatch):
    boxes = boxes_of(scenes)
    boxes[0] = boxes[3] = []
    found = encoder.encode_regions(images_of(scenes), boxes=boxes, batch_size=2)
    assert [rows.shape for rows in found] == [(len(own), 16) for own in boxes]
    for number in (1, 4):
        alone = encoder.encode_regions(scenes[number]["image"], boxes=boxes[number])
        np.testing.assert_allclose(found[number], alone, atol=1e-5)
    assert encoder.encode_regions(scenes[0]["image"], boxes=[]).shape == (0, 16)
    assert encoder.encode_regions([], boxes=[]) == []
    assert encoder.encode_images([]).shape == (0, 16)


def test_one_item_or_a_list(encoder, scenes):
    """As `encode` of sentence-transformers: one item gives one embedding."""
    image, boxes = scenes[0]["image"], boxes_of(scenes)[0]
    one = encoder.encode_regions(image, boxes=boxes)
    assert np.array_equal(one, encoder.encode_regions([image], boxes=[boxes])[0])
    assert encoder.encode_images(image).shape == encoder.encode_texts("a star").shape == (16,)
    assert encoder.encode_images([image]).shape == encoder.encode_texts(["a star"]).shape == (1, 16)


def test_every_form_of_an_image(encoder, scenes, tmp_path):
    image, boxes = scenes[0]["image"], boxes_of(scenes)[0]
    image.save(tmp_path / "a.png")
    stored = scenes_dataset(1, size=48)
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), StoredImage(stored, 0),
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")},
    ]  # fmt: skip
    expected = encoder.encode_regions(image, boxes=boxes)
    for form in forms:
        assert np.array_equal(encoder.encode_regions(form, boxes=boxes), expected)
        assert np.array_equal(encoder.encode_regions([form], boxes=[boxes])[0], expected)
    found = encoder.encode_images(forms)
    np.testing.assert_allclose(found, np.repeat(encoder.encode_images([image]), len(forms), 0), atol=1e-5)


def test_workers_change_nothing(encoder, scenes):
    state = torch.random.get_rng_state()
    for num_workers in (0, 2):
        options = {"num_workers": num_workers, "batch_size": 2}
        regions = encoder.encode_regions(images_of(scenes), boxes=boxes_of(scenes), **options)
        images = encoder.encode_images(images_of(scenes), **options)
        if num_workers == 0:
            expected = regions, images
    assert all(np.array_equal(one, other) for one, other in zip(regions, expected[0], strict=True))
    assert np.array_equal(images, expected[1])
    # A training around it draws what it would have drawn.
    assert torch.equal(torch.random.get_rng_state(), state)


def test_raw_embeddings_and_tensors(parts, encoder, scenes):
    image, boxes = scenes[0]["image"], boxes_of(scenes)[0]
    model, processor = parts
    with torch.no_grad():
        regions = model.get_region_features(**processor(images=image, boxes=boxes)).pooler_output[0]
        text = model.get_text_features(**processor(text=["a star"])).pooler_output[0]
        whole = model.get_image_features(processor(images=image).pixel_values).pooler_output[0]
    options = {"convert_to_tensor": True, "normalize_embeddings": False}
    for found, expected in (
        (encoder.encode_regions(image, boxes=boxes, **options), regions),
        (encoder.encode_texts("a star", **options), text),
        (encoder.encode_images(image, **options), whole),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert abs(found.norm(dim=-1).mean().item() - 1) > 1e-3


def test_templates_and_their_ensemble(encoder, monkeypatch):
    templates = ("a photo of a {}.", "the {}, drawn")
    found = encoder.encode_texts(["disc", "ring"], templates=templates, convert_to_tensor=True)
    one_by_one = [
        [encoder.encode_texts(template.replace("{}", name), convert_to_tensor=True) for template in templates]
        for name in ("disc", "ring")
    ]
    expected = torch.stack([F.normalize(torch.stack(rows).mean(0), dim=-1) for rows in one_by_one])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    single = encoder.encode_texts("disc", templates="the {}, drawn", convert_to_tensor=True)
    torch.testing.assert_close(single, one_by_one[0][1], atol=1e-5, rtol=1e-5)
    raw = encoder.encode_texts(["disc"], templates=templates, convert_to_tensor=True, normalize_embeddings=False)
    torch.testing.assert_close(raw[0], torch.stack(one_by_one[0]).mean(0), atol=1e-5, rtol=1e-5)


def test_labels_and_templates_are_embedded_once(encoder, monkeypatch):
    asked = []
    embed = encoder._text_features

    def watch(texts, *arguments, **options):
        asked.append(list(texts))
        return embed(texts, *arguments, **options)

    monkeypatch.setattr(encoder, "_text_features", watch)
    before = encoder.encode_texts(["disc", "ring"], templates=["a {}", "the {}"])
    again = encoder.encode_texts(["star", "disc"], templates=["a {}", "the {}"])
    assert asked == [["a disc", "the disc", "a ring", "the ring"], ["a star", "the star"]]
    assert np.array_equal(again[1], before[0])
    # Another cut, other templates, none, and other weights are other embeddings.
    for options in ({"max_length": 4}, {"templates": ["a {}"]}, {}):
        encoder.encode_texts(["disc"], **options)
    assert len(asked) == 5
    with torch.no_grad():
        for parameter in encoder.model.text_projection.parameters():
            parameter.mul_(-1.5)
    assert np.abs(encoder.encode_texts(["disc"], templates=["a {}", "the {}"])[0] - before[0]).max() > 1e-3
    # What a caller does to its result stays with the caller.
    first = encoder.encode_texts(["disc"], normalize_embeddings=False)
    first[:] = 0
    assert np.abs(encoder.encode_texts(["disc"], normalize_embeddings=False)).max() > 0


def test_similarity(encoder, scenes):
    regions = encoder.encode_regions(scenes[0]["image"], boxes=boxes_of(scenes)[0], normalize_embeddings=False)
    texts = encoder.encode_texts(["a star", "a ring"], convert_to_tensor=True)
    found = encoder.similarity(regions, texts)
    expected = F.cosine_similarity(torch.from_numpy(regions)[:, None], texts[None], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert encoder.similarity(texts[0], texts[0]).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"`embeddings1` must have shape \(N, D\) or \(D,\), got \(1, 2, 16\)"):
        encoder.similarity(texts[None], texts)
    with pytest.raises(ValueError, match="must be of one width, got 8 and 16"):
        encoder.similarity(texts[:, :8], texts)


def test_modes_are_those_that_the_model_declares(tiny_cloc, tiny_pixclip, scenes):
    image, masks = scenes[0]["image"], masks_of(scenes)[0]
    encoder = RegionEncoder(*tiny_pixclip)
    assert encoder.modes == ("prompted", "pooled")
    with torch.no_grad():
        pooled = (
            tiny_pixclip[0]
            .get_region_features(**tiny_pixclip[1](images=image, masks=masks), mode="pooled")
            .pooler_output[0]
        )
    found = encoder.encode_regions(image, masks=masks, mode="pooled", convert_to_tensor=True)
    torch.testing.assert_close(found, F.normalize(pooled, dim=-1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`mode` is not an option of CLOCModel, got 'pooled'"):
        RegionEncoder(*tiny_cloc).encode_regions(image, masks=masks, mode="pooled")


def test_half_precision(parts, scenes):
    expected = RegionEncoder(*parts).encode_records(scenes)
    found = RegionEncoder(parts[0].to(torch.bfloat16), parts[1]).encode_records(scenes)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32 and (one * other).sum(-1).min() > 0.99


def test_from_pretrained(parts, encoder, scenes, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    loaded = RegionEncoder.from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16, max_length=9)
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training and loaded.text_limit == 9
    loaded = RegionEncoder.from_pretrained(tmp_path, device="cpu")
    for one, other in zip(loaded.encode_records(scenes), encoder.encode_records(scenes), strict=True):
        assert np.array_equal(one, other)
    assert isinstance(load_encoder(tmp_path, device="cpu"), RegionEncoder)
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="`model` must take regions, .* got CLIPModel: a ViewEncoder shows"):
        RegionEncoder(model, processor)


@pytest.mark.parametrize("kind", (RegionEncoder, ViewEncoder))
def test_encoders_keep_the_protocol(kind, tiny_cloc):
    encoder = kind(*(tiny_cloc if kind is RegionEncoder else tiny_clip()))
    for name in Encoder.__annotations__:
        getattr(encoder, name)
    for name, method in inspect.getmembers(Encoder, inspect.isfunction):
        if not name.startswith("_"):
            own = inspect.signature(getattr(kind, name)).parameters
            asked = inspect.signature(method).parameters
            assert {n: p.default for n, p in own.items()} == {n: p.default for n, p in asked.items()}, name


def test_progress_bars(encoder, capfd):
    logger = transformers_logging.get_logger("pixclip_hf.encoders.base")
    level = logger.level
    for given, wanted in ((True, True), (False, False), (None, False)):
        encoder.encode_texts([f"text {given}"], show_progress_bar=given)
        assert ("encoding texts" in capfd.readouterr().err) == wanted
    logger.setLevel(logging.INFO)
    encoder.encode_texts(["text by level"])
    logger.setLevel(level)
    assert "encoding texts" in capfd.readouterr().err


def test_bad_input_is_named(encoder, scenes, tmp_path):
    images, boxes = images_of(scenes), boxes_of(scenes)
    with pytest.raises(ValueError, match="`boxes`, `masks` or `points` must be given, got none of them"):
        encoder.encode_regions(images)
    with pytest.raises(ValueError, match="`boxes` must hold a list for each of the 5 images, got 4"):
        encoder.encode_regions(images, boxes=boxes[:4])
    with pytest.raises(ValueError, match="`prompt` of .*Model must be one of .*, got 'point'"):
        encoder.encode_regions(images, boxes=boxes, prompt="point")
    with pytest.raises(ValueError, match="`prompt` of .*Model must be one of .*, got 'point'"):
        RegionEncoder(encoder.model, encoder.processor, prompt="point")
    boxes[3][1] = [8, 8, 4, 12]
    for options in ({}, {"num_workers": 1}):
        with pytest.raises(ValueError, match=r"image 3: boxes\[1\] must have x1 > x0"):
            encoder.encode_regions(images, boxes=boxes, batch_size=2, **options)
    with pytest.raises(FileNotFoundError, match="image 1: .*nowhere.png"):
        encoder.encode_images([images[0], str(tmp_path / "nowhere.png")])
    with pytest.raises(TypeError, match="image 1: .*got int"):
        encoder.encode_images([images[0], 3])
    with pytest.raises(TypeError, match="`images` must be an image or a list of images, got generator"):
        encoder.encode_images(image for image in images)
    with pytest.raises(ValueError, match="`texts` must hold at least one text, got none"):
        encoder.encode_texts([])
    with pytest.raises(TypeError, match=r"`texts\[1\]` must be a string, got int"):
        encoder.encode_texts(["a", 3])
    with pytest.raises(ValueError, match="`templates` must each have a '{}' for the class, got 'a photo'"):
        encoder.encode_texts(["a"], templates=["a {}", "a photo"])
    with pytest.raises(ValueError, match="`templates` must hold at least one template, got none"):
        encoder.encode_texts(["a"], templates=[])


def test_images_of_two_sizes_that_cannot_share_a_batch(encoder):
    """No image is bad by itself: the processor's own message stays."""
    encoder.processor.image_processor.do_resize = False
    images = [Image.new("RGB", (32, 32)), Image.new("RGB", (40, 32))]
    with pytest.raises(ValueError, match="the images come out in different sizes"):
        encoder.encode_images(images)


def test_public_names():
    assert pixclip_hf.RegionEncoder is RegionEncoder
