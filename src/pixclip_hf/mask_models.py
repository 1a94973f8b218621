"""Masks of points by a mask model of transformers: what a PixCLIP, or a CLOC without points, is prompted with."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from .encoders.preparation import as_images
from .images import open_image
from .processing.processing_points import Points, read_points

# By `model_type`; SAM 2's image processor needs torchvision.
MASK_MODELS = {"sam": "SAM", "sam_hq": "SAM-HQ", "sam2": "SAM 2"}


class MaskModel:
    """A Segment Anything model (arXiv 2304.02643) that is asked for the masks of points.

    Args:
        model: SAM, SAM-HQ or SAM 2 of transformers; moved to evaluation mode.
        processor: its processor.

    Raises:
        ValueError: a model of another family.
    """

    def __init__(self, model: Any, processor: Any):
        _check_family(model.config.model_type, type(model).__name__)
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, name: str, device: str | torch.device | None = None, **kwargs: Any) -> "MaskModel":
        """A saved mask model.

        Args:
            name: Hub id or folder.
            device: where it goes; the accelerator when None, if there is one.
            kwargs: other arguments of `AutoModelForMaskGeneration.from_pretrained`, such as `dtype` and `revision`.

        Raises:
            ValueError: a model of another family.
            ImportError: SAM 2 without torchvision.
        """
        from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor

        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        _check_family(AutoConfig.from_pretrained(name, **hub).model_type, name)
        if device is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = AutoModelForMaskGeneration.from_pretrained(name, **({"dtype": "auto"} | kwargs)).to(device)
        return cls(model, AutoProcessor.from_pretrained(name, **hub))

    @torch.inference_mode()
    def masks_of(self, image: Image.Image, regions: Points) -> list[np.ndarray]:
        """The mask (H, W) bool of each region of an image, from one image pass.

        Args:
            image: RGB.
            regions: its regions, all of which have points.

        Raises:
            ValueError: the model finds no pixel for a region.
        """
        states: dict[str, Any] | None = None
        masks: dict[int, np.ndarray] = {}
        counts = [len(row[1]) for row in regions.rows if row is not None]
        # Regions of as many points share a pass of the decoder: padded points would need a label that SAMs differ in.
        for count in sorted(set(counts)):
            chosen = [number for number, other in enumerate(counts) if other == count]
            rows = [regions.rows[number] for number in chosen]
            prompts = {
                "input_points": [[row[0].tolist() for row in rows if row is not None]],
                "input_labels": [[row[1].tolist() for row in rows if row is not None]],
            }
            inputs = self.processor(images=image, **prompts, return_tensors="pt")
            if states is None:
                states = image_states(self.model, inputs["pixel_values"])
            points = inputs["input_points"].to(self.model.device, self.model.dtype)
            outputs = self.model(**states, input_points=points, input_labels=inputs["input_labels"].to(points.device))
            sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
            low = outputs.pred_masks.float().cpu()
            large = self.processor.post_process_masks(low, *sizes)[0].numpy().astype(bool)
            order = outputs.iou_scores[0].float().cpu().argsort(dim=-1, descending=True).tolist()
            for number, candidates, best in zip(chosen, large, order, strict=True):
                found = next((candidates[i] for i in best if candidates[i].any()), None)
                if found is None:
                    raise ValueError(f"{regions.names[number]}: the mask model finds no pixel for these points")
                masks[number] = found
        return [masks[number] for number in range(len(counts))]


def masks_from_points(
    mask_model: str | os.PathLike | MaskModel, images: Any, points: Any, point_labels: Any = None
) -> list[np.ndarray] | list[list[np.ndarray]]:
    """The masks of regions that are given by points, for `masks=` of a processor, pipeline or encoder.

    Of the masks that the model offers for a region, the one that it is surest of counts.

    Args:
        mask_model: a [`MaskModel`], or the Hub id or folder of one, which is then loaded for this call.
        images: an image in any form of `open_image`, or a list of images.
        points: the points of each region, nested as in SAM: for one image R regions of P points `[x, y]` each in
            pixels, where P may differ; for a list of images a list of those.
        point_labels: nested alike, 1 for a point on the region, 0 for one beside it; all 1 when None.

    Returns:
        For one image R masks (H, W) bool; for a list of images a list of those.

    Raises:
        TypeError, ValueError: a mask model of another family, bad points (see `read_points`), or points that the model
            finds no pixel for.
        ImportError: SAM 2 without torchvision.
    """
    if not isinstance(mask_model, str | os.PathLike | MaskModel):
        raise TypeError(f"`mask_model` must be a Hub id, a folder or a MaskModel, got a {type(mask_model).__name__}.")
    items, one = as_images(images)
    opened = [open_image(image) for image in items]
    sizes = [(image.height, image.width) for image in opened]
    read = read_points(points, point_labels, sizes, batched=not one)
    for entry in read:
        if not all(entry.given):
            raise ValueError(f"{entry.names[int(np.argmin(entry.given))]} must hold points, got None")
    model = mask_model if isinstance(mask_model, MaskModel) else MaskModel.from_pretrained(os.fspath(mask_model))
    masks = [model.masks_of(image, entry) for image, entry in zip(opened, read, strict=True)]
    return masks[0] if one else masks


def image_states(model: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    """What a SAM has seen of an image, as its `forward` takes it in place of the pixels."""
    seen = model.get_image_embeddings(pixel_values.to(model.device, model.dtype))
    # SAM-HQ gives states of inner layers beside them; SAM 2 a list, one entry per scale, of which it is one argument.
    if model.config.model_type == "sam_hq":
        return {"image_embeddings": seen[0], "intermediate_embeddings": seen[1]}
    return {"image_embeddings": seen}


def _check_family(model_type: str, name: str) -> None:
    if model_type not in MASK_MODELS:
        raise ValueError(f"`mask_model` must be a {', '.join(MASK_MODELS.values())}, got {name!r}: {model_type}.")


__all__ = ["MaskModel", "masks_from_points"]
