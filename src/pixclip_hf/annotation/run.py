"""A run over a source: shards written whole or not at all, so that a run that was killed continues where it stopped.

A folder of a run holds

- `data/train-00000.parquet`, …: records in the schema, with `record_id` and `steps` (what made them);
- `rejected/rejected-00000.parquet`, …: records and single regions that a stage rejected, with the reason and the raw
  answer, without the image;
- `shards/00000.json`, …: what became of a shard; written last, it says that the shard is done;
- `run.json`: everything that the output depends on. A run continues only if it is the same.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled

from ..data.sources import cached_source, name_source
from ..jobs import JobFolder, plan_shards, run_passes
from ..jobs.passes import check_engine, engine_gpus
from .passes import annotation_passes
from .sources import ReadRecords
from .stages import Stage


def annotate(
    source: str | Sequence[str],
    stages: Sequence[Stage],
    output: str | os.PathLike,
    *,
    engine: str = "local",
    workers: int = 1,
    shard_size: int = 50,
    shard_bytes: int = 2**30,
    progress: bool = True,
) -> Path:
    """Runs stages over a source into a folder, from the first shard on that is not done.

    Args:
        source: where images come from: the words of [`load_records`], or one name.
        stages: what follows the source.
        output: folder of the run.
        engine, workers: as in [`run_passes`]. With Ray and GPUs, each stage that asks for a GPU has actors of its own;
            where they are more than GPUs, they share them.
        shard_size: most items of the source in a shard.
        shard_bytes: most bytes of the source in a shard, where the source knows its bytes.
        progress: show a bar.

    Returns:
        `output`.

    Raises:
        ValueError: `output` holds a run of other stages, source or shard size, the source lists other items than when
            that run began, or another process writes to it; or an unknown engine.
    """
    for name, value in (("shard_size", shard_size), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    check_engine(engine, workers)
    output = Path(output)
    # One word is the same source as a list or alone: its run continues either way.
    words = source if isinstance(source, str) else tuple(source) if len(source) > 1 else source[0]
    cached_source.cache_clear()  # an earlier run in this process may have seen another state of the files
    opened = cached_source(words)
    stages = [ReadRecords(words), *stages]
    plan = plan_shards(opened.units(), shard_size, shard_bytes)
    settings = {
        "source": name_source(words),
        "items": len(opened),
        "items_digest": opened.items_digest,
        "left_out": dict(+opened.left_out),
        "shard_size": shard_size,
        "stages": {stage.name: repr(stage) for stage in stages},
    }
    if plan.digest != plan_shards([(len(opened), None)], shard_size).digest:
        settings["plan"] = plan.digest  # shards that the number of items alone does not tell
    folder = JobFolder(output, "run.json", ("data", "rejected"))
    bars_shown = not are_progress_bars_disabled()
    disable_progress_bars()  # one bar per shard and table is too many
    try:
        with folder.claimed(settings):
            passes = annotation_passes(stages, output, engine_gpus(engine))
            run_passes(passes, plan, folder, engine=engine, workers=workers, progress=progress)
    finally:
        if bars_shown:
            enable_progress_bars()
    return output
