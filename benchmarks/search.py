"""The default store beside FAISS: how many of the true neighbors it finds, how fast, and in how much memory.

Vectors of width 512 from a mixture of normal distributions, float16 on disk; queries from the same mixture. Recall@10
is measured against exact search. Each store searches in a process of its own, whose anonymous memory is read after
the queries, less what it had after the same queries of a small collection in a store of the same kind: libraries,
threads and buffers cost the same whatever is searched, and stand in a column of their own. FAISS holds its vectors in
memory, LanceDB on disk. The last column is the size of a store's files per row; each row has a box, a category and a
path. Runs without arguments on 100,000 vectors; `--vectors 1000000` takes some ten minutes and 5 GB of disk. Prints a
table and, last, one line of JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pixclip_hf.embedding.folder import EmbeddingFolder, embedding_features, shard_path
from pixclip_hf.search.store import StoreOptions, place_of
from pixclip_hf.search.store_folder import open_store

WIDTH, QUERIES, TOP, SHARD = 512, 200, 10, 50_000
REGIONS = 14  # per image
SMALL = 12_000  # vectors of the small collection: enough for an index
# Rows share a direction by cluster, and each cluster varies in few directions of its own: as embeddings of a trained
# model do, whose spread is far below their width.
CLUSTERS, DIRECTIONS, SPREAD, NOISE = 1000, 24, 0.6, 0.15


class Mixture:
    """Vectors of unit length from a mixture of `CLUSTERS` normal distributions."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.centers = generator.standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
        self.centers /= np.linalg.norm(self.centers, axis=1, keepdims=True)
        self.axes = generator.standard_normal((CLUSTERS, DIRECTIONS, WIDTH), dtype=np.float32) / WIDTH**0.5

    def draw(self, count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        clusters = np.sort(generator.integers(0, CLUSTERS, count))
        vectors = generator.standard_normal((count, WIDTH), dtype=np.float32) * (NOISE / WIDTH**0.5)
        starts = np.searchsorted(clusters, np.arange(CLUSTERS + 1))
        for number, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            along = generator.standard_normal((stop - start, DIRECTIONS), dtype=np.float32)
            vectors[start:stop] += self.centers[number] + SPREAD / DIRECTIONS**0.5 * along @ self.axes[number]
        generator.shuffle(vectors)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_folder(path: Path, vectors: np.ndarray) -> None:
    """The vectors as regions in a folder of embeddings."""
    for name in ("data", "shards"):
        (path / name).mkdir(parents=True)
    settings = {"format_version": 1, "width": WIDTH, "dtype": "float16", "kinds": ["region"]}
    (path / "embeddings.json").write_text(json.dumps(settings))
    schema = embedding_features(WIDTH).arrow_schema
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        part = vectors[start : start + SHARD].astype(np.float16)
        count = len(part)
        images = [f"{(start + i) // REGIONS:012}.jpg" for i in range(count)]
        known = {
            "id": pa.array([f"{image}#{(start + i) % REGIONS}" for i, image in enumerate(images)]),
            "image_id": pa.array(images),
            "kind": pa.array(["region"] * count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), WIDTH),
            "position": pa.array(range(start, start + count), pa.int64()),
            "box": pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.float32([10, 20, 200, 180]), count)), 4),
            "category": pa.array([f"category {i % 80}" for i in range(count)]),
            "image_path": pa.array([f"photos/{image}" for image in images]),
            "width": pa.array([640] * count, pa.int32()),
            "height": pa.array([480] * count, pa.int32()),
        }
        columns = [known.get(field.name, pa.nulls(count, field.type)) for field in schema]
        pq.write_table(pa.table(columns, schema=schema), shard_path(path, number))
        (path / "shards" / f"{number:05d}.json").write_text("{}")


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def measure(
    open_it: Callable[[Path], Callable[[np.ndarray], list[int]]], path: Path, small: Path, queries: np.ndarray
) -> dict[str, Any]:
    """What a search finds, with milliseconds per query and the memory that it takes."""
    begin = anonymous_memory()
    search = open_it(small)
    for query in queries:
        search(query)
    before = anonymous_memory()
    search = open_it(path)
    search(queries[0])  # opens the index
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query))
        times.append(time.perf_counter() - start)
    return {
        "found": found,
        "milliseconds": 1e3 * statistics.median(times),
        "memory": max(anonymous_memory() - before, 0),
        "fixed": before - begin,
    }


