"""Open-vocabulary detection on data in COCO's or LVIS's layout, scored by the evaluator of COCO (pycocotools)."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...detection import proposer_of
from ...encoders.base import logit_scale_and_bias
from ...encoders.cached import CachedEncoder
from ...encoders.templates import IMAGENET_TEMPLATES
from ...images import open_image
from ...pipelines.region_detection import BACKGROUND, best_labels, grid_boxes
from ...processing.processing_regions import read_mask
from ..image_sets import LAYOUTS, Images
from ..intervals import RESAMPLES
from ..metrics.referring_accuracy.box_overlap import pairwise_iou
from ..pictures import MOST_REGIONS, PAGE, ComparedTexts, draw_first_image, draw_found_answers
from ..report import Result
from .base import Option, Task

GIVEN, PROPOSED = "given-boxes", "proposals"
# Detections of an image that the evaluator counts.
MOST_DETECTIONS = 100
NMS_IOU = 0.5
NO_OBJECT = "no object"
PROPOSALS = Option("grid", "where proposals come from: grid, detector:NAME or sam:NAME, models of transformers")
# The evaluator's numbers by their places in its summary.
MEASURES = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR@100": 8}


def detect_objects(
    encoder: CachedEncoder, data: Images, protocol: str | None = None, proposals: str = "grid"
) -> Result:
    """Every class of the dataset is looked for in every image.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions` that have a `category`.
        protocol: `given-boxes` (`corrected` or None): the annotated boxes are named, crowds left out, so that only the
            naming is measured. `proposals`: the boxes of `proposals` are named, and of each class suppressed above an
            IoU of 0.5.
        proposals: `"grid"`, `"detector:NAME"` or `"sam:NAME"`, as in [`detect`].

    Returns:
        `AP` (over IoU 0.5 to 0.95), `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large` and `AR@100` of COCO's
        evaluator over boxes, without those that no object of the data counts for; `object_count`, `class_count`.

    Raises:
        ValueError: an unknown protocol, or no object to detect.
        ImportError: no pycocotools.
    """
    protocol = chosen_protocol(protocol)
    left_out = dict(data.left_out)
    truths, looked_at = [], []
    for record in data.records:
        named = [region for region in record["regions"] if region["category"]]
        if missing := len(record["regions"]) - len(named):
            left_out["regions without a category"] = left_out.get("regions without a category", 0) + missing
        truths.append([{**region, "area": _area(region, record)} for region in named])
        looked_at.append(_regions(record, named, protocol, proposals))
    if not any(not region.get("iscrowd") for named in truths for region in named):
        raise ValueError(f"{data.name} has no object to detect; left out: {left_out or 'none'}.")
    rows = _name_regions(encoder, data.records, looked_at, data.categories, protocol, proposals)
    metrics = score_detections(truths, data.categories, rows)
    metrics |= {
        "object_count": sum(not region.get("iscrowd") for named in truths for region in named),
        "class_count": len(data.categories),
    }
    notes = [f"Boxes from {proposals}."] if protocol == PROPOSED else []
    if "lvis" in data.name.lower():
        notes.append("By COCO's rules, for which every image is annotated with every class: LVIS's own are federated.")
    return Result(OpenVocabularyDetection.name, data.name, protocol, metrics, {}, data.split, left_out, notes)


def chosen_protocol(name: str | None) -> str:
    """`given-boxes`, which `corrected` (or None) means, or `proposals`.

    Raises:
        ValueError: another name.
    """
    name = GIVEN if name in (None, "corrected") else name
    if name not in (GIVEN, PROPOSED):
        raise ValueError(f"`protocol` must be {GIVEN} or {PROPOSED}, got {name!r}.")
    return name


def _area(region: Mapping[str, Any], record: Mapping[str, Any]) -> float:
    """Pixels of a region, by which COCO tells small, medium and large objects apart; of its box where it has no
    mask."""
    if region.get("mask"):
        return float(np.count_nonzero(read_mask(region["mask"], (record["height"], record["width"]), "mask")))
    x0, y0, x1, y1 = region["box"]
    return float((x1 - x0) * (y1 - y0))


def _regions(
    record: Mapping[str, Any], named: Sequence[Mapping[str, Any]], protocol: str, proposals: str
) -> list[Mapping[str, Any]]:
    """The regions of an image that are to be named."""
    if protocol == GIVEN:
        return [region for region in named if not region.get("iscrowd")]
    image = open_image(record["image"])
    return [{"box": list(found["box"]), "mask": found.get("mask")} for found in propose(proposals)(image)]


def _name_regions(
    encoder: CachedEncoder,
    records: Sequence[Mapping[str, Any]],
    looked_at: Sequence[Sequence[Mapping[str, Any]]],
    categories: Sequence[str],
    protocol: str,
    proposals: str,
) -> list[dict[str, Any]]:
    """The detections among the regions of each image, as rows of COCO's results."""
    filled = [number for number, regions in enumerate(looked_at) if regions]
    shown = [{**records[number], "regions": looked_at[number]} for number in filled]
    embeds = dict(zip(filled, encoder.encode_records(shown, name=f"{protocol} {proposals}"), strict=True))
    names = class_names(categories)
    texts = encoder.encode_texts([*names, *BACKGROUND], templates=IMAGENET_TEMPLATES)
    rows = []
    for number, regions in embeds.items():
        scores = label_scores(encoder.encoder.model, regions @ texts.T)[:, : len(names)]
        boxes = torch.tensor([region["box"] for region in looked_at[number]], dtype=torch.float32)
        rows += _detections(number + 1, boxes, scores, NMS_IOU if protocol == PROPOSED else 1.0)
    return rows


def class_names(categories: Sequence[str]) -> list[str]:
    """Classes as texts."""
    return [category.replace("_", " ") for category in categories]


@lru_cache(maxsize=1)  # one model, however many images
def propose(proposals: str) -> Callable[[Image.Image], Sequence[Mapping[str, Any]]]:
    """What finds the boxes of an RGB image: `"grid"`, `"detector:NAME"` or `"sam:NAME"`."""
    if proposals == "grid":
        return lambda image: [{"box": box} for box in grid_boxes(*image.size)]
    return proposer_of(proposals)


def label_scores(model: Any, cosines: Tensor) -> Tensor:
    """Cosine similarities `(R, T)` of regions and texts to scores in [0, 1], by the logits of a region model or of a
    CLIP or SigLIP: their softmax over the texts. A model with a sigmoid judges each text by itself, which ranks as the
    cosine does: that is the score, since a sigmoid would make many of them 1.0."""
    scale, bias = logit_scale_and_bias(model)
    if bias is not None:
        return (1 + cosines) / 2
    return (float(scale.detach()) * cosines).softmax(-1)


def _detections(image_id: int, boxes: Tensor, scores: Tensor, nms_iou: float) -> list[dict[str, Any]]:
    """The best detections of an image as rows of COCO's results, classes counted from one."""
    rows = []
    for row, label in best_labels(boxes, scores, 0.0, nms_iou, MOST_DETECTIONS):
        x0, y0, x1, y1 = boxes[row].tolist()
        score = float(scores[row, label])
        rows.append({"image_id": image_id, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                     "score": score})  # fmt: skip
    return rows


def score_detections(
    truths: Sequence[Sequence[Mapping[str, Any]]], categories: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Measures of detections by COCO's evaluator.

    Args:
        truths: the regions of each image, with `box`, `category`, `area` and, for crowds, `iscrowd`.
        categories: all classes.
        rows: detections as rows of COCO's results; images and classes are counted from one.

    Returns:
        [`MEASURES`], without those that no object counts for.
    """
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("`open-vocabulary-detection` needs pycocotools: `pip install pixclip-hf[eval]`.") from error
    numbers = {category: number for number, category in enumerate(categories, 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, regions in enumerate(truths, 1):
        for region in regions:
            x0, y0, x1, y1 = (float(edge) for edge in region["box"])
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[region["category"]],
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": region["area"],
                "iscrowd": int(bool(region.get("iscrowd"))),
            })  # fmt: skip
    with redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": number} for number in range(1, len(truths) + 1)],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
        }
        known.createIndex()
        found = COCO()
        found.dataset = {**known.dataset, "annotations": [
            {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for number, row in enumerate(rows, 1)
        ]}  # fmt: skip
        found.createIndex()
        evaluator = COCOeval(known, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    values = {name: float(evaluator.stats[place]) for name, place in MEASURES.items()}
    # -1 says that nothing of that size is annotated.
    return {name: value for name, value in values.items() if value >= 0}


class OpenVocabularyDetection(Task):
    """Every class in every image, by COCO's evaluator."""

    name = "open-vocabulary-detection"
    layout = LAYOUTS["open-vocabulary-detection"]
    protocols = (GIVEN, PROPOSED)
    primary_measure = "AP"
    options = {"proposals": PROPOSALS}
    hub_task = "zero-shot-object-detection"

    def measure(
        self,
        encoder: CachedEncoder,
        data: Images,
        protocol: str | None,
        resamples: int = RESAMPLES,
        **options: Any,
    ) -> list[Result]:
        return [detect_objects(encoder, data, protocol, options["proposals"])]

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        names = class_names(data.categories)
        if chosen_protocol(protocol) == GIVEN:
            numbers = {category: number for number, category in enumerate(data.categories)}

            def own(region: Mapping[str, Any]) -> int | None:
                return numbers[region["category"]] if region["category"] and not region.get("iscrowd") else None

            compared = ComparedTexts(names, encoder.encode_texts(names, templates=IMAGENET_TEMPLATES), own)
            title = f"{self.name}, {GIVEN}: best of {len(names)} classes"
            return draw_first_image(encoder, data.records, compared, folder, name, title)
        records = data.records[:PAGE]
        looked_at = [_regions(record, [], PROPOSED, options["proposals"]) for record in records]
        rows = _name_regions(encoder, records, looked_at, data.categories, PROPOSED, options["proposals"])
        boxes: list[list[Any]] = [[] for _ in records]
        answers: list[list[str]] = [[] for _ in records]
        truths: list[list[str]] = [[] for _ in records]
        for row in rows:
            number = row["image_id"] - 1
            if len(boxes[number]) < MOST_REGIONS:
                x0, y0, width, height = row["bbox"]
                boxes[number].append([x0, y0, x0 + width, y0 + height])
                answers[number].append(names[row["category_id"] - 1])
                truths[number].append(_object_at(boxes[number][-1], records[number]))
        images = [open_image(record["image"]) for record in records]
        title = f"{self.name}, {PROPOSED} ({options['proposals']}): the best {MOST_REGIONS} detections of an image"
        return draw_found_answers(images, boxes, answers, truths, folder, name, title)


def _object_at(box: Sequence[float], record: Mapping[str, Any]) -> str:
    """The class of the object that a box fits best, if it fits one by an IoU of 0.5."""
    objects = [region for region in record["regions"] if region["category"]]
    if not objects:
        return NO_OBJECT
    overlap = pairwise_iou(np.array([box]), np.array([region["box"] for region in objects]))[0]
    best = int(overlap.argmax())
    return class_names([objects[best]["category"]])[0] if overlap[best] >= 0.5 else NO_OBJECT
