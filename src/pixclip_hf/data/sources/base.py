"""What a source is: items in a fixed order, each of which becomes an image with what is said about it."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

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
        """An item by its position. What is wrong with its annotations comes out as a Python error."""

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
        """Where the image of a row lies."""
        folder: Any = getattr(self, "images", None) or getattr(self, "folder", "")
        return Path(folder, os.fsdecode(image))

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
        return self.build(position, self.index.row(position))

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
        states = [file_state(path) for at in positions.tolist() for path in self.item_files(self.index.row(at))]
        size = sum(state[0] for state in states if state is not None)
        return [(len(self), round(size / len(positions) * len(self)) or None)]

    def fingerprint(self) -> str:
        return digest([self.kind, *self.arguments().items(), self.items_digest, *self._states()])

    def _states(self) -> Iterator[Any]:
        """The state of every file that an item is read from."""
        for row in self.index.rows():
            for path in self.item_files(row):
                yield os.fspath(path), file_state(path)


def split_lists(value: Any) -> list[Any]:
    """One value, or a list of values, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def walk_files(folder: str | Path, suffixes: Sequence[str], inside: bytes = b"") -> Iterator[bytes]:
    """Paths of files below a folder and relative to it, in the order of their parts; a folder is held at a time."""
    with os.scandir(os.path.join(os.fsencode(folder), inside)) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in found:
        path = os.path.join(inside, name) if inside else name
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
