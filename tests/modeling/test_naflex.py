"""SigLIP 2 of variable resolution: images keep their aspect, regions follow onto the grid of each, and padding counts
for nothing."""

import numpy as np
import pytest
import torch
import transformers
from builders import loss_names, shake
from test_siglip import build, sources, tokens  # noqa: F401
from transformers import AutoModel, pipeline
from two_devices import OTHER, TwoDevices

import pixclip_hf
from pixclip_hf.modeling.modeling_patches import ImageTokens
from pixclip_hf.processing.processing_patches import patch_grid
from pixclip_hf.training.sharding import check_shardable

FAMILIES = ("cloc", "pixclip")
PROCESSORS = {"cloc": pixclip_hf.CLOCProcessor, "pixclip": pixclip_hf.PixCLIPProcessor}
MODELS = {"cloc": pixclip_hf.CLOCModel, "pixclip": pixclip_hf.PixCLIPModel}
SIZES = ((60, 40), (24, 120), (33, 37))
IMAGES = [
    np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8) for number, size in enumerate(SIZES)
]
BOXES = [[[5, 10, 30, 50], [0, 0, 40, 60]], [[60, 4, 90, 20]], [[3, 3, 20, 30], [10, 2, 30, 20], [0, 0, 9, 9]]]


@pytest.fixture
def naflex(sources):  # noqa: F811
    """`naflex(family)`: a model of the tiny SigLIP 2 and its processor."""
    folder = sources["siglip2"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz▁"]
    vocab = {word: number for number, word in enumerate(words)}
    transformers.Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right").save_pretrained(folder)
    transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)

    def make(family, **changes):
        model = build(family, sources, vision="siglip2", text="siglip2", **changes)
        return model, PROCESSORS[family].from_vision_text_pretrained(folder, folder)

    return make


def masks_of(boxes, size):
    masks = []
    for left, top, right, bottom in boxes:
        mask = np.zeros(size, dtype=bool)
        mask[top:bottom, left:right] = True
        masks.append(mask)
    return masks


