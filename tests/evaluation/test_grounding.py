"""Referring expressions on known embeddings, and CLOC's grounding head against the model called by hand."""

import pytest
import torch
from PIL import Image
from stand_ins import known

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.evaluation.image_sets import Images
from pixclip_hf.evaluation.tasks.referring import refer_by_grounding, refer_by_similarity

LEFT, RIGHT, BOTH = [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 30, 10]


def data(*records):
    image = Image.new("RGB", (30, 10))
    return Images("refs", [{"image": image, **record} for record in records], split="val")


def candidates(*named):
    return [{"name": name, "box": box, "mask": None} for name, box in named]


def test_by_similarity():
    encoder = known(
        texts={"left": [1.0, 0.0], "right": [0.0, 1.0], "any": [0.6, 0.8]},
        regions={"l": [1.0, 0.0], "r": [0.0, 1.0], "t": [0.6, 0.8], "u": [0.6, 0.8]},
    )
    found = refer_by_similarity(
        encoder,
        data(
            {
                "regions": candidates(("l", LEFT), ("r", RIGHT)),
                # Right; wrong; and right, since one of its boxes is.
                "expressions": [
                    {"text": "left", "boxes": [LEFT]},
                    {"text": "left", "boxes": [RIGHT]},
                    {"text": "right", "boxes": [LEFT, RIGHT]},
                ],
            },
            # Two candidates that tie: half. The third row: no candidate fits the box.
            {"regions": candidates(("t", LEFT), ("u", RIGHT)), "expressions": [{"text": "any", "boxes": [RIGHT]}]},
            {"regions": candidates(("l", LEFT)), "expressions": [{"text": "any", "boxes": [BOTH]}]},
            {"regions": [], "expressions": [{"text": "any", "boxes": [LEFT]}]},
        ),
        resamples=10,
    )
    assert found.metrics["expression_count"] == 6
    assert found.metrics["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5 + 0 + 0) / 6)
    assert found.metrics["mean_iou"] == pytest.approx((1 + 0 + 1 + 0.5 + 1 / 3 + 0) / 6)
    assert found.metrics["upper_bound"] == pytest.approx(4 / 6)
    assert found.intervals.keys() == {"accuracy", "mean_iou", "upper_bound"}
    for name, (low, high) in found.intervals.items():
        assert low < found.metrics[name] < high
    assert found.protocol == "corrected" and found.split == "val"


def test_official_quirks():
    """Lower case behind "a photo of"; the whole image where there is no candidate; plain and blurred image add up."""
    encoder = known(texts={"a photo of the left": [1.0, 0.0]}, regions={"l": [1.0, 0.0], "r": [0.9, 0.1]})
    plain, embed, calls = encoder.encoder, encoder.encoder.encode_records, []

    def embed_and_note(records, **options):
        calls.append([len(record["regions"]) for record in records])
        # Blurred (one region a record), the right one is ahead by more than the left one is without blur.
        if all(len(record["regions"]) == 1 and "name" in record["regions"][0] for record in records):
            return [torch.tensor([[0.0, 0.0] if r["regions"][0]["name"] == "l" else [0.5, 0.0]]) for r in records]
        return embed([{**r, "regions": [{"name": "l", **region} for region in r["regions"]]} for r in records])

    plain.encode_records = embed_and_note
    found = refer_by_similarity(
        encoder,
        data(
            {
                "regions": candidates(("l", LEFT), ("r", RIGHT)),
                "expressions": [{"text": "The LEFT", "boxes": [RIGHT]}],
            },
            {"regions": [], "expressions": [{"text": "the left", "boxes": [[0, 0, 30, 8]]}]},
        ),
        protocol="official",
        resamples=0,
    )
    assert found.metrics["accuracy"] == 1 and found.metrics["upper_bound"] == 1
    assert calls[0] == [2, 1]


def test_by_the_grounding_head(tiny_cloc):
    model, processor = tiny_cloc
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    texts = ["dark", "a bright corner"]
    with torch.no_grad():
        boxes = model.ground(**processor(images=image, text=texts)).pred_boxes[0] * torch.tensor([60, 40, 60, 40])
    boxes = torch.stack([boxes[:, 0::2].clamp(0, 60), boxes[:, 1::2].clamp(0, 40)], -1).flatten(1).tolist()
    expressions = [{"text": texts[0], "boxes": [boxes[0]]}, {"text": texts[1], "boxes": [[0, 0, 1, 1]]}]
    encoder = CachedEncoder(RegionEncoder(model, processor), progress=False)
    assert encoder.encoder.grounds
    found = refer_by_grounding(
        encoder, Images("refs", [{"image": image, "regions": [], "expressions": expressions}]), 5
    )
    assert found.metrics["accuracy"] == 0.5 and found.protocol == "grounding-head"
    assert found.metrics["mean_iou"] == pytest.approx(0.5, abs=0.01)
    # One image, so that every draw is the same.
    low, high = found.intervals["mean_iou"]  # of one image, which says little of others
    assert low < 0.1 and high > 0.9


def test_bad_input(tiny_pixclip):
    encoder = CachedEncoder(RegionEncoder(*tiny_pixclip), progress=False)
    with pytest.raises(ValueError, match="`encoder` must have a grounding head"):
        refer_by_grounding(encoder, data())
    with pytest.raises(ValueError, match="`protocol` of referring must be corrected or official, got 'sam'"):
        refer_by_similarity(encoder, data(), "sam")
    with pytest.raises(ValueError, match="`data` has no expression"):
        refer_by_similarity(known(), data({"regions": [], "expressions": []}))
