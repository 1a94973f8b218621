"""Regions of everything in an image, by a Segment Anything model that is asked at a grid of points."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..mask_models import MaskModel, image_states
from ..pipelines.region_detection import class_nms
from ..processing.processing_regions import encode_rle, mask_box
from .regions import Region, new_region

_KINDS = ("sam", "sam_hq")  # others need torchvision
_POINTS_PER_CALL = 64
_MASKS_PER_CALL = 8  # laid out at the size of the image


@dataclass
class SamProposer:
    """Masks of a Segment Anything model (arXiv 2304.02643, section "Segment anything"): the best mask of each point of
    a grid, if the model is sure of it and no better one covers the same box.

    Args:
        model: folder or Hub id of SAM or SAM-HQ.
        points: points per side of the grid.
        threshold: least IoU that the model takes a mask to have.
        nms_iou: a mask whose box overlaps that of a better one by more than this IoU is dropped.
        min_area: least share of the image.
    """

    model: str
    points: int = 16
    threshold: float = 0.88
    nms_iou: float = field(default=0.7)
    min_area: float = field(default=0.001)

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"`points` must be at least 1, got {self.points}.")

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> list[Region]:
        model, processor = self._loaded
        steps = (np.arange(self.points) + 0.5) / self.points
        grid = [[float(x * image.width), float(y * image.height)] for y in steps for x in steps]
        inputs = processor(images=image, input_points=[[[point] for point in grid]], return_tensors="pt")
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
        seen = image_states(model, inputs["pixel_values"])
        low, scores = [], []
        for points in inputs["input_points"].to(model.device, model.dtype).split(_POINTS_PER_CALL, dim=1):
            outputs = model(**seen, input_points=points)
            best = outputs.iou_scores[0].float().argmax(-1)
            rows = torch.arange(len(best), device=best.device)
            low.append(outputs.pred_masks[0][rows, best].float().cpu())
            scores.append(outputs.iou_scores[0][rows, best].float().cpu())
        masks, found = torch.cat(low), torch.cat(scores)
        kept = self._kept(masks, found, sizes["reshaped_input_sizes"][0].tolist(), processor)
        regions = []
        for part in kept.split(_MASKS_PER_CALL):
            if not len(part):
                continue
            large = processor.post_process_masks(masks[part][None, :, None], **sizes)[0][:, 0].numpy().astype(bool)
            for mask, score in zip(large, found[part].tolist(), strict=True):
                if mask.sum() >= max(1, self.min_area * mask.size):
                    box = mask_box(mask).tolist()
                    regions.append(new_region(len(regions), box, mask=encode_rle(mask), score=score))
        return regions

    def _kept(self, masks: torch.Tensor, scores: torch.Tensor, shown: list[int], processor: Any) -> torch.Tensor:
        """Indices of the masks `(N, h, w)` that stay, the surest first."""
        # The image takes the upper left corner of the square that the masks are a small version of.
        side = max(processor.image_processor.pad_size["height"], processor.image_processor.pad_size["width"])
        height, width = (max(1, round(edge * masks.shape[-1] / side)) for edge in shown)
        inside = (masks > 0)[:, :height, :width].numpy()
        found = [i for i, mask in enumerate(inside) if mask.any()]
        boxes = torch.tensor([mask_box(inside[i]).tolist() for i in found], dtype=torch.float32).reshape(-1, 4)
        rows = torch.tensor(found, dtype=torch.int64)
        return rows[class_nms(boxes, scores[rows], self.threshold, self.nms_iou)]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(self.model).model_type
        if kind not in _KINDS:
            raise ValueError(f"`model` must be a SAM or SAM-HQ, got {self.model!r}: {kind}.")
        loaded = MaskModel.from_pretrained(self.model)
        return loaded.model, loaded.processor

    def __getstate__(self) -> dict[str, Any]:
        # Without the model, which each process loads.
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}
