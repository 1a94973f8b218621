"""YOLO: one text file per image, with one line per object: its class and its box or polygon as shares of the sides."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..json_stream import read_lines
from ..source_index import Notes, Row
from .base import IDS_PER_IMAGE, IMAGE_SUFFIXES, AnnotatedImage, IndexedSource, listed, readable, walk_files


@dataclass
class Yolo(IndexedSource, kind="yolo"):
    """YOLO's text files, of boxes (`class cx cy width height`) or polygons (`class x0 y0 x1 y1 x2 y2 …`).

    Args:
        data: `data.yaml` with `names`, and `path` and folders of images by split.
        split: `train`, `val` or `test` of it.

    The labels of `…/images/a.jpg` lie in `…/labels/a.txt`, or beside the image. An image without that file has no
    objects.
    """

    data: str
    split: str = "train"

    def paths(self) -> Sequence[str]:
        return [self.data]

    def open(self) -> None:
        content = yaml.safe_load(Path(self.data).read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or "names" not in content:
            raise ValueError(f"`source` {self} needs `names` in {self.data!r}, got {content!r:.80}.")
        names = content["names"]
        self._names = dict(names.items() if isinstance(names, dict) else enumerate(names))
        splits = {name: content[name] for name in ("train", "val", "test") if content.get(name)}
        folders = listed(splits, self.split, repr(self.data))
        root = Path(self.data).parent / content.get("path", "")
        self._roots = [root / folder for folder in (folders if isinstance(folders, list) else [folders])]
        for folder in self._roots:
            if not folder.is_dir():
                raise FileNotFoundError(f"`source` {self} names the folder {str(folder)!r}, which does not exist.")
        super().open()

    def rows(self, notes: Notes) -> Iterator[Row]:
        notes.category_keys, notes.categories = list(self._names), [str(name) for name in self._names.values()]
        for number, root in enumerate(self._roots):
            for path in walk_files(root, IMAGE_SUFFIXES):
                yield Row(readable(path), path, str(number))

    def item_files(self, row: Row) -> Iterable[Path]:
        image = self._roots[int(row.content)] / os.fsdecode(row.image)
        return image, _label_file(image)

    def build(self, position: int, row: Row) -> AnnotatedImage:
        image, labels = self.item_files(row)
        regions, left_out = [], Counter()
        for number, line in enumerate(read_lines(labels) if labels.is_file() else ()):
            region = _read_line(line)
            label = None if region is None else self.index.position_of_category.get(region.pop("class"))
            if region is None:
                left_out["region left out: not readable"] += 1
            elif label is None:
                left_out["region left out: of an unknown category"] += 1
            else:
                region |= {"id": position * IDS_PER_IMAGE + number, "label": label}
                regions.append(region | {"category": self.categories[label].replace("_", " ")})
        return AnnotatedImage(row.name, image, regions, normalized=True, left_out=left_out)


def _label_file(image: Path) -> Path:
    """Where the last folder that is called `images` is called `labels`; beside the image where there is none."""
    parts = list(image.with_suffix(".txt").parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            return Path(*parts[:place], "labels", *parts[place + 1 :])
    return image.with_suffix(".txt")


def _read_line(line: str) -> dict[str, Any] | None:
    try:
        number, *rest = line.split()
        label, values = int(number), [float(value) for value in rest]
    except ValueError:
        return None
    if len(values) in (4, 5):  # the fifth is the confidence of a prediction
        x, y, width, height = values[:4]
        score = values[4] if len(values) == 5 else None
        return {"class": label, "box": [x - width / 2, y - height / 2, x + width / 2, y + height / 2], "score": score}
    if len(values) >= 6 and len(values) % 2 == 0:
        box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        return {"class": label, "box": box, "mask": [values]}
    return None
