"""Names the objects of images: proposals of a detector, of SAM, of a grid or of the caller, named by texts; and COCO's
results file."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data.whole_files import write_utf8
from .encoders.preparation import as_images
from .images import open_image
from .pipelines.region_detection import RegionDetectionPipeline
from .processing.processing_regions import encode_rle

Detection = dict[str, Any]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def detect(
    images: Any, labels: Sequence[str], model: Any, proposals: Any = "grid", batch_size: int = 1, **options: Any
) -> list[Detection] | list[list[Detection]]:
    """Names the objects of one image or of several.

    Args:
        images: an image in any form of `open_image`, or a list of images.
        labels: what objects may be called, texts of any length.
        model: a CLOC or PixCLIP: Hub id, folder, or a `zero-shot-region-detection` pipeline, which is then not loaded
            in every call.
        proposals: where regions come from: `"grid"`, `"detector:NAME"` (an object detector of transformers, Hub id or
            folder) or `"sam:NAME"` (SAM or SAM-HQ, asked at a grid of points), which are loaded for this call; a
            callable such as a [`DetectorProposer`], a [`SamProposer`] or one of your own (see
            [`RegionDetectionPipeline`]); or boxes, `(R, 4)` xyxy in pixels, for a list of images a list of those.
        batch_size: images per pass of the model.
        options: of [`RegionDetectionPipeline`]: `threshold`, `top_k`, `nms_iou`, `background`, `temperature`,
            `proposal_weight`, `return_masks`, `hypothesis_template`, `mode`, `masks` in place of proposals.

    Returns:
        For one image a list of `{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"} in pixels}`, best first;
        for a list of images a list of those.

    Raises:
        OSError, TypeError, ValueError: as [`RegionDetectionPipeline`].
    """
    from transformers import pipeline

    items, one = as_images(images)
    opened = [open_image(image) for image in items]
    if isinstance(model, str | PathLike):
        model = pipeline("zero-shot-region-detection", model=str(model))
    if not isinstance(model, RegionDetectionPipeline):
        raise TypeError(
            "`model` must be a Hub id, a folder or a zero-shot-region-detection pipeline, got a "
            f"{type(model).__name__}."
        )
    if "boxes" in options:
        raise TypeError("`boxes` must be given as `proposals`.")
    if options.get("masks") is not None:
        if not (isinstance(proposals, str) and proposals == "grid"):
            raise ValueError(f"`masks` are proposals themselves: `proposals` must be left out, got {proposals!r:.80}.")
        options["masks"] = [options["masks"]] if one else options["masks"]
    elif isinstance(proposals, str) or callable(proposals):
        options["proposals"] = proposals if proposals == "grid" else proposer_of(proposals)
    elif isinstance(proposals, Sequence | np.ndarray | Tensor):
        options["boxes"] = [proposals] if one else proposals
    else:
        raise TypeError(
            "`proposals` must be 'grid', 'detector:NAME', 'sam:NAME', a callable or boxes, got "
            f"{None if proposals is None else type(proposals).__name__}."
        )
    results = model(opened, candidate_labels=labels, batch_size=batch_size, **options)
    return results[0] if one else results


def proposer_of(proposals: str | Callable) -> Any:
    """What proposes the regions of an RGB image: a callable itself, or the one that `"detector:NAME"` or `"sam:NAME"`
    names.

    Raises:
        ValueError: another name.
    """
    if not isinstance(proposals, str):
        return proposals
    kind, _, name = proposals.partition(":")
    if kind not in ("detector", "sam") or not name:
        raise ValueError(
            f"`proposals` must be 'grid', 'detector:NAME', 'sam:NAME', a callable or boxes, got {proposals!r}."
        )
    from .embedding.regions import DetectorProposer
    from .embedding.sam import SamProposer

    return DetectorProposer(name) if kind == "detector" else SamProposer(name)


def coco_results(
    detections: Iterable[Sequence[Detection]], image_ids: Sequence[int], category_ids: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Detections as COCO's results file holds them.

    Args:
        detections: those of each image.
        image_ids: the id of each image in the annotations.
        category_ids: the id of each label in the annotations.

    Returns:
        A dict per detection: `image_id`, `category_id`, `bbox` (xywh in pixels), `score` and, for one with a mask,
        `segmentation` (RLE).

    Raises:
        ValueError: not one id for each image, or a label without a category.
    """
    detections = list(detections)
    if len(detections) != len(image_ids):
        raise ValueError(f"`image_ids` must hold one id per image, got {len(image_ids)} for {len(detections)} images.")
    rows = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for entry in found:
            if entry["label"] not in category_ids:
                raise ValueError(f"`category_ids` must hold every label, and lacks {entry['label']!r}.")
            x0, y0, x1, y1 = (float(entry["box"][corner]) for corner in _CORNERS)
            row = {
                "image_id": int(image_id),
                "category_id": int(category_ids[entry["label"]]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(entry["score"]),
            }
            if (mask := entry.get("mask")) is not None:
                row["segmentation"] = mask if isinstance(mask, Mapping) else encode_rle(np.asarray(mask))
            rows.append(row)
    return rows


def save_coco_results(
    path: str | Path,
    detections: Iterable[Sequence[Detection]],
    image_ids: Sequence[int],
    category_ids: Mapping[str, int],
) -> None:
    """Writes [`coco_results`] as JSON, whole or not at all."""
    rows = coco_results(detections, image_ids, category_ids)
    write_utf8(path, json.dumps(rows))


def fit_temperature(logits: Tensor, labels: Tensor, steps: int = 100) -> float:
    """The temperature that makes the probabilities of regions with known labels as likely as can be (Guo et al. 2017),
    for `temperature=` of [`RegionDetectionPipeline`] with a model that was trained with a softmax.

    Args:
        logits (`(N, T)`): logit scale times cosine similarity of N regions to T texts, background texts included.
        labels (`(N,)`): the index of each region's text.
        steps: the most iterations of L-BFGS on the logarithm of the temperature.

    Raises:
        ValueError: no regions, or shapes that do not fit each other.
    """
    if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` must have shape (N, T) and `labels` (N,) with N > 0, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    logits, log_temperature = logits.double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_temperature.detach().exp())


__all__ = ["coco_results", "detect", "fit_temperature", "save_coco_results"]
