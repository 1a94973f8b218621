"""A run over a source: shards written whole or not at all, so that a run that was killed continues where it stopped.

A folder of a run holds

- `data/train-00000.parquet`, …: records in the schema, with `record_id` and `steps` (what made them);
- `rejected/rejected-00000.parquet`, …: records and single regions that a stage rejected, with the reason and the raw
  answer, without the image;
- `shards/00000.json`, …: what became of a shard; written last, it says that the shard is done;
- `run.json`: everything that the output depends on. A run continues only if it is the same.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..data.parquet_shards import write_parquet
from ..data.sources import name_source
from ..data.whole_files import UNFINISHED, whole_file
from ..record import record_features, validate_record
from .engines import run_stages
from .sources import ReadRecords, cached_source
from .stages import Stage

_STAGE = "run"
_FOLDERS = ("data", "rejected", "shards")


def annotate(
    source: str | Sequence[str],
    stages: Sequence[Stage],
    output: str | os.PathLike,
    *,
    engine: str = "local",
    workers: int = 1,
    shard_size: int = 50,
    progress: bool = True,
) -> Path:
    """Runs stages over a source into a folder, from the first shard on that is not done.

    Args:
        source: where images come from: the words of [`load_records`], or one name.
        stages: what follows the source.
        output: folder of the run.
        engine, workers: as in [`run_stages`].
        shard_size: items of the source in a shard.
        progress: show a bar.

    Returns:
        `output`.

    Raises:
        ValueError: `output` holds a run of other stages, source or shard size, the source lists other items than when
            that run began, or another process writes to it.
    """
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
    output = Path(output)
    # One word is the same source as a list or alone: its run continues either way.
    words = source if isinstance(source, str) else tuple(source) if len(source) > 1 else source[0]
    cached_source.cache_clear()  # an earlier run in this process may have seen another state of the files
    opened = cached_source(words)
    stages = [ReadRecords(words), *stages]
    total = len(opened)
    settings = {
        "source": name_source(words),
        "items": total,
        "items_digest": opened.items_digest,
        "left_out": dict(+opened.left_out),
        "shard_size": shard_size,
        "stages": {stage.name: repr(stage) for stage in stages},
    }
    for name in _FOLDERS:
        (output / name).mkdir(parents=True, exist_ok=True)
    bars_shown = not are_progress_bars_disabled()
    disable_progress_bars()  # one bar per shard and stage is too many
    try:
        with FileLock(output / ".lock", timeout=0):
            _start_or_continue(output, settings)
            shards = {
                i: range(start, min(start + shard_size, total)) for i, start in enumerate(range(0, total, shard_size))
            }
            open_shards = {i: rows for i, rows in shards.items() if not _manifest(output, i).exists()}
            left = sum(map(len, open_shards.values()))
            with tqdm(total=total, initial=total - left, unit="image", disable=not progress) as bar:
                for shard, rows in run_stages(engine, stages, open_shards, workers) if open_shards else ():
                    write_shard(output, shard, open_shards[shard], rows)
                    bar.update(len(rows))
    except Timeout as error:
        raise ValueError(f"`output` {str(output)!r} is being written to by another process.") from error
    finally:
        if bars_shown:
            enable_progress_bars()
    return output


def _start_or_continue(output: Path, settings: dict[str, Any]) -> None:
    for folder in (output, *(output / name for name in _FOLDERS)):
        for leftover in folder.glob(f"*{UNFINISHED}"):  # of a run that was killed
            leftover.unlink()
    path = output / "run.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in settings:
            if name == "items_digest" and found.get(name) != settings[name]:
                raise ValueError(
                    f"`output` {str(output)!r} holds a run over other items: what {settings['source']!r} lists has "
                    "changed since it began. Choose another folder."
                )
            if found.get(name) != settings[name]:
                raise ValueError(
                    f"`output` {str(output)!r} holds a run with other settings: its {name} is {found.get(name)}, now "
                    f"{settings[name]}. Choose another folder."
                )
    else:
        _write_json(path, settings)


def _manifest(output: Path, shard: int) -> Path:
    return output / "shards" / f"{shard:05d}.json"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def output_features() -> Features:
    """The record schema, and `record_id` and `steps` of each record."""
    return Features({**record_features(), "record_id": Value("string"), "steps": _steps()})


def rejected_features() -> Features:
    """What is kept of a rejected record (`region` is None) or of a rejected region."""
    regions = record_features()["regions"]
    texts = ("record_id", "rejected_stage", "rejected_reason", "raw_answer", "alt_text")
    return Features(
        {
            **{name: Value("string") for name in texts},
            "position": Value("int64"),
            "captions": List(Value("string")),
            "region": regions.feature,
            "regions": regions,
            "steps": _steps(),
        }
    )


def _steps() -> Any:
    return List({"stage": Value("string"), "model": Value("string"), "version": Value("string")})


def write_shard(output: Path, shard: int, positions: range, rows: Dataset) -> None:
    """Writes the tables of a shard and then its manifest.

    Raises:
        RuntimeError: the rows are not those of `positions`, each once.
    """
    accepted, rejected, counts = [], [], Counter()
    if list(rows["position"]) != list(positions):
        raise RuntimeError(f"Shard {shard} must hold the positions {positions}, got {list(rows['position'])}.")
    for row in rows:
        for entry in row["counts"] or ():
            counts[entry["name"]] += entry["count"]
        rejected += [
            {**region, "record_id": row["record_id"], "position": row["position"], "steps": row["steps"]}
            for region in row["rejected_regions"] or ()
        ]
        record = {name: row[name] for name in record_features()}
        stage, reason = row["rejected_stage"], row["rejected_reason"]
        if stage is None:
            stage, reason = _final_check(record)
        if stage is None:
            accepted.append({**record, "record_id": row["record_id"], "steps": row["steps"]})
        else:
            kept = {name: row[name] for name in ("record_id", "position", "raw_answer", "captions", "alt_text")}
            reasons = {"rejected_stage": stage, "rejected_reason": reason}
            rejected.append({**kept, **reasons, "regions": row["regions"], "steps": row["steps"]})
    _write_table(output / "data" / f"train-{shard:05d}.parquet", accepted, output_features())
    _write_table(output / "rejected" / f"rejected-{shard:05d}.parquet", rejected, rejected_features())
    whole = [row for row in rejected if row.get("region") is None]
    manifest = {
        "positions": [positions.start, positions.stop],
        "records": len(accepted),
        "regions": sum(len(record["regions"]) for record in accepted),
        "rejected_records": _reasons(whole),
        "rejected_regions": _reasons(row for row in rejected if row.get("region") is not None),
        "counts": dict(sorted(counts.items())),
    }
    _write_json(_manifest(output, shard), manifest)


def _final_check(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """(stage, reason) of a record that can't go into the dataset, else two None."""
    if not record["regions"]:
        return _STAGE, "no region left"
    try:
        validate_record(record)
    except (TypeError, ValueError) as error:
        return _STAGE, f"not in the record schema: {error}"
    return None, None


def _reasons(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(f"{row['rejected_stage']}/{row['rejected_reason']}" for row in rows).items()))


def _write_table(path: Path, rows: Sequence[dict[str, Any]], features: Features) -> None:
    with whole_file(path) as unfinished:
        write_parquet(unfinished, rows, features)
