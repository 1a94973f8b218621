"""What prompts the regions of a CLOC: the boxes, masks or points of a batch, checked and chosen."""

from typing import Any, NamedTuple

from torch import Tensor

from .configuration_cloc import CLOCConfig
from .configuration_region_text import check_choice
from .modeling_patches import ImageTokens
from .modeling_points import point_slots
from .modeling_regions import box_coverage, mask_boxes, mask_patch_weights
from .modeling_slots import real_slots


class PromptedRegions(NamedTuple):
    """The regions of a batch in the form that prompts: boxes (B, R, 4) or masks (B, R, H, W), in their place or alone
    points (B, R, P, 2) with labels (B, R, P), and which slots hold a region, (B, R) bool."""

    boxes: Tensor | None
    masks: Tensor | None
    is_real: Tensor
    points: Tensor | None = None
    point_labels: Tensor | None = None

    def on_images(self, images: Any, grid: tuple[int, int], tokens: ImageTokens) -> "PromptedRegions":
        """The regions of some of the images that the tokens are of, which have this grid."""
        masks = None if self.masks is None else tokens.masks_on(images, grid, self.masks)
        of_images = (None if value is None else value[images] for value in self._replace(masks=None))
        return PromptedRegions(*of_images)._replace(masks=masks)

    def get_coverage(self, grid: tuple[int, int]) -> Tensor:
        """(B, R, N): share of each patch that lies inside the region."""
        return box_coverage(self.boxes, grid) if self.masks is None else mask_patch_weights(self.masks, grid)

    def get_boxes(self) -> Tensor:
        """(B, R, 4), xyxy in [0, 1]: the boxes, or the tight ones of the masks."""
        return mask_boxes(self.masks) if self.boxes is None else self.boxes


def prompted_regions(
    config: CLOCConfig,
    pixel_values: Tensor,
    mask_size: tuple[int, ...],
    region_boxes: Tensor | None,
    region_attention_mask: Tensor | None,
    region_masks: Tensor | None,
    prompt: str | None,
    region_points: Tensor | None,
    region_point_labels: Tensor | None,
) -> PromptedRegions:
    """What prompts the regions of a batch: as said, or what is given.

    Args:
        mask_size: (H, W) that masks must have.

    The other arguments and errors: see [`CLOCModel.get_region_features`].
    """
    has_points = region_points is not None or region_point_labels is not None
    if has_points and not config.prompter_points:
        raise ValueError(
            "`region_points` needs a CLOC with `config.prompter_points=True`, got False. A mask model makes masks "
            "of points: see `masks_from_points`."
        )
    if prompt is not None:
        check_choice("prompt", prompt, config.prompts)
        kinds = [prompt]
    elif region_boxes is not None and region_masks is not None:
        raise ValueError(
            "`prompt` must be 'box' or 'mask' where both `region_boxes` and `region_masks` are given, got None."
        )
    else:
        given = {"box": region_boxes is not None, "mask": region_masks is not None, "point": has_points}
        kinds = [kind for kind, is_given in given.items() if is_given] or ["box"]
    of_batch = region_attention_mask, pixel_values
    slots = []
    if "box" in kinds:
        slots.append(real_slots("region_boxes", region_boxes, *of_batch, trailing=(4,)))
    if "mask" in kinds:
        slots.append(real_slots("region_masks", region_masks, *of_batch, mask_size))
    if "point" in kinds:
        slots.append(point_slots(region_points, region_point_labels, *of_batch, alone=kinds == ["point"]))
    if slots[0].shape != slots[-1].shape:
        raise ValueError(
            f"`region_points` must have as many region slots as the boxes or masks, {tuple(slots[0].shape)}, got "
            f"{tuple(slots[-1].shape)}."
        )
    by_point = "point" in kinds
    return PromptedRegions(
        region_boxes if "box" in kinds else None,
        region_masks if "mask" in kinds else None,
        slots[0],
        region_points if by_point else None,
        region_point_labels if by_point else None,
    )
