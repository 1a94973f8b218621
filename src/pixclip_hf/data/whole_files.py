"""Files that appear whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

UNFINISHED = ".tmp"
"""Suffix of a file that is still being written; it is left behind where its process is killed."""


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a file that is on disk, complete, before it appears under its name.

        with whole_file(folder / "results.json") as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    Several processes may write the same file at a time: the last one to finish wins.

    Args:
        path: the file, which is replaced where it exists. Its folder must exist.

    Yields:
        The path to write to: a hidden file beside it, which takes its place when the block ends. When the block
        raises, `path` stays as it was and nothing is left behind.
    """
    path = Path(path)
    # Hidden, so that no reader of the folder takes it for one of its files.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}{UNFINISHED}")
    try:
        yield unfinished
        _sync(unfinished, os.O_RDWR)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder can't be opened
        _sync(path.parent, os.O_RDONLY)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk is full; libraries that are not written in Python say so in words alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
