"""ShareGPT4V and sets of its layout: a conversation about an image, whose answer is a long text."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from ..json_stream import read_entries
from ..source_index import Notes, Row
from .base import AnnotatedImage, IndexedSource, named_row


@dataclass
class ShareGpt4V(IndexedSource, kind="sharegpt4v"):
    """Conversations.

    Args:
        annotations: a list of `image` and `conversations` of `from` and `value`; the first answer of `gpt` is taken.
        images: folder of the images by their path.
    """

    annotations: str
    images: str

    def annotation_files(self) -> Sequence[str]:
        return [self.annotations]

    def paths(self) -> Sequence[str]:
        return [self.annotations, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        for _, entry, text in read_entries(self.annotations):
            yield named_row(itemgetter("image"), entry, text)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        turns = json.loads(row.content)["conversations"]
        answer = next(turn["value"] for turn in turns if turn["from"] == "gpt")
        return AnnotatedImage(row.name, self.image_path(row.image), captions=[answer])
