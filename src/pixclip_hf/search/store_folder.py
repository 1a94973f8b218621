"""The folder of a store: what made its rows, which shards are in it, and how the others come in.

- `store.json`: version of the format, kind of store, and what made the embeddings: model, revision, weights and
  preprocessing;
- `shards/00000.json`, …: that a shard is in the store; written last;
- `adding.json`: the shard that was being added last, of which an interrupted run may have left some rows;
- `data/`: what the store itself keeps, unless it keeps it elsewhere.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import __version__
from ..data.source_index import digest
from ..data.whole_files import naming_full_disk, only_writer, read_unchanged, write_json
from ..embedding.folder import EmbeddingFolder, check_embeddings, shard_path
from ..jobs.folder import MANIFESTS, done_shards, manifest_path
from ..processing.processing_addresses import shown_address
from .store import STORES, Store, StoreOptions, place_of, store_class, store_rows

STORE = "store.json"
BEGUN = "adding.json"
STORE_VERSION = 1
# What a query's embedding must have in common with those of the rows.
MADE_BY = ("model", "revision", "weights", "preprocessing", "prompt", "view", "width", "dtype")
# What tells one collection from another.
MADE_OF = ("source", "items", "items_digest", "regions", "kinds", "plan")


def open_store(
    folder: EmbeddingFolder,
    store: str = "lance",
    options: StoreOptions | None = None,
    place: str | os.PathLike | None = None,
) -> Store:
    """Opens the store of a folder of embeddings, made where there is none yet, with the shards that it lacks added.

    Kill it at any point: the next call goes on with the shards that are not in the store.

    Args:
        folder: the embeddings; the shards that are done are searched, also while others are still embedded.
        store: one of [`STORES`].
        options: as in [`StoreOptions`]. A store whose rows or index options have changed is indexed again.
        place: folder of the store; `stores/STORE` in that of the embeddings when None.

    Raises:
        ValueError: the folder holds no embedding; the store is one of other embeddings or another kind, was written
            by a newer version of the package, or is written to by another process; its index does not fit the width;
            or an embedding is not finite.
        ModuleNotFoundError: the store's library is not installed.
        OSError: the disk is full.
    """
    kind = store_class(store)
    shards = folder.shard_numbers()
    if not any(pq.read_metadata(shard_path(folder.path, int(number))).num_rows for number in shards):
        raise ValueError(f"A collection must hold at least one embedding, got none in {str(folder.path)!r}.")
    options = check_store(folder, store, options, place)
    place = Path(place) if place is not None else place_of(folder.path, store)
    made = _made(folder)
    width, dtype = folder.settings["width"], folder.settings["dtype"]
    name = "pixclip_hf_" + digest(sorted((key, repr(value)) for key, value in made.items()))
    advice = (
        "The embeddings are whole, and so are the shards that the store has: make room and search again, and it "
        "goes on"
    )
    with naming_full_disk(f"the store {str(place)!r}", advice):
        opened: Store = kind(place / "data", name, width, dtype, options)
        try:
            missing = np.setdiff1d(shards, done_shards(place), assume_unique=True)
            index = _index(options)
            if len(missing) or not (place / STORE).exists() or _read(place).get("indexed") != [len(opened), index]:
                with only_writer(place, "The store"):
                    _fill(opened, folder.path, place, shards)
                    opened.build()
                    stamp = {"format_version": STORE_VERSION, "package_version": __version__, "store": store}
                    write_json(place / STORE, {**stamp, "made": made, "indexed": [len(opened), index]})
        except BaseException:
            opened.close()
            raise
    return opened


def check_store(
    folder: EmbeddingFolder,
    store: str = "lance",
    options: StoreOptions | None = None,
    place: str | os.PathLike | None = None,
) -> StoreOptions:
    """Refuses what [`open_store`] would refuse, also before anything is embedded.

    Args:
        folder: the embeddings, or what they will be.
        store, options, place: as in [`open_store`].

    Returns:
        The options, with the index of a store that exists where they name none.

    Raises:
        ValueError: an index that does not fit the width; a store of other embeddings, or of a newer version.
        ModuleNotFoundError: the store's library is not installed.
    """
    options, kind = options or StoreOptions(), store_class(store)
    place = Path(place) if place is not None else place_of(folder.path, store)
    index: dict[str, Any] = {"index": "auto"}
    if (place / STORE).exists():
        stamp = _read(place)
        _check_stamp(place, stamp, folder)
        if stamp["store"] != store:
            raise ValueError(f"The store {str(place)!r} is of kind {stamp['store']!r}, got {store!r}.")
        index, own = stamp["indexed"][1], _index(options)["url"]
        if (kept := _without_user(index["url"])) != own:
            raise ValueError(f"The store {str(place)!r} keeps its rows at `url` {kept!r}, got {own!r}.")
    if options.index is None:
        given = {name: value for name, value in asdict(options).items() if value is not None}
        options = StoreOptions(**{**index, **given})
    kind.check(folder.settings["width"], options)
    return options


def check_own_stores(folder: EmbeddingFolder) -> None:
    """Whether the stores in a folder of embeddings are of what the folder holds or will hold.

    Raises:
        ValueError: a store of other embeddings, or of a newer version.
    """
    for store in STORES:
        place = place_of(folder.path, store)
        if (place / STORE).exists():
            _check_stamp(place, _read(place), folder)


def _fill(store: Store, folder: Path, place: Path, shards: np.ndarray) -> None:
    (place / MANIFESTS).mkdir(exist_ok=True)
    begun = place / BEGUN
    interrupted = json.loads(begun.read_text(encoding="utf-8"))["shard"] if begun.exists() else None
    # Looked up again: another process may have added some before the store was claimed.
    missing = np.setdiff1d(shards, done_shards(place), assume_unique=True)
    for number in map(int, missing[np.argsort(missing != interrupted, kind="stable")]):
        path = shard_path(folder, number)
        rows = _read_shard(path)
        if len(rows):
            check_embeddings(rows, path)
            write_json(begun, {"shard": number})
            store.add(number, store_rows(rows, number), again=number == interrupted)
        write_json(manifest_path(place, number), {"rows": len(rows)})


def _read_shard(path: Path) -> pa.Table:
    return read_unchanged(path, "pixclip-hf embed")


def _index(options: StoreOptions) -> dict[str, Any]:
    """What is kept of the options."""
    kept = {name: value for name, value in asdict(options).items() if name != "probes"}
    return {**kept, "url": _without_user(options.url)}


def _without_user(url: str | None) -> str | None:
    """An address without its password, which is no part of where the rows are; a path as it is."""
    return url if url is None or "@" not in urlsplit(url).netloc else shown_address(url)


def _read(place: Path) -> dict[str, Any]:
    return json.loads((place / STORE).read_text(encoding="utf-8"))


def _made(folder: EmbeddingFolder) -> dict[str, Any]:
    return {name: folder.settings.get(name) for name in (*MADE_BY, *MADE_OF)}


def _check_stamp(place: Path, stamp: dict[str, Any], folder: EmbeddingFolder) -> None:
    version = stamp.get("format_version")
    if not isinstance(version, int) or version > STORE_VERSION:
        raise ValueError(
            f"The store {str(place)!r} has format {version!r}, written by pixclip-hf {stamp.get('package_version')}; "
            f"this version reads formats up to {STORE_VERSION}."
        )
    for name, value in _made(folder).items():
        if stamp["made"].get(name) != value:
            raise ValueError(
                f"The store {str(place)!r} is one of other embeddings: its {name} is {stamp['made'].get(name)!r}, "
                f"that of the folder {value!r}. Delete it or choose another `place`."
            )
