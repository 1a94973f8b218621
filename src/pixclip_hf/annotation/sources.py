"""The first stage of every annotation: a source's items as checked records, or rejected with their reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data.sources import AnnotatedImage, cached_source
from ..data.sources.records import clean_text, clean_texts, read_image, read_regions
from ..images import store_image
from ..record import LeftOut, foreign
from .stages import Batch, add_counts, open_batch, reject


def read_record(item: AnnotatedImage, kind: str) -> tuple[dict[str, Any], Counter]:
    """An item of a source as a record with its encoded image, and how much of the item was left out, by reason.

    Args:
        item: an item of a source.
        kind: the kind of the source.

    Raises:
        LeftOut: an image that is missing, can't be decoded, or has another size than its annotations speak of.
    """
    # Decoded once, so that no later stage meets a bad one.
    data, _, size = read_image(item)
    with foreign("image not readable"):
        data, _ = store_image(data)
    regions, counts = read_regions(item, size, kind)
    record = {
        "image": {"bytes": data, "path": None},
        "width": size[0],
        "height": size[1],
        "captions": clean_texts(item.captions, counts),
        "alt_text": clean_text(item.alt_text),
        "regions": regions,
    }
    return record, counts


@dataclass
class ReadRecords:
    """First stage of every pipeline: fills the rows, of which only `position` is known, from the source.

    Args:
        source: name of the source, or its words, as in [`open_source`].
        batch_size: images read per call.
    """

    source: str | tuple[str, ...]
    batch_size: int = field(default=16, repr=False)

    name: ClassVar[str] = "source"
    columns: ClassVar[Mapping[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        source = cached_source(self.source)
        for row, position in enumerate(batch["position"]):
            batch["record_id"][row] = source.item_name(position)
            try:
                with foreign("annotation not readable", detail=True):
                    item = source.read(position)
                    batch["record_id"][row] = item.name
                    record, counts = read_record(item, source.kind)
            except LeftOut as error:
                reject(batch, row, self.name, str(error))
            else:
                for name, value in record.items():
                    batch[name][row] = value
                add_counts(batch, row, self.name, counts)
        return batch
