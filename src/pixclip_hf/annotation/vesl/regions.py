"""The regions of a record, out of the detections."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ...data.sources import IDS_PER_IMAGE
from ..stages import Batch, RowStage, add_counts

REGION_TEXTS = ("phrase", "sentence")


@dataclass
class VeslRegions(RowStage):
    """Last stage: the detections become the record's regions, those of the source go, and the new caption comes first.
    In the baseline, which has no new caption, the alt text is used where the source has no caption.

    Args:
        region_text: `"phrase"`, or `"sentence"` for the sentence of the caption that the phrase stands in.
        max_regions: most regions of an image, the best scores.
        batch_size: images per call.
    """

    region_text: str = "phrase"
    max_regions: int = 32
    batch_size: int = field(default=256, repr=False, kw_only=True)

    name: ClassVar[str] = "regions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.region_text not in REGION_TEXTS:
            raise ValueError(f"`region_text` must be one of {', '.join(REGION_TEXTS)}, got {self.region_text!r}.")
        if not 1 <= self.max_regions <= IDS_PER_IMAGE:
            raise ValueError(f"`max_regions` must lie between 1 and {IDS_PER_IMAGE}, got {self.max_regions}.")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        new_captions = batch.get("vesl_caption")  # the baseline has none
        text = "text" if self.region_text == "phrase" else "sentence"
        for row in rows:
            detections = batch["vesl_detections"][row]
            candidates = batch["vesl_candidates"][row]
            first_id = batch["position"][row] * IDS_PER_IMAGE
            batch["regions"][row] = [
                {
                    "id": first_id + i,
                    "box": detection["box"],
                    "mask": None,
                    "category": None,
                    "caption": candidates[detection["candidate"]][text],
                    "long_caption": None,
                    "score": detection["score"],
                    "source": "vesl",
                }
                for i, detection in enumerate(detections[: self.max_regions])
            ]
            if new_captions is not None:
                others = (caption for caption in batch["captions"][row] if caption != new_captions[row])
                batch["captions"][row] = [new_captions[row], *others]
            elif not batch["captions"][row]:
                batch["captions"][row] = [batch["alt_text"][row]]
            dropped = max(len(detections) - self.max_regions, 0)
            counts = {"regions": len(batch["regions"][row]), "dropped: above the limit of an image": dropped}
            add_counts(batch, row, self.name, counts)
