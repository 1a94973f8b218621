"""Geometry of regions against counted pixels and explicit loops."""

import math

import pytest
import torch

from pixclip_hf.modeling.modeling_regions import (
    box_cxcywh_to_xyxy,
    box_iou,
    generalized_box_iou,
    mask_patch_weights,
    patch_centers,
    roi_align,
    weighted_mean,
)


def random_boxes(*shape, seed=0):
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def bilinear(feature, x, y):
    """The value at pixel coordinates (x, y), whose whole numbers are cell centers, of a (rows, columns, D) map."""
    rows, columns = feature.shape[:2]
    x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
    left, top = min(int(x), columns - 2), min(int(y), rows - 2)
    dx, dy = x - left, y - top
    near = (1 - dx) * feature[top, left] + dx * feature[top, left + 1]
    far = (1 - dx) * feature[top + 1, left] + dx * feature[top + 1, left + 1]
    return (1 - dy) * near + dy * far


def roi_align_by_loops(tokens, box, grid, size, samples):
    feature = tokens.reshape(*grid, -1)
    x0, y0, x1, y1 = box.tolist()
    bins = []
    for i in range(size):
        for j in range(size):
            values = []
            for a in range(samples):
                for b in range(samples):
                    y = y0 + (y1 - y0) * (i + (a + 0.5) / samples) / size
                    x = x0 + (x1 - x0) * (j + (b + 0.5) / samples) / size
                    values.append(bilinear(feature, x * grid[1] - 0.5, y * grid[0] - 0.5))
            bins.append(torch.stack(values).mean(0))
    return torch.stack(bins)


@pytest.mark.parametrize(("size", "samples"), [(1, 1), (3, 2), (2, 3)])
def test_roi_align_equals_loops(size, samples):
    grid = (3, 5)
    tokens = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    boxes = random_boxes(2, 4)
    boxes[0, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes[1, 1] = torch.tensor([0.9, 0.0, 1.0, 0.05])
    pooled = roi_align(tokens, boxes, grid, size, samples)
    assert pooled.shape == (2, 4, size * size, 4)
    expected = torch.stack(
        [
            torch.stack([roi_align_by_loops(image, box, grid, size, samples) for box in image_boxes])
            for image, image_boxes in zip(tokens, boxes, strict=True)
        ]
    )
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
    got, wanted = (torch.autograd.grad((out * weights).sum(), tokens)[0] for out in (pooled, expected))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_roi_align_of_no_boxes():
    assert roi_align(torch.randn(2, 15, 4), torch.zeros(2, 0, 4), (3, 5), 7).shape == (2, 0, 49, 4)


def test_patch_centers():
    expected = [[(column + 0.5) / 3, (row + 0.5) / 2] for row in range(2) for column in range(3)]
    torch.testing.assert_close(patch_centers((2, 3)), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_mask_patch_weights_count_pixels(dtype):
    masks = (torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) > 0.7).to(dtype)
    weights = mask_patch_weights(masks, (2, 3))
    assert weights.shape == (2, 3, 6) and weights.dtype == torch.float32
    for index in range(6):
        row, column = divmod(index, 3)
        inside = masks[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        share = torch.tensor([[sum(map(float, mask.flatten())) / 16 for mask in image] for image in inside])
        torch.testing.assert_close(weights[..., index], share)


def test_a_single_pixel_is_never_lost():
    masks = torch.eye(1024, dtype=torch.bool).reshape(1024, 32, 32)
    weights = mask_patch_weights(masks, (2, 2))
    assert (weights.amax(-1) > 0).all() and ((weights > 0).sum(-1) == 1).all()
    tokens = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    pixel = torch.arange(1024)
    patch = pixel // 32 // 16 * 2 + pixel % 32 // 16
    torch.testing.assert_close(weighted_mean(tokens, weights[None])[0], tokens[0, patch])


def test_weighted_mean_equals_loops():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, generator=generator).requires_grad_()
    weights = torch.rand(2, 4, 5, generator=generator)
    weights[1, 2] = 0
    means = weighted_mean(tokens, weights)
    expected = torch.zeros(2, 4, 3)
    for b in range(2):
        for r in range(4):
            total = sum(weights[b, r].tolist())
            for n in range(5):
                expected[b, r] += weights[b, r, n] * tokens[b, n].detach() / (total or 1)
    torch.testing.assert_close(means, expected)
    assert means[1, 2].abs().max() == 0
    means.sum().backward()
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(tokens.grad, shares.sum(1)[..., None].expand(-1, -1, 3))


def count_pixels(box, other, side=20):
    """IoU and GIoU of boxes on whole pixels, by counting."""
    corners = [[round(side * value) for value in b] for b in (box, other)]
    covers = [{(x, y) for x in range(x0, x1) for y in range(y0, y1)} for x0, y0, x1, y1 in corners]
    union, shared = covers[0] | covers[1], covers[0] & covers[1]
    columns, rows = ([pixel[axis] for pixel in union] for axis in (0, 1))
    hull = (max(columns) - min(columns) + 1) * (max(rows) - min(rows) + 1)
    iou = len(shared) / len(union)
    return iou, iou - (hull - len(union)) / hull


def test_iou_and_giou_count_pixels():
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 19, (60, 2), generator=generator)
    boxes = torch.cat([start, start + 1 + (torch.rand(60, 2, generator=generator) * (19 - start)).long()], -1) / 20
    other = boxes.roll(1, 0)
    other[0] = boxes[0]
    expected = torch.tensor([count_pixels(a, b) for a, b in zip(boxes.tolist(), other.tolist(), strict=True)])
    torch.testing.assert_close(box_iou(boxes, other), expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(generalized_box_iou(boxes, other), expected[:, 1], atol=1e-5, rtol=1e-5)
    assert expected[0].tolist() == [1, 1] and expected[:, 1].min() < -0.3 and (expected[:, 0] > 0).sum() > 10


def test_empty_boxes_are_finite():
    nothing = torch.zeros(1, 4, requires_grad=True)
    assert box_iou(nothing, torch.zeros(1, 4)) == 0
    giou = generalized_box_iou(nothing, torch.tensor([[0.2, 0.2, 0.8, 0.8]]))
    giou.sum().backward()
    assert math.isfinite(giou.item()) and nothing.grad.isfinite().all()


def test_box_cxcywh_to_xyxy():
    boxes = torch.tensor([[[0.5, 0.4, 0.2, 0.6]]])
    torch.testing.assert_close(box_cxcywh_to_xyxy(boxes), torch.tensor([[[0.4, 0.1, 0.6, 0.7]]]))
