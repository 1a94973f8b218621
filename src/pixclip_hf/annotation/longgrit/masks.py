"""Masks of regions that only have a box, by a Segment Anything model of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...images import open_image
from ...processing.processing_regions import encode_rle
from ..stages import Batch, RowStage, add_counts, add_step, load_model, reject_region

_WITHOUT_TORCHVISION = ("sam", "sam_hq")
_WITH_TORCHVISION = ("sam2", "sam2_video")


@dataclass
class SamMasks(RowStage):
    """The model's best mask of each box, cut at the box. Masks that the source has stay.

    Args:
        model: folder or Hub id of SAM, SAM-HQ or, where torchvision is installed, SAM 2.
        batch_size: images per call; each goes through the model alone, with all its boxes.
    """

    model: str
    batch_size: int = field(default=8, repr=False, kw_only=True)

    name: ClassVar[str] = "masks"
    num_gpus: ClassVar[float] = 1

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            regions = [dict(region) for region in batch["regions"][row]]
            batch["regions"][row] = regions
            without = [region for region in regions if region["mask"] is None]
            add_counts(batch, row, self.name, {"masks of the source": len(regions) - len(without)})
            if not without:
                continue
            masks = self._segment(open_image(batch["image"][row]), [region["box"] for region in without])
            add_step(batch, row, self.name, self.model)
            for region, mask in zip(without, masks, strict=True):
                if mask.any():
                    region["mask"] = encode_rle(mask)
                    add_counts(batch, row, self.name, {"masks": 1})
                else:
                    reject_region(batch, row, region["id"], self.name, "empty mask")

    @torch.inference_mode()
    def _segment(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """Masks (R, H, W) bool of boxes (R, 4), xyxy in pixels."""
        model, processor = self._loaded
        given = [[[float(edge) for edge in box] for box in boxes]]
        inputs = processor(images=image, input_boxes=given, return_tensors="pt")
        sizes = {name: inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in inputs}
        outputs = model(
            pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
            input_boxes=inputs["input_boxes"].to(model.device, model.dtype),
        )
        # (R, 3, H, W) bool; the scores are what the model takes the masks' IoU to be.
        masks = processor.post_process_masks(outputs.pred_masks.float().cpu(), **sizes)[0]
        best = outputs.iou_scores[0].float().argmax(dim=-1).cpu()
        masks = masks[torch.arange(len(boxes)), best].numpy().astype(bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            inside = np.zeros_like(mask)
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            mask &= inside
        return masks

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor
        from transformers.utils import is_torchvision_available

        kind = AutoConfig.from_pretrained(self.model).model_type
        if kind not in (*_WITHOUT_TORCHVISION, *_WITH_TORCHVISION):
            raise ValueError(f"`model` must be a SAM, SAM-HQ or SAM 2, got {self.model!r}: {kind}.")
        if kind in _WITH_TORCHVISION and not is_torchvision_available():
            raise ModuleNotFoundError(f"`model` {self.model!r} is a SAM 2, which needs torchvision.")
        return load_model(AutoModelForMaskGeneration, self.model), AutoProcessor.from_pretrained(self.model)
