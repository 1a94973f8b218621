"""Files that appear whole or not at all, and folders that one process writes to at a time."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pyarrow as pa

UNFINISHED = ".tmp"
"""Suffix of a file or folder that is still being written; it is left behind where its process is killed."""


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
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def whole_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Writes several files of a folder, as `save_pretrained` does; each of them appears whole.

    Args:
        folder: made if it does not exist. Files of the same names are replaced, others stay.

    Yields:
        The folder to write to: a hidden one inside, whose files move when the block ends, indexes of weights behind
        the weights. When the block raises, `folder` stays as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{uuid4().hex[:8]}{UNFINISHED}"
    unfinished.mkdir()
    try:
        yield unfinished
        files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
        for path in files:
            sync(path)
        for path in sorted(files, key=lambda path: path.name.endswith(".index.json")):
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        for parent in {folder / path.relative_to(unfinished).parent for path in files}:
            _sync_folder(parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a file of JSON, whole or not at all."""
    write_utf8(path, json.dumps(content, indent=1) + "\n")


def write_utf8(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Writes a file of UTF-8, whole or not at all; `errors` as in `str.encode`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors=errors)


def read_unchanged(path: str | os.PathLike, again: str) -> "pa.Table":
    """The rows of a Parquet file whose pages are those that were written.

    Args:
        path: the file.
        again: the command that writes it anew, for the message.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Delete it and run `{again}` again, which writes it anew."
        ) from error


def file_names(folder: str | os.PathLike) -> Iterator[str]:
    """The names of the files and folders in a folder, one after another: a list of a million takes 100 MB. None where
    the folder does not exist."""
    folder = Path(folder)
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what killed processes left unfinished in a folder that no other process writes to."""
    for name in [name for name in file_names(folder) if name.startswith(".") and name.endswith(UNFINISHED)]:
        leftover = Path(folder, name)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: str | os.PathLike, name: str) -> Iterator[None]:
    """Makes a folder and holds it as the only process that writes to it. The lock ends with the process, however that
    ends.

    Args:
        folder: the folder.
        name: what it is called in messages.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{name} {str(folder)!r} is being written to by another process.") from error


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: str | os.PathLike) -> list[Any]:
    """What [`file_fault`] compares a file with: its size in bytes and its SHA-256."""
    return [os.path.getsize(path), file_digest(path)]


def file_fault(path: str | os.PathLike, record: Any, content: bool = True) -> str | None:
    """What is wrong with a file, in words that follow its name; None where it is as it was recorded.

    Args:
        path: the file.
        record: as [`file_record`] gave it, and as a file kept it since.
        content: whether to read it all; its size alone finds what was cut.
    """
    if not isinstance(record, list) or list(map(type, record)) not in ([int], [int, str]) or len(record) <= content:
        return "has a checksum that can't be read"
    try:
        size = os.path.getsize(path)
        if size != record[0]:
            return f"has {size} bytes and not {record[0]}"
        if content and file_digest(path) != record[1]:
            return "has another content than its checksum says"
    except FileNotFoundError:
        return "is missing"
    return None


def sync(path: str | os.PathLike) -> None:
    """Returns when the content of a file is on disk."""
    _sync(path, os.O_RDWR)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened
        _sync(folder, os.O_RDONLY)


@contextmanager
def naming_full_disk(what: str, advice: str) -> Iterator[None]:
    """Lets the error of a full disk say what there was no space for, and what to do.

    Args:
        what: how the message calls what is written to.
        advice: a sentence without its period, which follows.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, f"No space left for {what}. {advice}") from error


def _is_full_disk(error: Exception) -> bool:
    """Libraries that are not written in Python say so in words alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _sync(path: str | os.PathLike, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
