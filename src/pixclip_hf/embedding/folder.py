"""The folder that `pixclip-hf embed` writes, which `datasets` loads and a store of `search` is built over.

- `data/train-00000.parquet`, …: one row per embedding, with the columns of [`embedding_schema`];
- `embeddings.json`: what made them, and all that they depend on: see [`EmbeddingFolder`];
- `shards/00000.json`, …: what became of a shard; written last, it says that the shard is done;
- `README.md`: the dataset card, written when every shard is done.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.whole_files import file_names
from ..finite import check_finite
from ..jobs.folder import MANIFESTS, done_shards, manifests

if TYPE_CHECKING:
    import datasets

SETTINGS = "embeddings.json"
FORMAT_VERSION = 1
KINDS = ("region", "image", "text")
DTYPES = ("float16", "float32")


def embedding_schema(width: int, dtype: str = "float16") -> pa.Schema:
    """The columns of an embedding.

    - id: unique in the folder: `IMAGE_ID#REGION` for a region, `IMAGE_ID` for an image, `IMAGE_ID#text-N` for the
      N-th caption;
    - image_id: name of the image in its source, unique there;
    - kind: `"region"`, `"image"` or `"text"`;
    - embedding: `width` numbers of `dtype`, of unit length before they were rounded to it;
    - box: [x0, y0, x1, y1] in pixels of the upright image, x1 and y1 exclusive; None for an image or a text;
    - mask_area: pixels of the mask, None where the region has a box alone;
    - category, text: the category and the known text of a region, or the caption; None where unknown;
    - score: confidence of the region, None where unknown;
    - image_path: of the image file in the source's folder of images, None where there is no such file (a tar, a
      Parquet file, a scene);
    - position: the image's index in the source, `open_source(settings["source"]).read(position)`;
    - width, height: size of the upright image in pixels.

    Args:
        width: length of an embedding.
        dtype: `"float16"` or `"float32"`.
    """
    types = {
        "id": pa.string(),
        "image_id": pa.string(),
        "kind": pa.string(),
        "embedding": pa.list_(pa.type_for_alias(dtype), width),
        "box": pa.list_(pa.float32(), 4),
        "mask_area": pa.float32(),
        "category": pa.string(),
        "text": pa.string(),
        "score": pa.float32(),
        "image_path": pa.string(),
        "position": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
    return pa.schema(types)


def embedding_features(width: int, dtype: str = "float16") -> "datasets.Features":
    """The columns of [`embedding_schema`] as `datasets` knows them."""
    from datasets import Features

    return Features.from_arrow_schema(embedding_schema(width, dtype))


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of embeddings.

    Attributes:
        path: the folder.
        settings: `embeddings.json`, with
            - format_version, package_version;
            - model: folder or Hub id; revision: its commit on the Hub, None for a folder; weights: digest of a
              folder's weights, None for a Hub id;
            - preprocessing: digest of the processor's settings and tokenizer; prompt, view: how regions are shown;
            - width, dtype: of the column `embedding`; kinds: which of `KINDS` it holds;
            - source: the words of the source; items, items_digest: what it lists;
            - regions: where regions come from.
    """

    path: Path
    settings: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike) -> "EmbeddingFolder":
        """Reads the settings of a folder.

        Raises:
            ValueError: the folder holds no embeddings, or those of a newer version of the package.
        """
        path = Path(path)
        if not (path / SETTINGS).is_file():
            raise ValueError(f"{str(path)!r} must be a folder of `pixclip-hf embed`, and has no {SETTINGS}.")
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        version = settings.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{str(path)!r} holds embeddings in format {version!r}, written by pixclip-hf "
                f"{settings.get('package_version')}; this version reads formats up to {FORMAT_VERSION}."
            )
        return cls(path, settings)

    @property
    def features(self) -> "datasets.Features":
        """The columns of this folder's shards."""
        return embedding_features(self.settings["width"], self.settings["dtype"])

    def shards(self) -> list[Path]:
        """The Parquet files of the shards that are done, in the order of the source."""
        return [shard_path(self.path, int(number)) for number in self.shard_numbers()]

    def shard_numbers(self) -> np.ndarray:
        """The numbers of the shards that are done, ascending: `(S,)` int64. A folder that was downloaded from the Hub
        has no manifests, and all of its shards are done."""
        if (self.path / MANIFESTS).is_dir():
            return done_shards(self.path)
        names = (re.fullmatch(r"train-(\d+)\.parquet", name) for name in file_names(self.path / "data"))
        return np.sort(np.fromiter((int(name[1]) for name in names if name), dtype=np.int64))


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard's rows lie."""
    return folder / "data" / f"train-{number:05d}.parquet"


def embedding_counts(output: str | os.PathLike) -> Counter:
    """Sums over the shards that are done: `shards`, `items`, `images`, `regions`, `texts`, and what was left out, by
    reason."""
    sums: Counter = Counter()
    for manifest in manifests(output):
        start, stop = manifest["positions"]
        numbers = {name: count for name, count in manifest.items() if isinstance(count, int)}
        sums.update({"shards": 1, "items": stop - start, **numbers, **manifest["counts"]})
    return sums


def embedding_matrix(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The column `embedding` of some rows: `(N, D)`, in its own type."""
    column = rows["embedding"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    # `flatten` and not `values`: the values of a slice are those of the whole array.
    values = column.flatten().to_numpy(zero_copy_only=False)
    # A table that another program wrote may not know the width.
    return values.reshape(len(rows), column.type.list_size if pa.types.is_fixed_size_list(column.type) else -1)


def check_embeddings(rows: pa.Table, path: str | os.PathLike) -> None:
    """Refuses embeddings that are not finite: among hits they would stand anywhere.

    Args:
        rows: a shard of embeddings, or some of its rows.
        path: where they lie, for the message.

    Raises:
        ValueError: one of them holds NaN or infinite values; names its id and the file.
    """
    values = embedding_matrix(rows).astype(np.float32)
    check_finite(values, f"In {str(path)!r} the embedding of", rows["id"].to_pylist())


def check_shard(path: str | os.PathLike) -> None:
    """[`check_embeddings`] of a whole Parquet file, some rows of which are in memory at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["id", "embedding"]):
            check_embeddings(pa.Table.from_batches([batch]), path)
