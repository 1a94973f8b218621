"""What a source is: items in a fixed order, each of which becomes an image with what is said about it."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

import numpy as np

from ...images import inside
from ...record import NOT_READABLE, LeftOut, foreign
from ..source_index import Index, Notes, Row, build_index, content_digest, digest, file_state, list_index

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IDS_PER_IMAGE = 2**16  # where regions have no ids of their own, those of an image start at its position times this

_SAMPLED_FILES = 64

KINDS: dict[str, type["Source"]] = {}
"""Every kind of source by its name; a class enters it when it is defined."""


@dataclass
class AnnotatedImage:
    """An image and what its source says about it, not yet checked.

    Attributes:
        name: the name of the record, unique in the source.
        image: encoded bytes, or the path of the file.
        regions: dicts with `id` and any of `box` (xyxy), `mask` (RLE or polygons), `category`, `caption`,
            `long_caption`, `score`, `source`; for COCO also `label` (position of the category in
            [`Source.categories`]) and `iscrowd`.
        captions: the captions of the image; alt_text: what a web page says about it.
        size: (width, height) according to the annotations, None where they do not say.
        normalized: boxes and polygons are shares of width and height, not pixels.
        left_out: how much of the annotations the schema cannot take, by reason.
        label: class of the whole image, a position in [`Source.categories`].
        candidates, expressions: boxes (xyxy), and dicts of `text` and `boxes`, those among the candidates that the
            text means. Only for sets of referring expressions.
    """

    name: str
    image: bytes | Path
    regions: Sequence[dict[str, Any]] = ()
    captions: Sequence[str] = ()
    alt_text: str | None = None
    size: tuple[int, int] | None = None
    normalized: bool = False
    left_out: Counter = field(default_factory=Counter)
    label: int | None = None
    candidates: Sequence[Sequence[float]] = ()
    expressions: Sequence[dict[str, Any]] = ()


def in_pixels(region: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A region whose box and polygons are shares of the sides, in pixels of an image of `size` (width, height). What
    is no box or polygon stays as it is, for whoever reads it to refuse."""
    sides, scaled = np.array(size, dtype=np.float64), dict(region)
    with suppress(TypeError, ValueError):
        scaled["box"] = (np.asarray(region.get("box"), dtype=np.float64).reshape(2, 2) * sides).ravel().tolist()
    if isinstance(region.get("mask"), list):
        with suppress(TypeError, ValueError):
            rings = (np.asarray(ring, dtype=np.float64).reshape(-1, 2) for ring in region["mask"])
            scaled["mask"] = [(ring * sides).ravel().tolist() for ring in rings]
    return scaled


class Source(ABC):
    """Base of all kinds: items in a fixed order. A kind is a dataclass whose fields are its arguments.

    An instance can be pickled and reads any item on its own.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind = kind
            KINDS[kind] = cls

    def __post_init__(self) -> None:
        for path in self.paths():
            if not Path(path).exists():
                raise FileNotFoundError(f"`source` {self} names {str(path)!r}, which does not exist.")
        self.open()

    def __str__(self) -> str:
        values = ((name, split_lists(value)) for name, value in self.arguments().items() if value is not None)
        return repr(" ".join([self.kind, *(f"{name}={part}" for name, parts in values for part in parts)]))

    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults included."""
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    def paths(self) -> Sequence[str | Path]:
        """Files and folders that must exist."""
        return ()

    def open(self) -> None:  # noqa: B027 -- most kinds have nothing to open
        """Finds the items; called once, when the paths are known to exist."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, position: int) -> AnnotatedImage:
        """An item by its position.

        Raises:
            LeftOut: its annotations cannot be read.
        """

    def item_name(self, position: int) -> str:
        """A name of an item that tells which one it is even where it cannot be read."""
        return f"item-{position:08d}"

    @property
    def categories(self) -> list[str]:
        """Names of the classes in the source's order; empty where it declares none."""
        return []

    @property
    def left_out(self) -> Counter:
        """Annotations that belong to no item, by reason."""
        return Counter()

    @property
    def items_digest(self) -> str:
        """Fingerprint of what is listed, in its order."""
        return digest([self.kind, *self.arguments().items()])

    def units(self) -> Sequence[tuple[int, int | None]]:
        """What is best read together, such as a tar: of each unit, in the order of the items, the number of items and
        the bytes, None where they are unknown."""
        return [(len(self), None)]

    def fingerprint(self) -> str:
        """Fingerprint of everything that decides the records, including the state of files."""
        return self.items_digest

    def dataset(self) -> "datasets.Dataset":
        """All items in the record schema, each read when it is asked for."""
        from ..lazy_table import lazy_dataset
        from .records import RecordRows

        return lazy_dataset(RecordRows(self), self.fingerprint(), getattr(self, "split", None))


