"""Search the regions of pictures by text of any length: an index on disk, and a sheet with the hits.

    python examples/search_regions.py                                         # 200 drawn scenes, the demo's CLOC
    python examples/search_regions.py --images photos --query "a red mug with a chipped rim"
    python examples/search_regions.py --images photos --detector PekingU/rtdetr_r50vd --query "a dog on a sofa"
    python examples/search_regions.py --dataset my-regions --model runs/demo/pixclip --query "…"

Regions come from the annotations of a dataset in the record schema, from a detector of transformers, or from a grid of
windows. Embeddings stream into Parquet shards, so that memory does not grow with the collection; FAISS, through
`datasets`, indexes and searches them. Needs `pip install pixclip-hf[search]`. docs/search.md: large collections.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import faiss
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from transformers import pipeline

from pixclip_hf import RegionEncoder
from pixclip_hf.data.readers import load_records
from pixclip_hf.data.scenes import make_scene
from pixclip_hf.data.tokenizer import scenes_tokenizer
from pixclip_hf.images import IMAGE_SUFFIXES, open_image
from pixclip_hf.training.from_scratch import small_model
from pixclip_hf.visualization import draw_retrieval


def load_encoder(name: str) -> RegionEncoder:
    """A saved model; an untrained one where the demo has not run yet."""
    if name == "runs/demo/cloc" and not Path(name).exists():
        print(f"{name} is not there (`make demo`): the model is untrained, so what it finds is arbitrary")
        torch.manual_seed(0)
        return RegionEncoder(*small_model("cloc", scenes_tokenizer()))
    return RegionEncoder.from_pretrained(name)


def grid_boxes(width: int, height: int, counts: Sequence[int]) -> list[list[float]]:
    """Windows that overlap by half: for each of `counts` so many along either side; 1 is the whole picture."""
    boxes = []
    for count in counts:
        side = 2 / (count + 1)
        steps = [side / 2 * step for step in range(count)]
        boxes += [[x * width, y * height, (x + side) * width, (y + side) * height] for y in steps for x in steps]
    return boxes


def read_pictures(arguments: argparse.Namespace, names: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """Pictures one by one: `name`, `image` (RGB) and `regions`, each with a `box` (xyxy, pixels), `mask` or None, and
    `text`, what it is known to show. With `names` only those, without regions."""
    if arguments.images is None:
        records = (
            load_records(arguments.dataset, arguments.split)
            if arguments.dataset
            else (make_scene(index, "test") for index in range(arguments.scenes))
        )
        for index, record in enumerate(records):
            if names is not None and str(index) not in names:
                continue
            regions = [{**region, "text": region["caption"] or region["category"]} for region in record["regions"]]
            yield {"name": str(index), "image": record["image"].convert("RGB"), "regions": regions}
        return
    detect = pipeline("object-detection", model=arguments.detector) if arguments.detector and not names else None
    for path in sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        if names is not None and str(path) not in names:
            continue
        image = open_image(path)
        if names is not None:
            found = []
        elif detect is None:
            found = [{"box": box, "text": None} for box in grid_boxes(*image.size, arguments.grid)]
        else:
            corners = ("xmin", "ymin", "xmax", "ymax")
            found = [
                {"box": [float(hit["box"][corner]) for corner in corners], "text": hit["label"]}
                for hit in detect(image, threshold=arguments.detector_threshold)
            ]
        yield {"name": str(path), "image": image, "regions": [{**region, "mask": None} for region in found]}


def embedded_tables(encoder: RegionEncoder, pictures: Iterator[dict[str, Any]], batch_size: int) -> Iterator[pa.Table]:
    """The regions of `batch_size` pictures at a time, embedded: a row a region."""
    schema = pa.schema(
        {
            "picture": pa.string(),
            "box": pa.list_(pa.float32(), 4),
            "text": pa.string(),
            "embedding": pa.list_(pa.float32(), encoder.width),
        }
    )
    while batch := list(islice(pictures, batch_size)):
        embeddings = encoder.encode_records(batch, batch_size=batch_size, show_progress_bar=False)
        rows = [
            {"picture": picture["name"], "box": region["box"], "text": region["text"], "embedding": embedding}
            for picture, of_picture in zip(batch, embeddings, strict=True)
            for region, embedding in zip(picture["regions"], of_picture, strict=True)
        ]
        yield pa.Table.from_pylist(rows, schema)


def write_shards(tables: Iterator[pa.Table], folder: Path, tables_per_shard: int = 64) -> None:
    """Parquet files of so many tables each; one table is in memory at a time."""
    for shard, first in enumerate(tables):
        with pq.ParquetWriter(folder / f"regions-{shard:05d}.parquet", first.schema) as writer:
            for table in chain([first], islice(tables, tables_per_shard - 1)):
                writer.write_table(table)


def build_index(folder: Path, factory: str) -> datasets.Dataset:
    """The shards of a folder with a FAISS index of cosine similarities, which is saved beside them."""
    shards = [str(path) for path in sorted(folder.glob("regions-*.parquet"))]
    if not sum(pq.read_metadata(shard).num_rows for shard in shards):
        raise ValueError("`--images` or `--dataset` must hold at least one region, got none.")
    regions = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(folder / "cache"))
    regions.add_faiss_index(
        "embedding",
        string_factory=factory,
        metric_type=faiss.METRIC_INNER_PRODUCT,
        train_size=min(len(regions), 100_000),
    )
    regions.save_faiss_index("embedding", str(folder / "regions.faiss"))
    return regions


def draw_hit(image: Image.Image, box: Sequence[float], context: float = 0.5) -> Image.Image:
    """What is around a box, on either side by `context` of its longer side, with the box drawn in."""
    x0, y0, x1, y1 = box
    margin = context * max(x1 - x0, y1 - y0)
    left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
    crop = image.crop((left, top, min(image.width, int(x1 + margin)), min(image.height, int(y1 + margin))))
    scale = 256 / max(crop.size)
    crop = crop.resize([max(1, round(side * scale)) for side in crop.size])
    corners = [(side - start) * scale for side, start in zip(box, (left, top, left, top), strict=True)]
    ImageDraw.Draw(crop).rectangle(corners, outline="white", width=4)
    ImageDraw.Draw(crop).rectangle(corners, outline="black", width=2)
    return crop


def draw_sheet(path: Path, arguments: argparse.Namespace, queries: Sequence[str], hits: Sequence[dict]) -> None:
    """The hits of each query with their scores; framed in green or red where the regions' texts tell right from
    wrong."""
    names = {name for found in hits for name in found["picture"]}
    pictures = {picture["name"]: picture["image"] for picture in read_pictures(arguments, names)}
    rows = []
    for query, found in zip(queries, hits, strict=True):
        known = query in found["text"]
        columns = zip(found["picture"], found["box"], found["score"], found["text"], strict=True)
        rows.append(
            [
                (draw_hit(pictures[name], box), score, text == query if known else None)
                for name, box, score, text in columns
            ]
        )
    draw_retrieval(path, queries, rows, title=f"regions found by text, {arguments.model}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id of a CLOC or PixCLIP")
    parser.add_argument("--images", type=Path, help="folder of pictures, searched with all its subfolders")
    parser.add_argument("--dataset", help="folder or Hub id of a dataset in the record schema: its regions")
    parser.add_argument("--split", default="train", help="of the dataset")
    parser.add_argument("--scenes", type=int, default=200, help="number of drawn scenes, without other pictures")
    parser.add_argument("--detector", help="object detector of transformers for --images, in place of the grid")
    parser.add_argument("--detector_threshold", type=float, default=0.3)
    parser.add_argument("--grid", type=int, nargs="+", default=[1, 3, 7], help="windows a side, each number a size")
    parser.add_argument("--query", nargs="+", help="texts; without, what three of the regions are known to show")
    parser.add_argument("--top", type=int, default=6, help="hits a query")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures a model pass")
    parser.add_argument("--index", default="Flat", help="FAISS index factory: Flat is exact, IVF1024,PQ32 small")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/search"))
    arguments = parser.parse_args(argv)
    if arguments.images is not None and arguments.dataset is not None:
        parser.error("--images and --dataset exclude each other")
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f"--images {arguments.images} is no folder")
    if arguments.images is not None and arguments.detector is None and arguments.query is None:
        parser.error("--images without --detector needs --query: nothing is known about windows of a grid")
    if list(arguments.output_dir.glob("regions-*.parquet")):
        parser.error(f"--output_dir {arguments.output_dir} holds an index already: name another folder or delete it")
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(arguments.model)

    # 1. Pictures to embeddings on disk, and the index over them.
    start = time.perf_counter()
    write_shards(embedded_tables(encoder, read_pictures(arguments), arguments.batch_size), folder)
    embedded = time.perf_counter()
    regions = build_index(folder, arguments.index)
    indexed = time.perf_counter()

    # 2. Texts to hits.
    queries = arguments.query or list(dict.fromkeys(filter(None, regions["text"])))[:3]
    asked = time.perf_counter()
    embeds = encoder.encode_texts(queries, show_progress_bar=False)
    searched = time.perf_counter()
    scores, hits = regions.get_nearest_examples_batch("embedding", embeds, k=min(arguments.top, len(regions)))
    answered = time.perf_counter()
    for found, row in zip(hits, scores, strict=True):
        found["score"] = row.tolist()

    # 3. What was found, what it took.
    draw_sheet(folder / "hits.png", arguments, queries, hits)
    shards = sum(path.stat().st_size for path in folder.glob("regions-*.parquet"))
    report = {
        "regions": len(regions),
        "pictures": len(set(regions["picture"])),
        "embed_seconds": embedded - start,
        "index_seconds": indexed - embedded,
        "text_milliseconds_a_query": 1e3 * (searched - asked) / len(queries),
        "search_milliseconds_a_query": 1e3 * (answered - searched) / len(queries),
        "parquet_bytes_a_region": shards / len(regions),
        "index_bytes_a_region": (folder / "regions.faiss").stat().st_size / len(regions),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for query, found in zip(queries, hits, strict=True):
        print(query)
        for name, box, score in zip(found["picture"], found["box"], found["score"], strict=True):
            print(f"  {score:.3f}  {name}  {[round(side) for side in box]}")
    for name, value in report.items():
        print(f"{name:<28} {value:,.2f}" if isinstance(value, float) else f"{name:<28} {value:,}")
    print(f"written: {folder / 'hits.png'}")
    return report


if __name__ == "__main__":
    main()