MASKS = [masks_of(boxes, size) for boxes, size in zip(BOXES, SIZES, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_its_siglip2(family, naflex, sources):  # noqa: F811
    """Pixels as its image processor makes them, and from there on bit for bit, whatever the mask."""
    model, processor = naflex(family)
    source = AutoModel.from_pretrained(sources["siglip2"])
    reference = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)(IMAGES, return_tensors="pt")
    inputs = processor(images=IMAGES)
    assert inputs["spatial_shapes"].tolist() == reference["spatial_shapes"].tolist() == [[5, 3], [2, 8], [4, 4]]
    assert torch.equal(inputs["pixel_attention_mask"], reference["pixel_attention_mask"].long())
    torch.testing.assert_close(inputs["pixel_values"], reference["pixel_values"].float(), atol=1e-5, rtol=0)
    ids, _ = tokens()
    expected = source(input_ids=ids, **inputs)
    found = model(**inputs, input_ids=ids)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(found[name], expected[name]), name
    if family == "pixclip":
        regions = processor(images=IMAGES, masks=[masks[:1] for masks in MASKS])
        features = model.get_region_features(**regions).pooler_output[:, 0]
        assert torch.equal(features, source.get_image_features(**inputs).pooler_output)


def test_grids_are_those_of_transformers():
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    for height, width, patches in ((60, 40, 16), (1, 900, 256), (480, 640, 256), (37, 33, 1), (2000, 3000, 1024)):
        expected = get_image_size_for_max_num_patches(height, width, 16, patches)
        assert tuple(16 * side for side in patch_grid((height, width), 16, patches)) == expected


POINTS = [[[[12, 20]], [[30, 9], [31, 50]]], [[[75, 12]]], [[[5, 5]], [[20, 18]], [[3, 30], [8, 8]]]]
KINDS = [
    ("cloc", {}, {}, "boxes"),
    ("cloc", {}, {}, "masks"),
    ("cloc", {"region_readout": "image_head"}, {}, "masks"),
    ("cloc", {"region_readout": "roi_align"}, {}, "boxes"),
    ("cloc", {"prompter_points": True}, {}, "points"),
    ("pixclip", {}, {}, "masks"),
    ("pixclip", {}, {"mode": "pooled"}, "masks"),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes", "options", "prompts"), KINDS)
def test_batches_of_many_shapes_equal_one_by_one(family, changes, options, prompts, naflex):
    model, processor = naflex(family, **changes)
    shake(model)
    regions = {"boxes": BOXES, "masks": MASKS, "points": POINTS}[prompts]
    extract = pipeline("region-feature-extraction", model=model, processor=processor)
    found = extract(IMAGES, **{prompts: regions}, return_tensors=True, normalize=False, batch_size=3, **options)
    for image, own, rows in zip(IMAGES, regions, found, strict=True):
        inputs = processor(images=image, **{prompts: own})
        length = int(inputs["pixel_attention_mask"].sum())
        # Alone, and without the patches that only fill up the row.
        inputs["pixel_values"] = inputs["pixel_values"][:, :length]
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"][:, :length]
        alone = model.get_region_features(**inputs, **options).pooler_output[0]
        torch.testing.assert_close(rows, alone, atol=1e-4, rtol=1e-4)
        assert len(own) == 1 or rows.std(0).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_regions_lie_on_the_patches_of_their_image(family, naflex):
    """Two of the eight columns of the wide image, against the tower's tokens of these patches."""
    model, processor = naflex(family, **({"region_readout": "image_head"} if family == "cloc" else {}))
    options = {"mode": "pooled"} if family == "pixclip" else {}
    boxes = [BOXES[0], [[45, 0, 75, 12]], BOXES[2]]
    features = []
    for regions in (
        {"boxes": boxes},
        {"masks": [masks_of(own, size) for own, size in zip(boxes, SIZES, strict=True)]},
    ):
        inputs = processor(images=IMAGES, **regions)
        features.append(model.get_region_features(**inputs, **options).pooler_output[1, 0])
    whole = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    states = model.get_image_features(**whole).last_hidden_state[1]
    expected = model.visual_projection(model.vision_model.head(states[[3, 4]].mean(0)[None, None])[0])
    for one in features:
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_finds(family, naflex, tmp_path):
    """Every part of the loss, crops included; every parameter gets a gradient; regions of the right image."""
    model, processor = naflex(family)
    texts = [["a"] * len(boxes) for boxes in BOXES]
    options = {"return_crops": True} if family == "pixclip" else {}
    prompt = {"boxes": BOXES} if family == "cloc" else {"masks": MASKS}
    inputs = processor(images=IMAGES, text=["x", "y", "z"], region_text=texts, **prompt, **options)
    output = model.train()(**inputs)
    assert set(output.loss_parts) == loss_names(family) and output.loss.isfinite()
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    model.eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    inputs = processor(images=IMAGES, **prompt)
    assert "spatial_shapes" in processor.model_input_names
    other = transformers.AutoProcessor.from_pretrained(tmp_path)(images=IMAGES, **prompt)
    with torch.no_grad():
        assert torch.equal(again(**other).region_embeds, model(**inputs).region_embeds)
    if family == "cloc":
        by_mask = processor(images=IMAGES, masks=MASKS)
        boxes = model.loss_regions(None, by_mask["region_masks"], by_mask["spatial_shapes"])
        expected = processor(images=IMAGES, boxes=BOXES)["region_boxes"]
        # Masks are resampled to whole pixels.
        assert (boxes - expected).abs().max() < 0.05
        encoder = pixclip_hf.RegionEncoder(model, processor)
        found = encoder.find_boxes(_picture(IMAGES[1]), ["a", "b"])
        assert found.shape == (2, 4) and (found[:, 2] <= 120).all() and (found[:, 3] <= 24).all()


def test_tokens_on_another_device_than_their_shapes():
    """As the last layers of a tower whose first ones lie on the device of the inputs leave them."""

    def read(states, grid, images):
        return states.sum(1) * grid[1]

    states, shapes = torch.arange(24.0).reshape(3, 4, 2), torch.tensor([[1, 3], [2, 2], [1, 3]])
    expected = torch.stack([states[0, :3].sum(0) * 3, states[1].sum(0) * 2, states[2, :3].sum(0) * 3])
    assert torch.equal(ImageTokens(states, shapes, 8).per_grid(read), expected)
    with TwoDevices():
        assert torch.equal(ImageTokens(states, shapes.to(OTHER), 8).per_grid(read), expected)


@torch.no_grad()
def test_grounding_of_many_shapes(naflex):
    model, processor = naflex("cloc")
    shake(model)
    labels = ["a", "b"]
    ground = pipeline("region-grounding", model=model, processor=processor)
    together = ground([_picture(image) for image in IMAGES], candidate_labels=labels, threshold=-1, batch_size=3)
    for image, size, entries in zip(IMAGES, SIZES, together, strict=True):
        inputs = processor(images=image, text=labels)
        alone = model.ground(**inputs, steady_scores=True)
        (boxes,) = processor.post_process_boxes(alone.pred_boxes, [size])
        for entry in entries:
            number = labels.index(entry["label"])
            assert list(entry["box"].values()) == pytest.approx(boxes[number].tolist(), abs=1e-2)
            assert entry["score"] == pytest.approx(float(alone.scores[0, number]), abs=1e-4)


def test_masks_of_a_batch_go_back_to_their_images(naflex):
    """From the canvas that all of them are on, and from a grid of each."""
    _, processor = naflex("pixclip")
    inputs = processor(images=IMAGES, masks=MASKS)
    found = processor.post_process_masks(inputs["region_masks"], SIZES)
    for masks, rows, size in zip(MASKS, found, SIZES, strict=True):
        assert rows.shape[1:] == size
        for mask, row in zip(masks, rows, strict=False):
            # But for what resampling moves along the edges.
            assert (torch.from_numpy(mask) == row).float().mean() > 0.95
    grid = torch.zeros(1, 1, 2, 8)
    grid[..., 4] = 1
    (back,) = processor.post_process_masks(grid, [SIZES[1]])
    assert back[0].any(0).nonzero()[[0, -1], 0].tolist() == [60, 74]


def test_fsdp_is_refused(naflex):
    """Its ranks would wait for each other: a Prompter reads the images of each grid by themselves."""
    check_shardable(naflex("pixclip")[0])
    with pytest.raises(ValueError, match="`fsdp` must be off for a CLOC with a vision tower of variable resolution"):
        check_shardable(naflex("cloc")[0])


def _picture(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_and_more_patches(family, naflex):
    model, processor = naflex(family)
    encoder = pixclip_hf.RegionEncoder(model, processor)
    pictures = [_picture(image) for image in IMAGES]
    together = encoder.encode_images(pictures, batch_size=3)
    for picture, row in zip(pictures, together, strict=True):
        np.testing.assert_allclose(encoder.encode_images(picture), row, atol=1e-5)
    extract = pipeline("region-feature-extraction", model=model, processor=processor)
    found = extract(IMAGES[0], boxes=BOXES[0], max_num_patches=64, return_tensors=True, normalize=False)
    inputs = processor(images=IMAGES[0], boxes=BOXES[0], max_num_patches=64)
    assert inputs["pixel_values"].shape == (1, 64, 192) and inputs["spatial_shapes"].tolist() == [[9, 6]]
    torch.testing.assert_close(found, model.get_region_features(**inputs).pooler_output[0])
    with pytest.raises(ValueError, match="`size` is not an option of a model with this vision tower"):
        extract(IMAGES[0], boxes=BOXES[0], size={"height": 32, "width": 32})


def test_what_does_not_fit(naflex, sources):  # noqa: F811
    model, processor = naflex("pixclip")
    inputs = processor(images=IMAGES, masks=MASKS)
    for name in ("pixel_attention_mask", "spatial_shapes"):
        with pytest.raises(ValueError, match=f"`{name}` must be given for a 'siglip2_vision_model' tower"):
            model.get_region_features(**{key: value for key, value in inputs.items() if key != name})
    small = {**inputs, "region_masks": inputs["region_masks"][..., :30, :]}
    with pytest.raises(ValueError, match=r"`region_masks` must have shape \(3, R, 40, 64\)"):
        model.get_region_features(**small)
    with pytest.raises(ValueError, match="`image_size` must be None for a 'siglip2_vision_model' tower"):
        naflex("cloc", image_size=64)
    with pytest.raises(ValueError, match="size must be None for images that keep their aspect"):
        processor(images=IMAGES, size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="max_num_patches needs a patch_size"):
        processor(images=IMAGES, do_center_crop=True)
    fixed = build("pixclip", sources, text="siglip2")
    with pytest.raises(ValueError, match="`spatial_shapes` must be None for a 'siglip_vision_model' tower"):
        fixed.get_image_features(torch.zeros(1, 3, 32, 32), spatial_shapes=torch.tensor([[4, 4]]))
