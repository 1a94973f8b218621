"""How much a training run gets through: images, regions and text tokens per second."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TEXT_MASKS = ("attention_mask", "region_text_attention_mask")


class Throughput:
    """Counts batches between two logs.

    The clock starts with the first batch behind a log, so that an evaluation or a checkpoint in between is not held
    against the training. Counts stay on the device until they are read.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start: float | None = None
        self._counts: list[Tensor] = []

    def count(self, batch: Mapping[str, Any]) -> None:
        """Counts a batch on its way into the model: padding is neither a region nor a token."""
        if self._start is None:
            self._start = time.perf_counter()
        regions = batch.get("region_attention_mask")
        tokens = [batch[name].sum() for name in TEXT_MASKS if batch.get(name) is not None]
        counts = (
            len(batch["pixel_values"]),
            0 if regions is None else regions.sum(),
            sum(tokens),
            _images_without_text(batch),
        )
        self._counts.append(
            torch.stack([torch.as_tensor(count, device=batch["pixel_values"].device) for count in counts])
        )

    def rates(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`images_per_second`, `regions_per_second` and `tokens_per_second` since the last call, and how many images
        had neither a region nor a caption, `images_without_text`; nothing without a batch. Zeros are left out.

        Args:
            over_ranks: sums a tensor over the ranks.
        """
        if self._start is None or not self._counts:
            return {}
        totals = over_ranks(torch.stack(self._counts).sum(0)).tolist()
        seconds = time.perf_counter() - self._start
        self._reset()
        *totals, without_text = totals
        names = ("images_per_second", "regions_per_second", "tokens_per_second")
        rates = {name: total / seconds for name, total in zip(names, totals, strict=True) if total}
        return rates | ({"images_without_text": without_text} if without_text else {})


def _images_without_text(batch: Mapping[str, Any]) -> Tensor | int:
    """Images of a batch that have neither a region nor a caption."""
    regions = batch.get("region_attention_mask")
    # Padding throughout, or a state of zeros, stands for a caption that is missing.
    captions = batch.get("attention_mask") if batch.get("text_states") is None else batch["text_states"]
    if regions is None or (captions is None and "input_ids" in batch):
        return 0
    bare = ~regions.bool().any(-1)
    if captions is not None:
        bare = bare & ~(captions != 0).any(-1)
    return bare.sum()
