"""Batches of records whose texts are of about one length."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochLengthSampler(LengthGroupedSampler):
    """[`LengthGroupedSampler`] whose order follows from seed and epoch alone: the same on every rank, and again when a
    run goes on inside an epoch.

    Args:
        batch_size: records that are looked at together.
        lengths: the lengths of the texts of each record.
        seed: the seed of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called at the start of every epoch; `Trainer` and accelerate's data loaders do."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        # Two small numbers make one seed that no other pair of them makes.
        self.generator.manual_seed((self.seed << 20) + self.epoch)
        return super().__iter__()
