"""CLIP and SigLIP behind the same methods: against the models called by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tokenizer
from PIL import Image
from stand_ins import tiny_clip, tiny_naflex, tiny_siglip

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.view_encoder import REGION_VIEWS, ViewEncoder, load_encoder
from pixclip_hf.encoders.views import blurred, crop, outlined

BUILDERS = {"clip": tiny_clip, "siglip": tiny_siglip}


@pytest.fixture(params=BUILDERS)
def peer(request):
    return BUILDERS[request.param]()


@pytest.fixture
def record():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    polygon = [[8, 8, 32, 8, 32, 24, 8, 24]]
    return {
        "image": image,
        "regions": [{"box": [8, 8, 32, 24], "mask": polygon}, {"box": [30, 10, 60, 46], "mask": None}],
    }


def by_hand(model, processor, picture):
    """A square picture through the model's own processor and methods."""
    pixels = processor.image_processor(images=picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)[0]


@pytest.mark.parametrize("view", ("crop", "blur", "box"))
def test_views_of_regions(peer, record, view):
    """Squares, so that the peer's own processor cuts nothing off and must agree."""
    model, processor = peer
    record["image"] = record["image"].crop((0, 0, 48, 48))
    record["regions"] = [{"box": [8, 8, 32, 24], "mask": None}]
    (region,) = record["regions"]
    encoder = ViewEncoder(model, processor, view)
    fill = tuple(round(255 * channel) for channel in processor.image_processor.image_mean)
    picture = {
        "crop": lambda: crop(record["image"], region, fill)["image"],
        "blur": lambda: blurred(record["image"], region),
        "box": lambda: outlined(record["image"], region),
    }[view]()
    (rows,) = encoder.encode_records([record], convert_to_tensor=True)
    torch.testing.assert_close(rows[0], by_hand(model, processor, picture), atol=2e-2, rtol=0)
    other = by_hand(model, processor, record["image"])
    assert F.cosine_similarity(rows[0], other, dim=0) < F.cosine_similarity(
        rows[0], by_hand(model, processor, picture), dim=0
    )


def test_a_crop_is_not_cropped_again(peer, record):
    """A protocol that shows crops, and a peer that looks at crops: one crop, squeezed to the square if it is none."""
    encoder = ViewEncoder(*peer, "crop")
    wide = record["image"].crop((0, 0, 64, 20))
    cached = CachedEncoder(encoder, progress=False)

    def show(image, region):
        return {"image": wide, "regions": [region]}

    (rows,) = cached.encode_records([record], show, name="wide")
    pixels = encoder.region_processor(images=wide).pixel_values
    with torch.no_grad():
        expected = F.normalize(peer[0].get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(rows, expected.expand(2, -1), atol=1e-5, rtol=1e-5)
    assert pixels.shape[-2:] == (32, 32)


def test_mask_pooled(peer, record):
    model, processor = peer
    encoder = ViewEncoder(model, processor, "mask_pooled")
    # The upper left quarter of the image: the upper left 2 x 2 of its 4 x 4 patches.
    quarter = [[0, 0, 32, 0, 32, 24, 0, 24]]
    record["regions"] = [{"box": [0, 0, 64, 48], "mask": quarter}, {"box": [0, 0, 32, 24], "mask": None}]
    (rows,) = encoder.encode_records([record], convert_to_tensor=True)
    torch.testing.assert_close(rows[0], rows[1])
    pixels = encoder.region_processor(images=record["image"]).pixel_values
    with torch.no_grad():
        tokens = model.vision_model(pixel_values=pixels).last_hidden_state[:, -16:]
        chosen = tokens[:, [0, 1, 4, 5]]
        if hasattr(model, "visual_projection"):
            expected = model.visual_projection(model.vision_model.post_layernorm(chosen).mean(1))
        else:
            expected = model.vision_model.head(chosen.mean(1, keepdim=True))
    torch.testing.assert_close(rows[0], F.normalize(expected, dim=-1).flatten(), atol=1e-5, rtol=1e-5)


def test_whole_images_and_texts_are_the_models_own(peer, record):
    model, processor = peer
    encoder = ViewEncoder(model, processor)
    images = [record["image"], record["image"].rotate(90, expand=True)]
    embeds = encoder.encode_images(images, batch_size=1, convert_to_tensor=True)
    torch.testing.assert_close(embeds[1], by_hand(model, processor, images[1]), atol=1e-6, rtol=1e-5)
    texts = ["a cat", "a much longer text about a dog"]
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = processor.tokenizer(texts[1], padding=padding, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)[0]
    found = encoder.encode_texts(texts, batch_size=1, convert_to_tensor=True)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert encoder.encode_texts(["x" * 500]).shape == found[:1].shape


@pytest.mark.parametrize("view", REGION_VIEWS)
def test_shapes(peer, record, view):
    encoder = ViewEncoder(*peer, view)
    rows = encoder.encode_records([record, {"image": record["image"], "regions": []}], convert_to_tensor=True)
    assert [len(row) for row in rows] == [2, 0]
    assert rows[0].shape[1] == rows[1].shape[1] == encoder.encode_texts(["a"]).shape[1]
    torch.testing.assert_close(rows[0].norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("view", ("crop", "blur", "box"))
def test_images_share_passes(record, view, monkeypatch):
    """Views of several images, of more than a pass holds, and an image without regions between them."""
    encoder = ViewEncoder(*tiny_clip(), view)
    box = {"box": [4, 4, 40, 30], "mask": None}
    counts = [2, 0, 1, 3, 5, 1]
    records = [{"image": record["image"].rotate(9 * i), "regions": [box] * count} for i, count in enumerate(counts)]
    alone = [encoder.encode_records([one], batch_size=1, convert_to_tensor=True)[0] for one in records]
    passes, features = [], encoder.model.get_image_features

    def counted(pixel_values):
        passes.append(len(pixel_values))
        return features(pixel_values=pixel_values)

    monkeypatch.setattr(encoder.model, "get_image_features", counted)
    together = encoder.encode_records(records, batch_size=4, convert_to_tensor=True)
    assert passes == [3, 3, 4, 1, 1]
    for row, own in zip(together, alone, strict=True):
        torch.testing.assert_close(row, own, atol=1e-5, rtol=1e-5)
    prepare = encoder.preparation(images=False)
    batch = prepare([one["image"] for one in records], [one["regions"] for one in records])
    torch.testing.assert_close(encoder.encode_prepared(batch, 4)[0], torch.cat(together))


@torch.no_grad()
def test_images_of_any_aspect(record):
    """Of a SigLIP 2 of variable resolution: images and views as its own processor cuts them into patches."""
    model, processor = tiny_naflex()
    image, (region, other) = record["image"], record["regions"]
    tall = image.rotate(90, expand=True)
    records = [record, {"image": tall, "regions": [region, other, region]}]

    def features(picture):
        inputs = processor.image_processor(images=picture, return_tensors="pt")
        return inputs, F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)

    fill = tuple(round(255 * channel) for channel in processor.image_processor.image_mean)
    views = {
        "crop": lambda image, region: crop(image, region, fill)["image"],
        "blur": blurred,
        "box": outlined,
    }
    for view, show in views.items():
        found = ViewEncoder(model, processor, view).encode_records(records, batch_size=4, convert_to_tensor=True)
        for own, rows in zip(records, found, strict=True):
            expected = [features(show(own["image"], region))[1] for region in own["regions"]]
            torch.testing.assert_close(rows, torch.cat(expected), atol=1e-3, rtol=0)
    encoder = ViewEncoder(model, processor, "mask_pooled")
    whole = encoder.encode_images([image, tall], convert_to_tensor=True)
    for row, picture, grid in zip(whole, (image, tall), ([3, 4], [4, 3]), strict=True):
        inputs, own = features(picture)
        torch.testing.assert_close(row, own[0], atol=1e-5, rtol=1e-4)
        assert inputs["spatial_shapes"].tolist() == [grid]
    # The left half: two of the four columns.
    box = [0, 0, 32, 48]
    (rows,) = encoder.encode_records(
        [{"image": image, "regions": [{"box": box, "mask": None}]}], convert_to_tensor=True
    )
    inputs, _ = features(image)
    tokens = model.vision_model(**inputs).last_hidden_state[:, :12].unflatten(1, (3, 4))[:, :, :2].flatten(1, 2)
    expected = F.normalize(model.vision_model.head(tokens.mean(1, keepdim=True)), dim=-1).flatten(0, -2)
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=0)


