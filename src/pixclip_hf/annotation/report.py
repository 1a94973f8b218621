"""What became of a run: a table of what each stage took in, dropped and rejected, and pictures of a few records."""

import json
import os
from collections import Counter
from pathlib import Path

from ..data.sources import name_source
from ..data.whole_files import write_utf8
from ..evaluation.report import markdown_table
from ..images import open_image
from ..jobs.folder import manifests
from ..outgoing import markdown_code, plain_markdown, public_text, public_words
from ..processing.processing_regions import decode_rle
from ..visualization import draw_regions


def run_counts(output: str | os.PathLike) -> dict[str, Counter]:
    """The sums over the shards that are done: `total` (`shards`, `items`, `records`, `regions`), `counts` (by
    `stage/what`), `rejected_records` and `rejected_regions` (by `stage/reason`).

    Raises:
        ValueError: the folder holds no run.
    """
    if not Path(output, "run.json").is_file():
        raise ValueError(f"`output` must be the folder of a run, got {str(output)!r}, which has no run.json.")
    sums = {name: Counter() for name in ("total", "counts", "rejected_records", "rejected_regions")}
    for manifest in manifests(output):
        start, stop = manifest["positions"]
        sums["total"].update(shards=1, items=stop - start, records=manifest["records"], regions=manifest["regions"])
        for name in ("counts", "rejected_records", "rejected_regions"):
            sums[name].update(manifest[name])
    return sums


def report(output: str | os.PathLike, pictures: int = 4) -> str:
    """Writes `report.md` and `pictures/*.png` into the folder of a run, and returns the text.

    Args:
        output: folder of a run, finished or not.
        pictures: records to draw, spread over the shards that are done.

    Raises:
        ValueError: the folder holds no run.
    """
    output = Path(output)
    sums = run_counts(output)
    settings = json.loads((output / "run.json").read_text(encoding="utf-8"))
    total = sums["total"]
    rejected = sums["rejected_records"].total()
    lines = [
        f"# Annotation of {plain_markdown(public_words(name_source(settings['source'])))}",
        "",
        f"{total['items']} of {settings['items']} images are done: {total['records']} records with {total['regions']} "
        f"regions, {rejected} rejected records, {sums['rejected_regions'].total()} rejected regions.",
        "",
    ]
    rows = [["source", name, count] for name, count in sorted(settings["left_out"].items())]
    order = list(settings["stages"])

    def place(name: str) -> tuple[int, str]:
        stage = name.partition("/")[0]
        return order.index(stage) if stage in order else len(order), name

    kinds = {"counts": "", "rejected_records": "rejected record: ", "rejected_regions": "rejected region: "}
    entries = [(name, kind) for kind in kinds for name in sums[kind]]
    for name, kind in sorted(entries, key=lambda entry: place(entry[0])):
        stage, _, what = name.partition("/")
        rows.append([stage, kinds[kind] + " ".join(what.split()), sums[kind][name]])
    lines.append(markdown_table(["stage", "what", "number"], rows))
    names = draw_records(output, pictures)
    if names:
        lines += ["", *(f"![{name}](pictures/{name})" for name in names)]
    lines += [
        "",
        "The stages:",
        "",
        *(f"- `{markdown_code(public_text(stage))}`" for stage in settings["stages"].values()),
    ]
    text = "\n".join(lines) + "\n"
    # The name of a folder may be no UTF-8.
    write_utf8(output / "report.md", text, errors="backslashreplace")
    return text


def draw_records(output: Path, number: int) -> list[str]:
    """Draws the first record of as many shards, spread over the run; returns the names of the files."""
    from pyarrow import parquet

    shards = [path for path in sorted((output / "data").glob("*.parquet")) if parquet.read_metadata(path).num_rows]
    chosen = shards[:: max(1, -(-len(shards) // max(number, 1)))][:number]
    folder = output / "pictures"
    if chosen:
        folder.mkdir(exist_ok=True)
    names = []
    for path in chosen:
        record = next(parquet.ParquetFile(path).iter_batches(batch_size=1)).to_pylist()[0]
        regions = record["regions"]
        masks = [region["mask"] for region in regions]
        names.append(f"{path.stem.removeprefix('train-')}.png")
        draw_regions(
            folder / names[-1],
            open_image(record["image"]),
            [region["box"] for region in regions],
            [[(_shown(region), region["score"])] for region in regions],
            {},
            masks=[decode_rle(mask) for mask in masks] if None not in masks else None,
            title=record["record_id"],
        )
    return names


def _shown(region: dict) -> str:
    text = region["long_caption"] or region["caption"] or region["category"] or ""
    return text if len(text) <= 160 else text[:157] + "…"
