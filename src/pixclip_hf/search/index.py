"""A FAISS index over the regions of a folder of embeddings, and what a text finds in it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import faiss
from PIL import Image

from ..data.sources import cached_source
from ..data.sources.records import read_image
from ..embedding.folder import EmbeddingFolder, embedding_counts
from ..record import LeftOut

INDEX = "regions.faiss"


def build_index(folder: str | Path, factory: str = "Flat") -> datasets.Dataset:
    """The regions of a folder with a FAISS index of cosine similarities, which is saved beside them.

    Args:
        folder: as `pixclip-hf embed` wrote it.
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
    """Checks an index before anything is read for it.

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
        raise FileNotFoundError(f"{str(folder)!r} holds embeddings and no {INDEX}: call `build_index`.")
    regions.load_faiss_index("embedding", str(Path(folder, INDEX)))
    return regions


def find_regions(regions: datasets.Dataset, embeddings: Any, top: int = 6) -> list[dict[str, Any]]:
    """The regions nearest to each of some embeddings.

    Args:
        regions: what [`build_index`] or [`open_index`] returns.
        embeddings: `(Q, D)` array, L2-normalized, of texts or of regions.
        top: hits per row.

    Returns:
        For each row its hits, best first, by the columns of [`embedding_features`], and `score`, the cosine.
    """
    scores, hits = regions.get_nearest_examples_batch("embedding", embeddings, k=min(top, len(regions)))
    return [{**found, "score": row.tolist()} for found, row in zip(hits, scores, strict=True)]


def open_images(folder: str | Path, hits: Iterable[dict[str, Any]]) -> dict[str, Image.Image]:
    """The images of some hits by their `image_id`, RGB and upright.

    Raises:
        FileNotFoundError: an image is no longer where it was.
    """
    source = EmbeddingFolder.open(folder).settings["source"]
    opened = cached_source(source if isinstance(source, str) else tuple(source))
    images = {}
    for found in hits:
        for name, position in zip(found["image_id"], found["position"], strict=True):
            if name not in images:
                try:
                    item = opened.read(position)
                    images[name] = read_image(item)[1]
                except (LeftOut, IndexError) as error:
                    raise FileNotFoundError(f"The image {name!r} is no longer where it was embedded from.") from error
                if item.name != name:
                    raise FileNotFoundError(f"The image {name!r} is no longer where it was: {item.name!r} is there.")
    return images


def _rows(folder: str | Path) -> datasets.Dataset:
    files = [str(path) for path in EmbeddingFolder.open(folder).shards()]
    if not embedding_counts(folder)["regions"]:
        raise ValueError(f"A collection must hold at least one region, got none in {str(folder)!r}.")
    cache = str(Path(folder, "cache"))
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=cache, filters=[("kind", "==", "region")]
    )
