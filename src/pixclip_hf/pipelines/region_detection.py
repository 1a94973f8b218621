"""The `zero-shot-region-detection` pipeline: proposals of an image, each named by one of several labels or by none."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from transformers import Pipeline

from .region_feature_extraction import given_parameters, image_item, is_one_image
from .zero_shot_region_classification import (
    ZeroShotRegionClassificationPipeline,
    check_range,
    check_top_k,
    checked_labels,
)

GRID = (1, 3, 7)
BACKGROUND = ("background",)
_KEYS = ("boxes", "masks")


class RegionDetectionPipeline(ZeroShotRegionClassificationPipeline):
    """Names the objects of an image: regions come from proposals, names from texts.

    A CLOC embeds all proposals of an image in one pass, and so does a PixCLIP with `mode="pooled"`.

    ```python
    detect = pipeline("zero-shot-region-detection", model="org/cloc")
    detect(image, candidate_labels=["a cat", "a remote"], boxes=boxes, threshold=0.3)
    ```
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Names objects.

        Args:
            inputs: an image (path, URL, PIL image, array or tensor), a dict `{"image": ..., "boxes": ...}` or
                `{"image": ..., "masks": ...}`, or a list, generator or dataset of either.
            candidate_labels (`list[str]`), hypothesis_template, text_states, mode, batch_size, num_workers: as in
                [`ZeroShotRegionClassificationPipeline`]; the rows of `background` come last in `text_states`.
            boxes, masks, box_format, normalized, prompt: given proposals, as in [`RegionFeatureExtractionPipeline`].
            proposals: where proposals come from if none are given: `"grid"`, windows that overlap by half, 1, 3 and 7
                along either side (default); or what takes an RGB image and returns a list of
                `{"box": [x0, y0, x1, y1] in pixels, "mask": in any form that the processor reads (optional), "score":
                float (optional)}`. A score beyond [0, 1], as SAM's estimates of an IoU may be, counts as the nearer of
                the two.
            background (`list[str]`): texts of what is no object; `["background"]` by default. They take their share of
                a region's probability and are never reported.
            temperature (`float`): divides the logits before the softmax; 1 by default, the model's own temperature.
                Of a model that was trained with a sigmoid, a score is the sigmoid of a label's own logit.
            proposal_weight (`float`): w in [0, 1]; a score is `probability^(1 - w) * proposal score^w`. 0 by default,
                where the scores of proposals do not count.
            threshold (`float`): least score, 0.1 by default.
            nms_iou (`float`): of two boxes of one label that overlap by more than this IoU the better one stays; 0.5
                by default, 1 keeps both.
            top_k (`int`): most detections of an image; 100 by default.
            return_masks (`bool`): adds `"mask"`, the proposal's own, for proposals that have one.

        Returns:
            For one image, a list of dicts `{"score": float, "label": str, "box": {"xmin", "ymin", "xmax", "ymax"} in
            pixels of the original image}`, best first, one for each region and label; for a list of images a list of
            those; for a generator or dataset an iterator over them. An image without proposals has an empty list.

        Raises:
            OSError, TypeError, ValueError: labels that are missing, empty, given twice or among `background`, an
                option beyond its range, unknown proposals, or regions that do not fit their image. The message names
                the image of a list, generator or dataset by its index.
        """
        if "candidate_labels" not in kwargs and "candidate_labels" not in self._forward_params:
            raise ValueError("`candidate_labels` must be a list of texts, got none.")
        if is_one_image(inputs):
            return Pipeline.__call__(self, inputs, **kwargs)
        regions = {name: kwargs.pop(name) for name in _KEYS if kwargs.get(name) is not None}
        return self.call_on_many(inputs, regions, _proposed_item, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: list[str] | None = None,
        proposals: str | Callable[[Any], Sequence[Mapping[str, Any]]] | None = None,
        background: list[str] | None = None,
        temperature: float | None = None,
        proposal_weight: float | None = None,
        threshold: float | None = None,
        nms_iou: float | None = None,
        top_k: int | None = None,
        return_masks: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if proposals is not None and proposals != "grid" and not callable(proposals):
            raise ValueError(f"`proposals` must be 'grid' or callable, got {proposals!r:.80}.")
        for name, value in (("threshold", threshold), ("nms_iou", nms_iou), ("proposal_weight", proposal_weight)):
            check_range(name, value, 0)
        check_range("temperature", temperature, float("-inf"), float("inf"))
        if temperature is not None and not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` must be a positive number, got {temperature}.")
        if top_k is not None:
            check_top_k(top_k)
        if kwargs.get("points") is not None or kwargs.get("point_labels") is not None:
            raise ValueError("`points` must be None: they have no boxes to report. Pass masks of `masks_from_points`.")
        labels = None
        if candidate_labels is not None:
            labels = checked_labels(candidate_labels)
            others = _checked_background(BACKGROUND if background is None else background)
            if shared := [label for label in labels if label in others]:
                raise ValueError(f"`background` must not hold a candidate label, got {shared[0]!r}.")
            candidate_labels = [*labels, *others]
        elif background is not None:
            raise ValueError("`background` goes with `candidate_labels`, got it alone.")
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(
            candidate_labels=candidate_labels, **kwargs
        )
        preprocess_params |= given_parameters({"proposals": proposals})
        postprocess_params |= given_parameters(
            {
                "candidate_labels": labels,
                "temperature": temperature,
                "proposal_weight": proposal_weight,
                "threshold": threshold,
                "nms_iou": nms_iou,
                "top_k": top_k,
                "return_masks": return_masks,
            }
        )
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, inputs: Any, proposals: Any = "grid", **kwargs: Any) -> dict[str, Any]:
        item = _proposed_item(inputs, **{name: kwargs.pop(name, None) for name in _KEYS})
        if any(item.get(name) is not None for name in _KEYS):
            given = [{} for _ in next(item[name] for name in _KEYS if item.get(name) is not None)]
            # Other counts of boxes and masks are the processor's to refuse.
            for proposal, mask in zip(given, item["masks"] if item.get("masks") is not None else (), strict=False):
                proposal["mask"] = mask
        elif proposals == "grid":
            # Fractions, so that any image that the processor reads will do.
            item["boxes"] = grid_boxes(1, 1)
            given = [{} for _ in item["boxes"]]
            kwargs |= {"normalized": True, "box_format": "xyxy"}
        else:
            # As the processor reads it: the proposals are in the frame of these pixels.
            item["image"] = self.processor.image_processor.read_image(item["image"])
            given = _checked_proposals(proposals(item["image"]), item["image"].size)
            item["boxes"] = [proposal["box"] for proposal in given]
            kwargs |= {"normalized": False, "box_format": "xyxy"}
            masks = [proposal.get("mask") for proposal in given]
            if given and all(mask is not None for mask in masks):
                item["masks"] = masks
                kwargs.setdefault("prompt", self.model.config.prompts[0])
        processed = super().preprocess(item, **kwargs)
        processed["regions"] = [
            [{**region, **_kept(proposal)} for region, proposal in zip(processed["regions"][0], given, strict=True)]
        ]
        return processed

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        candidate_labels: tuple[str, ...],
        temperature: float = 1.0,
        proposal_weight: float = 0.0,
        threshold: float = 0.1,
        nms_iou: float = 0.5,
        top_k: int = 100,
        return_masks: bool = False,
    ) -> list[dict[str, Any]]:
        logits, regions = self.split_outputs(model_outputs)
        if not regions:
            return []
        scores = self.label_scores(logits / temperature)[:, : len(candidate_labels)]
        if proposal_weight:
            proposed = torch.tensor([region.get("proposal_score", 1.0) for region in regions])[:, None]
            scores = scores ** (1 - proposal_weight) * proposed**proposal_weight
        boxes = torch.tensor([list(region["box"].values()) for region in regions], dtype=torch.float32)
        found = []
        for row, number in best_labels(boxes, scores, threshold, nms_iou, top_k):
            entry = {
                "score": float(scores[row, number]),
                "label": candidate_labels[number],
                "box": regions[row]["box"],
            }
            if return_masks and "mask" in regions[row]:
                entry["mask"] = regions[row]["mask"]
            found.append(entry)
        return found


def best_labels(
    boxes: torch.Tensor, scores: torch.Tensor, threshold: float, iou: float, most: int
) -> list[tuple[int, int]]:
    """The best detections of an image, as pairs of a row and a label, best first: what [`class_nms`] leaves of each
    label.

    Args:
        boxes (`(R, 4)`): xyxy.
        scores (`(R, T)`): of each label.
        threshold, iou: as in [`class_nms`].
        most: how many there are at most.
    """
    overlapping = box_overlaps(boxes) > iou
    found = [(row, label) for label, own in enumerate(scores.T) for row in _suppressed(overlapping, own, threshold)]
    values = scores.tolist()
    return sorted(found, key=lambda pair: -values[pair[0]][pair[1]])[:most]


def class_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, iou: float) -> list[int]:
    """Rows of the boxes `(N, 4)`, xyxy, of one label that score `threshold` or more and overlap no better one by more
    than `iou`; best first."""
    return _suppressed(box_overlaps(boxes) > iou, scores, threshold)


def _suppressed(overlapping: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """As [`class_nms`], where `overlapping` `(N, N)` says which boxes overlap by too much."""
    order = torch.argsort(scores, descending=True, stable=True)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    kept: list[int] = []
    for row in order[scores[order] >= threshold].tolist():
        if not gone[row]:
            kept.append(row)
            gone |= overlapping[row]
    return kept


def box_overlaps(boxes: torch.Tensor) -> torch.Tensor:
    """IoU `(N, N)` of boxes `(N, 4)`, xyxy, with each other."""
    sides = (torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])).clamp(
        0
    )
    shared, areas = sides.prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas[:, None] + areas - shared).clamp(min=1e-9)


def grid_boxes(width: float, height: float, counts: Sequence[int] = GRID) -> list[list[float]]:
    """Windows that overlap by half, for each of `counts` as many along either side; 1 is the whole image."""
    boxes = []
    for count in counts:
        side = 2 / (count + 1)
        steps = [side / 2 * step for step in range(count)]
        boxes += [[x * width, y * height, (x + side) * width, (y + side) * height] for y in steps for x in steps]
    return boxes


def _checked_background(background: Any) -> list[str]:
    if isinstance(background, str) or not all(isinstance(text, str) for text in background):
        raise TypeError(f"`background` must be a list of texts, got {background!r:.80}.")
    if empty := [i for i, text in enumerate(background) if not text.strip()]:
        raise ValueError(f"`background[{empty[0]}]` must not be empty, got {background[empty[0]]!r}.")
    if len(set(background)) < len(background):
        raise ValueError(f"`background` must hold texts that differ from each other, got {background!r:.80}.")
    return list(background)


def _checked_proposals(found: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What a callable proposed for an image of `(width, height)`, as dicts with a box each. The processor checks what
    prompts; a mask beside a box that prompts is only reported."""
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        raise TypeError(f"`proposals` must return a list of dicts with a box, got a {type(found).__name__}.")
    checked = []
    for number, proposal in enumerate(found):
        if not isinstance(proposal, Mapping) or proposal.get("box") is None:
            raise TypeError(f"`proposals` must return dicts with a box, got {proposal!r:.80} at {number}.")
        score = proposal.get("score")
        if score is not None and not (isinstance(score, Real) and score == score):
            raise ValueError(f"`proposals` must return scores that are numbers, got {score!r:.80} at {number}.")
        mask = proposal.get("mask")
        shape = mask.get("size") if isinstance(mask, Mapping) else getattr(mask, "shape", None)
        if shape is not None and tuple(shape)[-2:] != size[::-1]:
            raise ValueError(
                f"`proposals` must return masks of the image's size {size[::-1]}, got {tuple(shape)} at {number}."
            )
        checked.append(dict(proposal))
    return checked


def _kept(proposal: Mapping[str, Any]) -> dict[str, Any]:
    """What detections or their scores take of a proposal."""
    score = proposal.get("score")
    kept = {} if score is None else {"proposal_score": min(max(float(score), 0.0), 1.0)}
    return kept if proposal.get("mask") is None else {**kept, "mask": proposal["mask"]}


def _proposed_item(image: Any, **given: Any) -> dict[str, Any]:
    return image_item(image, _KEYS, **given)


__all__ = ["RegionDetectionPipeline", "best_labels", "box_overlaps", "class_nms", "grid_boxes"]