def run_store(name: str, options: StoreOptions, path: Path, small: Path, queries: np.ndarray) -> dict[str, Any]:
    def open_it(path: Path) -> Callable[[np.ndarray], list[int]]:
        store = open_store(EmbeddingFolder.open(path), name, options)
        return lambda query: store.search(query[None], TOP)[0]["position"].to_pylist()

    return measure(open_it, path, small, queries)


def run_faiss(factory: str, path: Path, small: Path, queries: np.ndarray) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)

    def open_it(path: Path) -> Callable[[np.ndarray], list[int]]:
        index = faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
        start = time.perf_counter()
        for shard in EmbeddingFolder.open(path).shards():
            column = pq.read_table(shard, columns=["embedding"])["embedding"].combine_chunks()
            index.add(column.flatten().to_numpy().reshape(-1, WIDTH).astype(np.float32))
        built.append(time.perf_counter() - start)
        return lambda query: index.search(query[None], TOP)[1][0].tolist()

    built: list[float] = []
    return {**measure(open_it, path, small, queries), "build": built[-1]}


def build(name: str, options: StoreOptions, path: Path) -> None:
    open_store(EmbeddingFolder.open(path), name, options)


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--index", default="auto", help="index of LanceDB")
    parser.add_argument("--probes", type=int, help="partitions that a query looks at; the store's default")
    arguments = parser.parse_args()
    mixture = Mixture()
    options = StoreOptions(index=arguments.index, probes=arguments.probes)
    size = arguments.vectors * WIDTH * 2
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder, "embeddings"), Path(folder, "small")
        vectors = mixture.draw(arguments.vectors, 1)
        write_folder(path, vectors)
        write_folder(small, mixture.draw(SMALL, 3))
        queries = mixture.draw(QUERIES, 2)
        # What float16 keeps of the vectors is what every side searches.
        stored = vectors.astype(np.float16).astype(np.float32)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        truth = np.argsort(-(queries @ stored.T), axis=1)[:, :TOP]
        del vectors, stored
        results = {}
        for title, store, chosen, some in (
            (f"LanceDB {arguments.index}", "lance", options, queries),
            ("exact (numpy)", "exact", StoreOptions(), queries[:20]),
        ):
            apart(build, store, chosen, small)
            start = time.perf_counter()
            apart(build, store, chosen, path)
            built = time.perf_counter() - start
            results[title] = {**apart(run_store, store, chosen, path, small, some), "build": built}
            # Above one shard, LanceDB also keeps the files that it has joined.
            results[title]["disk"] = bytes_on_disk(place_of(path, store)) / arguments.vectors
        results["FAISS flat"] = apart(run_faiss, "Flat", path, small, queries)
        results["FAISS HNSW32"] = apart(run_faiss, "HNSW32", path, small, queries)
    print(f"{arguments.vectors:,} vectors of width {WIDTH}, {size / 2**20:,.0f} MiB as float16")
    columns = f"{'recall@10':>10}{'ms per query':>14}{'memory / vectors':>18}{'fixed MiB':>11}{'build s':>10}"
    print(f"{'':<18}{columns}{'bytes per row':>15}")
    for name, result in results.items():
        pairs = zip(result["found"], truth, strict=False)
        result["recall"] = statistics.mean(len(set(found) & set(best.tolist())) / TOP for found, best in pairs)
        disk = f"{result['disk']:,.0f}" if "disk" in result else ""
        columns = f"{result['recall']:>10.3f}{result['milliseconds']:>14.2f}{result['memory'] / size:>18.2f}"
        print(f"{name:<18}{columns}{result['fixed'] / 2**20:>11.1f}{result['build']:>10.1f}{disk:>15}")
    own = next(iter(results.values()))
    line = {
        "recall_at_10": round(own["recall"], 4),
        "memory_over_vectors": round(own["memory"] / size, 3),
        "milliseconds_a_query": round(own["milliseconds"], 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
