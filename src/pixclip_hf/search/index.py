"""Embeddings of regions on disk, an index over them, and what a text finds in it.

Embeddings stream into Parquet shards, so that memory does not grow with the collection; FAISS, through `datasets`,
indexes and searches them.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from ..encoders.protocol import Encoder
from .collection import Collection

INDEX = "regions.faiss"


def embed_collection(encoder: Encoder, collection: Collection, folder: str | Path, batch_size: int = 16) -> None:
    """Writes the embeddings of all regions into `folder`, a row per region: `picture` (name of its image), `box`
    (xyxy, pixels), `text` and `embedding` (float32, L2-normalized).

    Args:
        encoder: as [`load_encoder`] gives it.
        collection: what to embed.
        folder: made if it does not exist.
        batch_size: images that are read, embedded and written at a time.

    Raises:
        ValueError: `folder` holds embeddings already.
    """
    folder = Path(folder)
    if shards(folder):
        raise ValueError(f"{str(folder)!r} holds embeddings already: name another folder or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(embedded_tables(encoder, collection.read(), batch_size), folder)


def embedded_tables(encoder: Encoder, images: Iterator[dict[str, Any]], batch_size: int) -> Iterator[pa.Table]:
    """The regions of `batch_size` images at a time, embedded: a row per region."""
    while batch := list(islice(images, batch_size)):
        batch = [image for image in batch if image["regions"]]
        if not batch:
            continue
        embeddings = encoder.encode_records(batch, batch_size=batch_size, show_progress_bar=False)
        rows = [
            {"picture": image["name"], "box": region["box"], "text": region["text"], "embedding": embedding}
            for image, of_image in zip(batch, embeddings, strict=True)
            for region, embedding in zip(image["regions"], of_image, strict=True)
        ]
        schema = pa.schema(
            {
                "picture": pa.string(),
                "box": pa.list_(pa.float32(), 4),
                "text": pa.string(),
                "embedding": pa.list_(pa.float32(), embeddings[0].shape[1]),
            }
        )
        yield pa.Table.from_pylist(rows, schema)


def write_shards(tables: Iterator[pa.Table], folder: Path, tables_per_shard: int = 64) -> None:
    """Parquet files of so many tables each; one table is in memory at a time."""
    for shard, first in enumerate(tables):
        with pq.ParquetWriter(folder / f"regions-{shard:05d}.parquet", first.schema) as writer:
            for table in chain([first], islice(tables, tables_per_shard - 1)):
                writer.write_table(table)


def shards(folder: str | Path) -> list[Path]:
    """The Parquet files of a folder, in the order of their rows."""
    return sorted(Path(folder).glob("regions-*.parquet"))


def build_index(folder: str | Path, factory: str = "Flat") -> datasets.Dataset:
    """The shards of a folder with a FAISS index of cosine similarities, which is saved beside them.

    Args:
        folder: as [`embed_collection`] wrote it.
        factory: index factory string of FAISS; `Flat` is exact, `IVF1024,PQ32` small.

    Raises:
        ValueError: the folder holds no region.
    """
    regions = _rows(folder)
    regions.add_faiss_index(
        "embedding",
        string_factory=factory,
        metric_type=faiss.METRIC_INNER_PRODUCT,
        train_size=min(len(regions), 100_000),
    )
    regions.save_faiss_index("embedding", str(Path(folder, INDEX)))
    return regions


def check_index(factory: str, width: int) -> None:
    """Checks an index before anything is embedded for it.

    Args:
        factory: index factory string of FAISS.
        width: length of an embedding.

    Raises:
        ValueError: FAISS makes no such index of such embeddings.
    """
    try:
        faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except Exception as error:  # what its bindings raise is of no one type
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"`--index` must be an index of {width} dimensions, got {factory!r}: {reason}") from error


def open_index(folder: str | Path) -> datasets.Dataset:
    """The regions of a folder with their index from disk.

    Raises:
        ValueError: the folder holds no region.
        FileNotFoundError: it holds no index.
    """
    regions = _rows(folder)
    if not Path(folder, INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds embeddings and no {INDEX}: embed them again, or `build_index`."
        )
    regions.load_faiss_index("embedding", str(Path(folder, INDEX)))
    return regions


def find_regions(regions: datasets.Dataset, embeddings: Any, top: int = 6) -> list[dict[str, Any]]:
    """The regions nearest to each of some embeddings.

    Args:
        regions: what [`build_index`] or [`open_index`] returns.
        embeddings: `(Q, D)` array, L2-normalized, of texts or of regions.
        top: hits per row.

    Returns:
        For each row its hits, best first, by column: `picture`, `box`, `text`, `embedding`, and `score`, the cosine.
    """
    scores, hits = regions.get_nearest_examples_batch("embedding", embeddings, k=min(top, len(regions)))
    return [{**found, "score": row.tolist()} for found, row in zip(hits, scores, strict=True)]


def _rows(folder: str | Path) -> datasets.Dataset:
    files = [str(path) for path in shards(folder)]
    if not sum(pq.read_metadata(file).num_rows for file in files):
        raise ValueError(f"A collection must hold at least one region, got none in {str(folder)!r}.")
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(Path(folder, "cache")))
