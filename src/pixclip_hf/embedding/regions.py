"""Where the regions of a collection come from: annotations, a grid of windows, a detector, or SAM."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..data.sources import AnnotatedImage, cached_source
from ..data.sources.records import read_image, read_regions
from ..data.whole_files import read_unchanged, whole_file
from ..jobs import Shard, between_path
from ..pipelines.region_detection import grid_boxes
from ..record import LeftOut, foreign, record_features

Region = dict[str, Any]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Annotations:
    """The regions that the source itself has."""

    def read(
        self, shard: int, position: int, item: AnnotatedImage, kind: str, size: tuple[int, int]
    ) -> tuple[list[Region], Counter]:
        """The regions of an image, and how much of its annotations was left out, by reason."""
        regions, counts = read_regions(item, size, kind)
        del counts["regions"]
        return regions, counts


@dataclass(frozen=True)
class Grid:
    """Windows that overlap by half.

    Args:
        counts: windows per side of an image; each number is a size of window, 1 the whole image.

    Raises:
        ValueError: no number, or one below 1.
    """

    counts: tuple[int, ...] = (1, 3, 7)

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"`grid` must hold numbers from 1 on, got {list(self.counts)}.")

    def read(
        self, shard: int, position: int, item: AnnotatedImage, kind: str, size: tuple[int, int]
    ) -> tuple[list[Region], Counter]:
        """As [`Annotations.read`]."""
        return [new_region(number, box) for number, box in enumerate(grid_boxes(*size, self.counts))], Counter()


@dataclass(frozen=True)
class Proposals:
    """What a [`ProposalPass`] found.

    Args:
        output: folder of the run; repr: what found them, for the settings of the run.
    """

    output: Path
    found_by: str

    def __repr__(self) -> str:
        return self.found_by

    def read(
        self, shard: int, position: int, item: AnnotatedImage, kind: str, size: tuple[int, int]
    ) -> tuple[list[Region], Counter]:
        """As [`Annotations.read`]."""
        return _read_proposals(self.output, shard)[position], Counter()


def new_region(number: int, box: Sequence[float], **fields: Any) -> Region:
    """A region of the record schema."""
    empty = dict.fromkeys(("mask", "category", "caption", "long_caption", "score", "source"))
    return {**empty, "id": number, "box": [float(edge) for edge in box], **fields}


@dataclass
class DetectorProposer:
    """Boxes of an object detector of transformers.

    Args:
        model: folder or Hub id.
        threshold: least score of a box.
    """

    model: str
    threshold: float = 0.3

    def __call__(self, image: Image.Image) -> list[Region]:
        found = []
        for hit in self._pipeline(image, threshold=self.threshold):
            x0, y0, x1, y1 = (float(hit["box"][corner]) for corner in _CORNERS)
            box = [max(x0, 0.0), max(y0, 0.0), min(x1, image.width), min(y1, image.height)]
            if box[2] > box[0] and box[3] > box[1]:
                found.append(new_region(len(found), box, category=hit["label"], score=float(hit["score"])))
        return found

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import AutoConfig, AutoModelForObjectDetection, pipeline

        config = AutoConfig.from_pretrained(self.model)
        if type(config) not in AutoModelForObjectDetection._model_mapping:
            raise ValueError(
                f"`model` must be an object detector of transformers, got {self.model!r}: {config.model_type}."
            )
        return pipeline("object-detection", model=self.model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "threshold": self.threshold}


@dataclass
class ProposalPass:
    """Finds the regions of the images of a shard, and leaves them for the pass that embeds them.

    Args:
        source: the words of the source.
        output: folder of the run.
        proposer: from an RGB image to its regions in the record schema.
        number: its place among the passes.
    """

    source: str | tuple[str, ...]
    output: Path
    proposer: Any
    number: int = 0
    num_gpus: float = 1

    def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        for shard in shards:
            path = between_path(self.output, self.number, shard.number)
            if not path.exists():
                found = [self._propose(position) for position in shard.positions]
                columns = {"position": list(shard.positions), "regions": found}
                with whole_file(path) as unfinished:
                    pq.write_table(pa.table(columns, schema=_schema()), unfinished, write_page_checksum=True)
            yield shard, {}

    def _propose(self, position: int) -> list[Region]:
        """The regions of an image; none of one that can't be read, which the next pass counts."""
        try:
            with foreign("annotation not readable"):
                _, image, _ = read_image(cached_source(self.source).read(position))
        except LeftOut:
            return []
        return self.proposer(image)


def _schema() -> pa.Schema:
    regions = record_features().arrow_schema.field("regions").type
    return pa.schema({"position": pa.int64(), "regions": regions})


@lru_cache(maxsize=2)
def _read_proposals(output: Path, shard: int) -> dict[int, list[Region]]:
    columns = read_unchanged(between_path(output, 0, shard), "pixclip-hf embed").to_pydict()
    return dict(zip(columns["position"], columns["regions"], strict=True))
