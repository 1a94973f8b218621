"""CSV: a row per image with its caption, or a row per region with its box."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..source_index import Groups, Notes, Row
from .base import IDS_PER_IMAGE, AnnotatedImage, IndexedSource, readable, split_lists

# Columns by the names that they have elsewhere, where the table has no column of the first name.
_ALIASES = {
    "image": ("file_name", "filename", "filepath", "path", "image_path"),
    "caption": ("title", "text"),
    "category": ("label", "class"),
    "x0": ("xmin", "XMin"),
    "y0": ("ymin", "YMin"),
    "x1": ("xmax", "XMax"),
    "y1": ("ymax", "YMax"),
    "score": ("confidence", "Confidence"),
}
_BOX = ("x0", "y0", "x1", "y1")
_OF_REGION = (*_BOX, "id", "category", "region_caption", "long_caption", "score")
COLUMNS = ("image", "caption", "alt_text", *_OF_REGION)


@dataclass
class CsvTable(IndexedSource, kind="csv"):
    """A table with a header. Rows of one image may lie anywhere in it: their captions and regions are put together.

    Columns are `image` (path below `images`), `caption` and `alt_text` of the image, and of a region `x0`, `y0`, `x1`,
    `y1` (pixels, or shares of the sides with `normalized`), `id`, `category`, `region_caption`, `long_caption` and
    `score`. A row without a box is about the image alone. Other columns are ignored.

    Args:
        table: the file.
        images: folder of the images.
        columns: other names of columns, each as `name:header`, such as `image:filepath`. Some that are common need not
            be given: `filepath`, `title`, `label`, `xmin`.
        delimiter: between columns; by the ending of the file when None, a tab for `.tsv`.
        normalized: boxes are shares of width and height.
    """

    table: str
    images: str
    columns: str | list[str] | None = None
    delimiter: str | None = None
    normalized: bool | str = False

    def __post_init__(self) -> None:
        if self.normalized not in (True, False, "true", "false", "True", "False"):
            raise ValueError(f"`normalized` must be true or false, got {self.normalized!r}.")
        self.normalized = self.normalized in (True, "true", "True")
        super().__post_init__()

    def annotation_files(self) -> Sequence[str]:
        return [self.table]

    def paths(self) -> Sequence[str]:
        return [self.table, self.images]

    def rows(self, notes: Notes) -> Iterator[Row]:
        with Groups() as groups, open(self.table, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            delimiter = self.delimiter or ("\t" if self.table.lower().endswith(".tsv") else ",")
            reader = csv.DictReader(file, delimiter={"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter))
            headers = self._headers(reader.fieldnames or [])
            for row in _rows_that_can_be_read(reader, notes):
                image = row[headers["image"]]
                if not image:
                    notes.left_out["row left out: without an image"] += 1
                    continue
                values = {name: row[header] for name, header in headers.items() if row[header]}
                groups.add(image, json.dumps(values))
            for texts in groups.each():
                image = json.loads(texts[0])["image"]
                yield Row(readable(image), os.fsencode(image), f"[{','.join(texts)}]")

    def _headers(self, found: Sequence[str]) -> dict[str, str]:
        """Column -> its header in the table."""
        given = dict(word.split(":", 1) if ":" in word else (word, "") for word in split_lists(self.columns or []))
        if unknown := sorted(set(given) - set(COLUMNS)):
            raise ValueError(f"`columns` must name {', '.join(COLUMNS)}, got {', '.join(unknown)}.")
        if missing := [header for header in given.values() if header not in found]:
            raise ValueError(f"{self.table!r} has the columns {', '.join(found)}, not {', '.join(missing)}.")
        headers = {}
        for name in COLUMNS:
            names = [given[name]] if name in given else [name, *_ALIASES.get(name, ())]
            header = next((header for header in names if header in found), None)
            if header is not None:
                headers[name] = header
        if "image" not in headers:
            raise ValueError(
                f"{self.table!r} has no column for `image` among {', '.join(found)}: name it, `columns=image:HEADER`."
            )
        if 0 < sum(edge in headers for edge in _BOX) < 4:
            raise ValueError(f"{self.table!r} has columns for some of {', '.join(_BOX)}, and not for all of them.")
        return headers

    def build(self, position: int, row: Row) -> AnnotatedImage:
        captions: dict[str, None] = {}
        regions, alt_text = [], None
        for number, values in enumerate(json.loads(row.content)):
            if "caption" in values:
                captions[values["caption"]] = None
            alt_text = alt_text or values.get("alt_text")
            if not any(edge in values for edge in _BOX):
                continue
            region = {name: values.get(name) for name in ("category", "long_caption", "score")}
            region["id"] = values.get("id", position * IDS_PER_IMAGE + number)
            region["caption"] = values.get("region_caption")
            region["box"] = [values.get(edge, "") for edge in _BOX]
            regions.append(region)
        return AnnotatedImage(
            row.name,
            self.image_path(row.image),
            regions,
            list(captions),
            alt_text,
            normalized=bool(self.normalized),
        )


def _rows_that_can_be_read(reader: Iterator[dict[str, Any]], notes: Notes) -> Iterator[dict[str, Any]]:
    """The rows of a table without those that are no CSV, such as one with a line break outside of quotes."""
    while True:
        with notes.leaving_out("row left out: not readable"):
            if (row := next(reader, None)) is None:
                return
            yield row
