"""Masks of boxes by a tiny random SAM from disk."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sam import save_tiny_sam
from transformers import Sam2Config, SamModel, SamProcessor
from transformers.utils import is_torchvision_available

from pixclip_hf.annotation.longgrit.masks import SamMasks
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.images import open_image
from pixclip_hf.processing.processing_regions import decode_rle, encode_rle


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """Folder of a tiny SAM of 64 x 64 pixels."""
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


def noise(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def batch_of(stage, images, boxes):
    batch = {name: [None] * len(images) for name in pipeline_features([stage])}
    batch["image"] = images
    batch["regions"] = [
        [{"id": 10 * row + i, "box": box, "mask": None} for i, box in enumerate(row_boxes)]
        for row, row_boxes in enumerate(boxes)
    ]
    return batch


BOXES = [[[3, 5, 60, 40], [10.5, 2.5, 47.2, 47.9]], [[0, 0, 30, 50]], [[4, 4, 20, 20]]]


def test_masks_are_the_best_of_the_model_inside_the_box(sam):
    stage = SamMasks(sam)
    images = [noise(80, 48, 0), noise(30, 50, 1), noise(64, 64, 2)]
    batch = batch_of(stage, images, BOXES)
    own = encode_rle(np.eye(64, dtype=bool))
    batch["regions"][2][0]["mask"] = own
    done = stage(batch)
    assert done["regions"][2][0]["mask"] is own and done["steps"][2] is None
    assert done["counts"][2] == [{"name": "masks/masks of the source", "count": 1}]
    assert done["steps"][0] == [{"stage": "masks", "model": Path(sam).name, "version": None}]
    assert all(region["mask"] is None for row in batch["regions"][:2] for region in row)
    model, processor = SamModel.from_pretrained(sam).eval(), SamProcessor.from_pretrained(sam)
    found = 0
    for row in (0, 1):
        image = open_image(images[row])
        left = {region["id"]: region["mask"] for region in done["regions"][row]}
        for i, (x0, y0, x1, y1) in enumerate(BOXES[row]):
            # One box at a time.
            inputs = processor(images=image, input_boxes=[[[float(x0), float(y0), float(x1), float(y1)]]],
                               return_tensors="pt")  # fmt: skip
            with torch.no_grad():
                outputs = model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float())
            masks = processor.post_process_masks(
                outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )[0][0]
            expected = masks[outputs.iou_scores[0, 0].argmax()].numpy()
            ys, xs = np.mgrid[: image.height, : image.width]
            expected &= (xs + 1 > x0) & (xs < x1) & (ys + 1 > y0) & (ys < y1)
            if expected.any():
                found += 1
                assert (decode_rle(left[10 * row + i]) == expected).mean() > 0.999
            else:
                assert 10 * row + i not in left
    assert found >= 2
    # Batch mates make no difference.
    alone = stage({name: values[1:2] for name, values in batch.items()})
    assert alone["regions"][0] == done["regions"][1]


def test_each_box_gets_the_mask_of_the_best_score(sam, monkeypatch):
    stage = SamMasks(sam)
    logits = torch.full((1, 2, 3, 16, 16), -1.0)
    logits[:, :, 0, :, :8] = 1  # the left half
    logits[:, :, 1] = 1  # everything
    scores = torch.tensor([[[0.9, 0.5, 0.1], [0.2, 0.8, 0.3]]])

    class Model:
        device, dtype = "cpu", torch.float32

        def __call__(self, **inputs):
            return SimpleNamespace(pred_masks=logits, iou_scores=scores)

    monkeypatch.setattr(stage, "_loaded", (Model(), SamProcessor.from_pretrained(sam)))
    done = stage(batch_of(stage, [noise(64, 64, 0)], [[[20, 10, 50, 30], [20, 10, 50, 30]]]))
    left, whole = (decode_rle(region["mask"]) for region in done["regions"][0])
    expected = np.zeros((64, 64), bool)
    expected[10:30, 20:50] = True
    assert (whole == expected).all()
    expected[:, 32:] = False
    assert (left == expected).all()


def test_empty_masks_are_rejected(sam, monkeypatch):
    stage = SamMasks(sam)
    nothing = np.zeros((2, 48, 80), bool)
    nothing[1, 6, 20] = True
    monkeypatch.setattr(stage, "_segment", lambda image, boxes: nothing)
    done = stage(batch_of(stage, [noise(80, 48, 0)], BOXES[:1]))
    assert [region["id"] for region in done["regions"][0]] == [1]
    (rejected,) = done["rejected_regions"][0]
    assert rejected["region"]["id"] == 0 and rejected["rejected_reason"] == "empty mask"


def test_other_models(tmp_path):
    Sam2Config().save_pretrained(tmp_path / "sam2")
    stage = SamMasks(str(tmp_path / "sam2"))
    if not is_torchvision_available():
        with pytest.raises(ModuleNotFoundError, match="is a SAM 2, which needs torchvision"):
            stage(batch_of(stage, [noise(80, 48, 0)], BOXES[:1]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    stage = SamMasks(str(tmp_path))
    with pytest.raises(ValueError, match="`model` must be a SAM, SAM-HQ or SAM 2, got .*: llama"):
        stage(batch_of(stage, [noise(80, 48, 0)], BOXES[:1]))
