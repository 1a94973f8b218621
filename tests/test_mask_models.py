"""Masks of points by tiny random mask models, and what they prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sam import save_tiny_sam
from transformers import pipeline

from pixclip_hf import MaskModel, masks_from_points

POINTS = [[[10, 12]], [[30, 20], [40, 40]], [[50, 5]]]
LABELS = [[1], [1, 0], [1]]


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def sam(folder):
    model = MaskModel.from_pretrained(folder, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        # Points and labels that make a difference.
        for parameter in model.model.prompt_encoder.parameters():
            parameter.normal_()
    return model


def test_masks_equal_those_of_the_mask_model_itself(sam, image):
    masks = masks_from_points(sam, image, POINTS, LABELS)
    assert [mask.shape for mask in masks] == [(48, 64)] * 3 and all(mask.dtype == bool for mask in masks)
    model, processor = sam.model, sam.processor
    for mask, points, labels in zip(masks, POINTS, LABELS, strict=True):
        inputs = processor(images=image, input_points=[[points]], input_labels=[[labels]], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        with torch.no_grad():
            outputs = model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
        large = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0].numpy()
        order = outputs.iou_scores[0, 0].argsort(descending=True)
        assert np.array_equal(mask, next(large[i] for i in order if large[i].any()))


def test_labels_reach_the_mask_model(sam, image, monkeypatch):
    """What a tiny random model makes of them is mostly nothing."""
    given, forward = [], sam.model.forward

    def spy(**inputs):
        given.append(inputs["input_labels"][0].tolist())
        return forward(**inputs)

    monkeypatch.setattr(sam.model, "forward", spy)
    masks_from_points(sam, image, POINTS, LABELS)
    assert given == [[[1], [1]], [[1, 0]]]  # a pass for regions of one point, one for those of two


def test_lists_of_images_and_one_image_pass_each(sam, image, monkeypatch):
    one = masks_from_points(sam, image, POINTS, LABELS)
    calls = []
    embed = sam.model.get_image_embeddings
    monkeypatch.setattr(sam.model, "get_image_embeddings", lambda *a: calls.append(1) or embed(*a))
    several = masks_from_points(sam, [image, image], [POINTS, []], [LABELS, []])
    assert len(calls) == 1 and several[1] == [] and all(map(np.array_equal, several[0], one))


def test_a_folder_may_be_a_path(folder, image):
    named = masks_from_points(folder, image, POINTS[:1])
    assert np.array_equal(named, masks_from_points(Path(folder), image, POINTS[:1]))


def test_masks_of_points_prompt_pixclip(folder, image, tiny_pixclip):
    model, processor = tiny_pixclip
    classify = pipeline("zero-shot-region-classification", model=model, processor=processor, device="cpu")
    found = classify(image, masks=masks_from_points(folder, image, POINTS[:1]), candidate_labels=["a", "b"])
    assert len(found) == 1 and found[0]["mask_area"] > 0


def test_bad_input(sam, image, tiny_cloc, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"points\[0\]\[0\] must lie in its image"):
        masks_from_points(sam, image, [[[65, 1]]])
    with pytest.raises(ValueError, match=r"points\[0\]\[1\] must hold points, got None"):
        masks_from_points(sam, [image], [[[[5, 5]], None]])
    with pytest.raises(TypeError, match="`mask_model` must be a Hub id, a folder or a MaskModel, got a SamModel"):
        masks_from_points(sam.model, image, POINTS)
    with pytest.raises(ValueError, match="`mask_model` must be a SAM, SAM-HQ, SAM 2, got 'CLOCModel': cloc"):
        MaskModel(*tiny_cloc)
    tiny_cloc[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`mask_model` must be a SAM, SAM-HQ, SAM 2, got .*: cloc"):
        masks_from_points(str(tmp_path), image, POINTS)
    monkeypatch.setattr(
        sam.processor, "post_process_masks", lambda masks, *sizes: [torch.zeros(masks.shape[1], 3, 48, 64)]
    )
    with pytest.raises(ValueError, match=r"points\[0\]: the mask model finds no pixel"):
        masks_from_points(sam, image, POINTS)