class IndexedSource(Source):
    """A source whose items are listed in an [`Index`] on disk:

    @dataclass
    class Plates(IndexedSource, kind="plates"):
        folder: str

        def paths(self): return [self.folder]
        def rows(self, notes): return (Row(name, name.encode()) for name in sorted(os.listdir(self.folder)))
        def build(self, position, row): return AnnotatedImage(row.name, self.image_path(row.image))
    """

    index: Index

    def annotation_files(self) -> Sequence[str | Path]:
        """Files whose content decides the index; without any, what lies in folders is listed whenever it is opened."""
        return ()

    @abstractmethod
    def rows(self, notes: Notes) -> Iterable[Row]:
        """Lists the items, and fills in the notes."""

    @abstractmethod
    def build(self, position: int, row: Row) -> AnnotatedImage:
        """Reads the item of a row."""

    def item_files(self, row: Row) -> Iterable[str | Path]:
        """The files that an item is read from, beside [`IndexedSource.annotation_files`]."""
        return [self.image_path(row.image)] if row.image is not None else ()

    def image_path(self, image: bytes) -> Path:
        """Where the image of a row lies.

        Raises:
            LeftOut: it has no name, or one that leads out of the source's folder.
        """
        if image is None:
            raise LeftOut("image without a name")
        folder: Any = getattr(self, "images", None) or getattr(self, "folder", "")
        return inside(folder, image)

    def open(self) -> None:
        self.index = self.open_index()
        if not len(self):
            raise ValueError(f"`source` {self} holds no image.")

    def open_index(self) -> Index:
        files = self.annotation_files()
        if not files:
            return Index([list_index(self.rows)])
        key = digest([self.kind, *self.arguments().items(), *map(content_digest, files)])
        return Index([build_index(key, self.rows)])

    def __len__(self) -> int:
        return len(self.index)

    def read(self, position: int) -> AnnotatedImage:
        with foreign("annotation not readable", detail=True):
            return self.build(position, self.index.row(position))

    def item_name(self, position: int) -> str:
        return self.index.row(position).name or super().item_name(position)

    @property
    def categories(self) -> list[str]:
        return self.index.categories

    @property
    def left_out(self) -> Counter:
        return self.index.left_out

    @property
    def items_digest(self) -> str:
        return self.index.digest

    def units(self) -> Sequence[tuple[int, int | None]]:
        # As many files as it takes to know their size by and large: asking for all of them would take minutes.
        positions = np.unique(np.linspace(0, len(self) - 1, _SAMPLED_FILES).astype(np.int64))
        states = [state for at in positions.tolist() for _, state in self._states([self.index.row(at)])]
        size = sum(state[0] for state in states if state is not None)
        return [(len(self), round(size / len(positions) * len(self)) or None)]

    def fingerprint(self) -> str:
        return digest([self.kind, *self.arguments().items(), self.items_digest, *self._states(self.index.rows())])

    def _states(self, rows: Iterable[Row]) -> Iterator[Any]:
        """Path and state of every file that the items of these rows are read from."""
        for row in rows:
            try:
                with foreign("annotation not readable"):
                    paths = [os.fspath(path) for path in self.item_files(row)]
            except LeftOut:
                continue  # told when the item is read
            for path in paths:
                yield path, file_state(path)


def read_each(found: Any, build: Callable[[int, Any], dict[str, Any]], left_out: Counter) -> list[dict[str, Any]]:
    """The regions of an item, of which those that can't be read cost themselves alone.

    Args:
        found: what the annotations list; None for nothing.
        build: makes a region of its number and its entry.
        left_out: takes up how many cannot be read.
    """
    if found is None:
        return []
    if not isinstance(found, list | tuple):
        left_out[NOT_READABLE] += 1
        return []
    regions = []
    for number, entry in enumerate(found):
        try:
            with foreign(NOT_READABLE):
                region = build(number, entry)
        except LeftOut as error:
            left_out[str(error)] += 1
        else:
            regions.append(region)
    return regions


def named_row(name: Callable[[Any], Any], entry: Any, content: str) -> Row:
    """The row of an image that its annotations name; without a name, to be told when it is read, where they can't be
    read so far.

    Args:
        name: finds the path of the image in its entry.
        entry: what names it.
        content: the annotations.
    """
    with suppress(LeftOut), foreign("image without a name"):
        path = os.fsencode(name(entry))
        return Row(readable(path), path, content)
    return Row(None, None, content)


def stated_size(entry: Mapping[str, Any], width: str = "width", height: str = "height") -> tuple[int, int] | None:
    """(width, height) as an entry says, None where it does not."""
    sides = entry.get(width), entry.get(height)
    return None if None in sides else (int(sides[0]), int(sides[1]))  # type: ignore[arg-type]


def xml_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(width, height) as an annotation in Pascal VOC's XML says, None where it does not."""
    width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None


def split_lists(value: Any) -> list[Any]:
    """One value, or a list of values, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def walk_files(folder: str | Path, suffixes: Sequence[str], below: bytes = b"") -> Iterator[bytes]:
    """Paths of files below a folder and relative to it, in the order of their parts; a folder is held at a time.

    What is hidden is passed over: previews of notebooks (`.ipynb_checkpoints`) and of macOS (`._a.jpg`) are copies.
    """
    with os.scandir(os.path.join(os.fsencode(folder), below)) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in found:
        if name.startswith(b"."):
            continue
        path = os.path.join(below, name) if below else name
        if is_folder:
            yield from walk_files(folder, suffixes, path)
        elif os.path.splitext(name)[1].lower().decode("utf-8", "replace") in suffixes:
            yield path


def readable(path: bytes | str) -> str:
    """A path as text that any program can write, with "/" between its parts: bytes that are no UTF-8 as `\\xe9`."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return name.replace(os.sep, "/")


def first_file(folder: str | Path, *names: str) -> Path:
    """The first of the names that is a file below the folder, or the first name."""
    paths = [Path(folder, name) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def xywh_to_xyxy(box: Sequence[float]) -> list[float]:
    """Corner and size, as COCO has them, to two corners."""
    x, y, width, height = box
    return [x, y, x + width, y + height]


def listed(found: Mapping[str, Any], choice: str | None, what: str) -> Any:
    """An entry by its name.

    Raises:
        ValueError: no such name; the message lists those that there are.
    """
    if choice is None or choice not in found:
        raise ValueError(f"`split` must be one of {', '.join(found)} of {what}, got {choice!r}.")
    return found[choice]