def test_texts_that_a_tokenizer_lowers_in_name_only():
    """As Gemma's in checkpoints of SigLIP 2, which were trained on lower-cased texts."""
    model, processor = tiny_naflex()
    processor.tokenizer = build_tokenizer()
    texts = ["A Red Disc", "a red disc"]
    upper, lower = ViewEncoder(model, processor).encode_texts(texts)
    assert abs(upper - lower).max() > 1e-3
    processor.tokenizer.init_kwargs["do_lower_case"] = True
    lowered = ViewEncoder(model, processor).encode_texts(texts)
    np.testing.assert_allclose(lowered, [lower, lower], atol=1e-6)


def test_load_encoder(tmp_path, tiny_pixclip):
    for name, parts in (("clip", tiny_clip()), ("siglip", tiny_siglip()), ("pixclip", tiny_pixclip)):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    encoder = load_encoder(str(tmp_path / "clip"), view="blur", max_length=9)
    assert isinstance(encoder, ViewEncoder) and encoder.view == "blur" and encoder.text_limit == 9
    assert load_encoder(str(tmp_path / "siglip")).padding == "max_length"
    assert isinstance(load_encoder(str(tmp_path / "pixclip")), RegionEncoder)


def test_bad_input(tiny_cloc):
    with pytest.raises(ValueError, match="`view` must be one of crop, blur, box, mask_pooled, got 'circle'"):
        ViewEncoder(*tiny_clip(), "circle")
    with pytest.raises(ValueError, match="`model` must be a CLIP or SigLIP, got Linear without get_image_features"):
        ViewEncoder(torch.nn.Linear(1, 1), None)


def test_unscaled_image_mask(tiny_pixclip):
    """A mask of 1.0 behind the model's scaling, as the published retrieval scripts feed it."""
    model, processor = tiny_pixclip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    encoder = CachedEncoder(RegionEncoder(model, processor), progress=False)
    plain, found = encoder.encode_images([image]), encoder.encode_images([image], unscaled_mask=True)
    pixels = processor(images=image).pixel_values
    with torch.no_grad():
        seen = model.vision_model(torch.cat([pixels, torch.ones(1, 1, 32, 32)], 1)).pooler_output
        expected = F.normalize(model.visual_projection(seen), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (plain - found).abs().max() > 1e-4
