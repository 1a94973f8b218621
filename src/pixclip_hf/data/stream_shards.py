"""Rows of Parquet shards and WebDataset tars, one after the other, from disk or Hub.

A shard that breaks off gives the rows before the break and then one that says so; a file that can't be read costs its
own record alone. So the stream goes on behind both, and can count them.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..record import LeftOut, foreign, record_features
from .parquet_shards import in_record_schema, small_batches
from .sources import IMAGE_SUFFIXES

BROKEN_SHARD = "__broken_shard__"
"""Key of a row that stands for the rest of a shard; its value is the file."""
_PEEKED = 5  # records of a tar


def shard_reader(files: Sequence[str], name: str) -> Callable[..., Iterator[dict[str, Any]]] | None:
    """What reads the rows of these files, given one of them at a time; None for files of another kind.

    Args:
        files: paths, or addresses as `datasets` has them.
        name: the name of the dataset, for messages.

    Raises:
        ValueError: none of the files holds records.
    """
    if all(file.endswith(".parquet") for file in files):
        for file in files:
            try:
                with foreign("shard not readable"), _opened(file) as stream:
                    schema = pq.read_schema(stream)
            except LeftOut:
                continue  # counted when it is its turn
            in_record_schema(schema.empty_table(), name)
            return parquet_rows
        raise ValueError(f"{name!r} has no Parquet file that can be read.")
    if all(file.endswith(".tar") for file in files):
        _check_tars(files, name)
        return tar_rows
    return None


def _opened(file: str) -> Any:
    from datasets.utils.file_utils import xopen

    return open(file, "rb") if os.path.isfile(file) else xopen(file, "rb")


def _checked(stream: Any) -> pq.ParquetFile:
    return pq.ParquetFile(stream, page_checksum_verification=True)


def parquet_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files in the record schema, images encoded."""
    names = record_features().arrow_schema.names
    for file in files:
        try:
            with foreign("shard not readable", detail=True), _opened(file) as stream, _checked(stream) as shard:
                for batch in small_batches(shard, names):
                    yield from in_record_schema(pa.Table.from_batches([batch]), file).to_pylist()
        except LeftOut as error:
            yield {BROKEN_SHARD: file, "reason": str(error)}


def tar_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of tars: `image`, encoded, and `json`, the content of that file, each None where it is missing."""
    for file in files:
        try:
            with foreign("shard not readable", detail=True), _opened(file) as stream:
                with tarfile.open(fileobj=stream, mode="r|") as tar:
                    yield from _tar_records(tar, file)
        except LeftOut as error:
            yield {BROKEN_SHARD: file, "reason": str(error)}


def _tar_records(tar: tarfile.TarFile, file: str) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] | None = None
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isreg() or not stem:
            continue  # hidden files are copies
        key = f"{folder}/{stem}" if folder else stem
        if row is None or row["__key__"] != key:
            if row is not None:
                yield row
            row = {"__key__": key, "__url__": file, "image": None, "json": None, "suffixes": []}
        row["suffixes"].append(suffix)
        suffix = suffix.rpartition(".")[2].lower()
        if suffix == "json" or f".{suffix}" in IMAGE_SUFFIXES:
            content: Any = tar.extractfile(member)
            content = content.read()
            row["json" if suffix == "json" else "image"] = (
                content if suffix == "json" else {"bytes": content, "path": f"{key}.{suffix}"}
            )
    if row is not None:
        yield row


def tar_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row of [`tar_rows`] in the types of the record schema.

    Raises:
        ValueError: an image or a `json` is missing.
        Exception: the `json` is no record.
    """
    if row["image"] is None or row["json"] is None:
        raise ValueError(f"a record must have an image and a `json`, got {', '.join(row['suffixes'])}")
    schema = record_features().arrow_schema
    kind = pa.struct([field for field in schema if field.name != "image"])
    fields = json.loads(row["json"].decode("utf-8-sig"))
    if not isinstance(fields, dict):
        raise TypeError(f"the `json` of a record must hold an object, got {type(fields).__name__}")
    return {**pa.array([fields], kind).to_pylist()[0], "image": row["image"]}


def _check_tars(files: Sequence[str], name: str) -> None:
    """
    Raises:
        ValueError: the first records lack an image or a `json`.
    """
    seen: set[str] = set()
    for file in files:
        for number, row in enumerate(tar_rows([file])):
            if BROKEN_SHARD in row or number == _PEEKED:
                break
            if row["image"] is not None and row["json"] is not None:
                return
            seen.update(row["suffixes"])
    raise ValueError(f"The tars of {name!r} must hold one image and a `json` a record, got {sorted(seen)}.")
