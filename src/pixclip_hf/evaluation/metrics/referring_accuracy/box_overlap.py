"""Intersection over union of boxes."""

import numpy as np


def pairwise_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `(N, 4)` and `(M, 4)`, xyxy: `(N, M)`; 0 for two empty boxes, and for a box
    with an edge that is not finite."""
    boxes, others = (_without_faults(np.asarray(side, dtype=np.float64)) for side in (boxes, others))
    overlap = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    intersection = np.clip(overlap, 0, None).prod(-1)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(-1) for box in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return intersection / np.maximum(union, 1e-9)


def _without_faults(boxes: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(boxes).all(-1, keepdims=True), boxes, 0)
