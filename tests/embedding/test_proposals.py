"""Regions of everything in an image, by a tiny random SAM from disk."""

import pickle

import numpy as np
import pytest
from PIL import Image
from tiny_sam import save_tiny_sam

from pixclip_hf.embedding.sam import SamProposer
from pixclip_hf.processing.processing_regions import decode_rle, mask_box
from pixclip_hf.record import validate_record


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.mark.parametrize("size", [(64, 48), (30, 90)])
def test_masks_of_everything(sam, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    # A random model is sure of nothing: all of its masks count.
    proposer = SamProposer(sam, points=4, threshold=-100.0, nms_iou=1.0)
    regions = proposer(image)
    record = {"image": image, "width": size[0], "height": size[1], "captions": [], "alt_text": None}
    validate_record({**record, "regions": regions})
    assert 1 < len(regions) <= 16 and [region["id"] for region in regions] == list(range(len(regions)))
    scores = [region["score"] for region in regions]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    for region in regions:
        assert region["box"] == mask_box(decode_rle(region["mask"])).tolist()
    assert SamProposer(sam, points=4, threshold=scores[1], nms_iou=1.0)(image) == regions[:2]
    apart = SamProposer(sam, points=4, threshold=-100.0, nms_iou=0.5)(image)
    assert 1 <= len(apart) < len(regions) and apart[0] == regions[0]
    assert pickle.loads(pickle.dumps(proposer)) == proposer and "_loaded" not in proposer.__getstate__()


def test_bad_input(sam, tiny_cloc, tmp_path):
    with pytest.raises(ValueError, match="`points` must be at least 1, got 0"):
        SamProposer(sam, points=0)
    tiny_cloc[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` must be a SAM or SAM-HQ, got .*: cloc"):
        SamProposer(str(tmp_path))(Image.new("RGB", (8, 8)))
