"""The folder of a store: what made its rows, which shards are in it, and how the others come in.

- `store.json`: version of the format, kind of store, and what made the embeddings: model, revision, weights and
  preprocessing;
- `shards/00000.json`, …: that a shard is in the store; written last;
- `data/`: what the store itself keeps, unless it keeps it elsewhere.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import __version__
from ..data.source_index import digest
from ..data.whole_files import only_writer, write_json
from ..embedding.folder import EmbeddingFolder, check_embeddings
from .store import Store, StoreOptions, place_of, store_class, store_rows

STORE = "store.json"
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
    """
    options = options or StoreOptions()
    kind = store_class(store)
    shards = folder.shards()
    made = {name: folder.settings.get(name) for name in (*MADE_BY, *MADE_OF)}
    if not any(pq.read_metadata(path).num_rows for path in shards):
        raise ValueError(f"A collection must hold at least one embedding, got none in {str(folder.path)!r}.")
    place = Path(place) if place is not None else place_of(folder.path, store)
    if (place / STORE).exists():
        _check(place, store, options, made)
    width, dtype = folder.settings["width"], folder.settings["dtype"]
    name = "pixclip_hf_" + digest(sorted((key, repr(value)) for key, value in made.items()))
    opened: Store = kind(place / "data", name, width, dtype, options)
    try:
        missing = [path for path in shards if not _mark(place, path).exists()]
        index = {key: value for key, value in asdict(options).items() if key != "probes"}
        if missing or not (place / STORE).exists() or _read(place).get("indexed") != [len(opened), index]:
            with only_writer(place, "The store"):
                _fill(opened, place, shards)
                opened.build()
                stamp = {"format_version": STORE_VERSION, "package_version": __version__, "store": store}
                write_json(place / STORE, {**stamp, "made": made, "indexed": [len(opened), index]})
    except BaseException:
        opened.close()
        raise
    return opened


def _fill(store: Store, place: Path, shards: list[Path]) -> None:
    (place / "shards").mkdir(exist_ok=True)
    for path in shards:
        mark = _mark(place, path)
        if not mark.exists():
            number = _number(path)
            rows = _read_shard(path)
            if len(rows):
                check_embeddings(rows, path)
                store.add(number, store_rows(rows, number))
            write_json(mark, {"rows": len(rows)})


def _read_shard(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Delete it and run `pixclip-hf embed` again, which writes it anew."
        ) from error


def _read(place: Path) -> dict[str, Any]:
    return json.loads((place / STORE).read_text(encoding="utf-8"))


def _check(place: Path, store: str, options: StoreOptions, made: dict[str, Any]) -> None:
    stamp = _read(place)
    version = stamp.get("format_version")
    if not isinstance(version, int) or version > STORE_VERSION:
        raise ValueError(
            f"The store {str(place)!r} has format {version!r}, written by pixclip-hf {stamp.get('package_version')}; "
            f"this version reads formats up to {STORE_VERSION}."
        )
    if stamp["store"] != store:
        raise ValueError(f"The store {str(place)!r} is of kind {stamp['store']!r}, got {store!r}.")
    if (url := stamp["indexed"][1]["url"]) != options.url:
        raise ValueError(f"The store {str(place)!r} keeps its rows at `url` {url!r}, got {options.url!r}.")
    for name, value in made.items():
        if stamp["made"].get(name) != value:
            raise ValueError(
                f"The store {str(place)!r} is one of other embeddings: its {name} is {stamp['made'].get(name)!r}, "
                f"that of the folder {value!r}. Delete it or choose another `place`."
            )


def _mark(place: Path, shard: Path) -> Path:
    return place / "shards" / f"{_number(shard):05d}.json"


def _number(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])
