"""Where records come from: a file of this folder per public format, and one way to name a source.

In Python a source is a kind with arguments, `load_records("coco", annotations="instances.json", images="train2017")`;
on a command line the same as words, `--source coco annotations=instances.json images=train2017`. A folder or Hub id
alone is a dataset in the record schema, and `scenes:1000:0` are drawn scenes.
"""

import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import IDS_PER_IMAGE, IMAGE_SUFFIXES, KINDS, AnnotatedImage, Source

if TYPE_CHECKING:
    import datasets

# Defining a class registers its kind: a new format is a new file here, and nothing else.
for _module in pkgutil.iter_modules(__path__):
    import_module(f".{_module.name}", __name__)

from .dataset import in_schema  # noqa: E402
from .short_names import FORMS, read_short_name  # noqa: E402

__all__ = [
    "IDS_PER_IMAGE",
    "IMAGE_SUFFIXES",
    "KINDS",
    "AnnotatedImage",
    "Source",
    "cached_source",
    "has_splits",
    "in_schema",
    "load_records",
    "name_source",
    "open_source",
    "parse_source",
]


def load_records(
    source: str | os.PathLike | Sequence[str], split: str | None = None, **arguments: Any
) -> "datasets.Dataset":
    """Records of any source, in the record schema.

    Annotation files are read once, into Arrow files in the cache of `datasets`; images, tars and folders are read when
    a record is asked for. The fingerprint covers the state of every file: what was edited comes from no cache.
    Annotations that the schema cannot take are left out; [`open_source`] tells how many, and why.

    Args:
        source: a kind (`"coco"`; `KINDS` lists them) with its arguments; or the same as words
            (`["coco", "annotations=instances.json", "images=train2017"]`); or a dataset in the record schema: a folder
            written by `save_to_disk` of a `DatasetDict` or a `Dataset` (a split without a name counts as `"train"`, as
            in `load_dataset`), a folder that `load_dataset` reads (Parquet shards), or a Hub id. Columns that are not
            in the schema are left out; fields that its regions lack become None.
        split: the split of a source that has several; for any other, the name of the dataset's split.
        arguments: the arguments of the kind.

    Example:

        load_records("coco", annotations="instances_val2017.json", images="val2017")
        load_records("org/regions", "train")

    Raises:
        ValueError: an unknown kind, argument or split; a file that does not hold what it should; a dataset in which a
            column of the schema is missing or has another type.
        FileNotFoundError: a file or folder that does not exist.
    """
    kind, given = parse_source(source, **arguments)
    if split is not None and has_splits(kind):
        if given.get("split", split) != split:
            raise ValueError(f"`split` is {split!r}, and {given['split']!r} in the words of {name_source(source)!r}.")
        given["split"] = split
    records = _make(kind, given).dataset()
    if split is not None and not has_splits(kind):
        import datasets

        records._split = datasets.Split(split)
    return records


def open_source(source: str | os.PathLike | Sequence[str], **arguments: Any) -> Source:
    """Opens a source: its items by position, not yet checked, and what it leaves out.

    Args:
        source, arguments: as in [`load_records`]; `split` is one of the arguments here.

    Raises:
        ValueError, FileNotFoundError: as in [`load_records`].
    """
    return _make(*parse_source(source, **arguments))


@lru_cache(maxsize=2)
def cached_source(source: str | tuple[str, ...]) -> Source:
    """[`open_source`], once per process; `cached_source.cache_clear()` forgets what was opened."""
    return open_source(source)


def parse_source(source: str | os.PathLike | Sequence[str], **arguments: Any) -> tuple[str, dict[str, Any]]:
    """The kind of a source and its arguments by name.

    Args:
        source, arguments: as in [`open_source`]. A word `name=value` that comes several times gives a list.

    Raises:
        ValueError: no kind, folder or Hub id; a word without a `=`; an argument that the kind does not have, lacks, or
            has twice.
    """
    words = [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(word) for word in source]
    if not words:
        raise ValueError("`source` must have at least one word, got none.")
    name, *rest = words
    given = _read_words(rest, words)
    if twice := sorted(set(given) & set(arguments)):
        raise ValueError(f"`source` has {', '.join(twice)} twice: in the words {words} and as an argument.")
    given |= arguments
    if name in KINDS and (given or not Path(name).exists()):
        return name, _checked(name, given)
    if not Path(name).exists():
        short = read_short_name(name)
        if short is not None:
            kind, parts = short
            return kind, _checked(kind, {**parts, **given})
        if len(name.split("/")) != 2:
            raise ValueError(
                f"`source` must be one of {', '.join(FORMS)}, a kind with its arguments ({', '.join(sorted(KINDS))}), "
                f"a folder, or a Hub id (owner/name), got {name_source(words)!r}."
            )
    return "dataset", _checked("dataset", {"path": name, **given})


def _read_words(words: Sequence[str], all_words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"`source` must go on with words of the form name=value, got {word!r} in {all_words}.")
        if name in given:
            before = given[name]
            given[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            given[name] = value
    return given


def _checked(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if the kind takes them."""
    known = {item.name: item for item in fields(KINDS[kind])}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"`source` {kind} takes {', '.join(known)}, got {', '.join(unknown)}.")
    needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"`source` {kind} needs {', '.join(needed)}, and {', '.join(missing)} is missing.")
    return dict(given)


def _make(kind: str, arguments: Mapping[str, Any]) -> Source:
    return KINDS[kind](**arguments)


def has_splits(kind: str) -> bool:
    """Whether a kind chooses among splits of its own."""
    return any(item.name == "split" for item in fields(KINDS[kind]))  # type: ignore[arg-type]


def name_source(source: str | os.PathLike | Sequence[str]) -> str:
    """A source in one line, for messages and records of a run."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else " ".join(map(str, source))
