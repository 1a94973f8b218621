"""A run that embeds a collection: what it depends on, its passes, and what became of it."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.sources import cached_source, name_source
from ..finite import check_finite_weights
from ..jobs import JobFolder, Pass, plan_shards, run_passes
from ..jobs.passes import check_engine, engine_gpus
from .encoder_choice import EncoderChoice, cached_encoder, describe_encoder
from .folder import DTYPES, FORMAT_VERSION, KINDS, SETTINGS, EmbeddingFolder, embedding_counts
from .passes import EmbedPass
from .regions import Annotations, ProposalPass, Proposals

# Both sides of a JPEG keep at least so many times the side of the encoder's square: resampling then still averages
# over several pixels.
REDUCED_SIDES = 2


def embed(
    source: str | os.PathLike | Sequence[str],
    choice: EncoderChoice,
    output: str | os.PathLike,
    *,
    regions: Any = None,
    kinds: Sequence[str] = ("region", "image"),
    dtype: str = "float16",
    reduced: bool = False,
    batch_size: int = 32,
    readers: int | None = None,
    engine: str = "local",
    workers: int = 1,
    shard_size: int = 2048,
    shard_bytes: int = 2**32,
    check: Callable[[EmbeddingFolder], object] | None = None,
    progress: bool = True,
) -> EmbeddingFolder:
    """Embeds a collection into a folder, from the first shard on that is not done.

    Args:
        source: where images come from: the words of [`load_records`], or one name.
        choice: the encoder; a GPU computes in bfloat16 where its precision is `"auto"`.
        output: the folder, described in `embedding.folder`.
        regions: where regions come from: [`Annotations`] (the default), [`Grid`], or a proposer, which takes an RGB
            image and returns regions of the record schema, such as [`DetectorProposer`] and [`SamProposer`].
        kinds: what is embedded: `"region"`, `"image"` and `"text"`, the captions.
        dtype: `"float16"` or `"float32"`, of the embeddings on disk.
        reduced: decode large JPEGs at a reduced scale, which takes a fraction of the time.
        batch_size: images per pass of the model.
        readers: processes per worker that read and process images ahead of the model; 0 for none, and when None as
            many as there are cores where a GPU embeds, and 0 elsewhere.
        engine, workers: as in [`run_passes`].
        shard_size, shard_bytes: most items and bytes of the source in a shard.
        check: called with the folder as it will be, before the first image is embedded; what it raises ends the run.
            It may look at the store that is to hold the embeddings, as [`check_store`] does.
        progress: show a bar with images per second and the time left.

    Returns:
        The folder.

    Raises:
        ValueError: a value outside its range; `output` holds a run with other settings or of a newer version, another
            process writes to it; nothing could be embedded; or the weights of the model, or an embedding, are not
            finite.
    """
    kinds = tuple(kind for kind in KINDS if kind in kinds) if set(kinds) <= set(KINDS) else tuple(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"`kinds` must be some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if readers is not None and readers < 0:
        raise ValueError(f"`readers` must be at least 0, got {readers}.")
    check_engine(engine, workers)
    output = Path(output)
    words: Any = os.fspath(source) if isinstance(source, str | os.PathLike) else tuple(source)
    words = words[0] if isinstance(words, tuple) and len(words) == 1 else words
    if (output / SETTINGS).exists():
        EmbeddingFolder.open(output)  # refuses a newer format
    # An earlier run in this process may have seen another state of the files.
    cached_source.cache_clear()
    cached_encoder.cache_clear()
    opened = cached_source(words)
    plan = plan_shards(opened.units(), shard_size, shard_bytes)

    on_gpu = torch.accelerator.is_available() if engine == "local" else engine_gpus(engine) > 0
    if choice.precision == "auto" and on_gpu:
        choice = replace(choice, precision="bfloat16")
    if readers is None:
        # A CPU that embeds has no core left for others to read on.
        readers = max((os.cpu_count() or 1) // workers - 1, 0) if on_gpu else 0
    in_process = engine == "local" and workers == 1
    # Elsewhere the workers load it; here it only says what it is.
    encoder = cached_encoder(choice) if in_process else choice.load("cpu")
    check_finite_weights(encoder.model, choice.model)
    at_least = _reduced_sides(encoder, kinds) if reduced else None
    passes: list[Pass] = []
    regions = Annotations() if regions is None else regions
    found_by = repr(regions)
    if "region" in kinds and not hasattr(regions, "read"):
        passes.append(ProposalPass(words, output, regions))
        regions = Proposals(output, found_by)
    settings = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        **describe_encoder(choice, encoder),
        "dtype": dtype,
        "kinds": list(kinds),
        "source": words if isinstance(words, str) else list(words),
        "items": len(opened),
        "items_digest": opened.items_digest,
        "left_out": dict(+opened.left_out),
        "regions": found_by if "region" in kinds else None,
        "decoded_sides": at_least,
        "shard_size": shard_size,
        "plan": plan.digest,
    }
    width = settings["width"]
    if not in_process:
        del encoder
    passes.append(EmbedPass(words, output, choice, regions, kinds, width, dtype, batch_size, readers, at_least))
    if check is not None:
        check(EmbeddingFolder(output, settings))
    folder = JobFolder(output, SETTINGS)
    with folder.claimed(settings):
        run_passes(passes, plan, folder, engine=engine, workers=workers, progress=progress)
    sums = embedding_counts(output)
    if not sum(sums[f"{kind}s"] for kind in kinds):
        reasons = "; ".join(f"{name}: {count}" for name, count in sums.items() if count and name not in ("items",))
        raise ValueError(f"Nothing of {name_source(words)!r} could be embedded ({sums['items']} items; {reasons}).")
    return EmbeddingFolder.open(output)


def _reduced_sides(encoder: Any, kinds: Sequence[str]) -> int:
    """Least sides of a decoded JPEG.

    Raises:
        ValueError: an encoder that looks at parts of an image, or a processor without a size.
    """
    if encoder.view not in (None, "mask_pooled") and "region" in kinds:
        raise ValueError(
            f"`reduced` must be False with a view of regions, which needs all pixels; got {encoder.view!r}."
        )
    processor = encoder.processor.image_processor
    if getattr(processor, "max_num_patches", None):
        # The side of a square of as many patches. An image whose aspect is kept comes out longer and narrower; so does
        # its JPEG, and more so.
        return REDUCED_SIDES * math.ceil(processor.max_num_patches**0.5 * processor.patch_size)
    size = dict(processor.size)
    sides = [side for side in (size.get("height"), size.get("width"), size.get("shortest_edge")) if side]
    if not sides:
        raise ValueError(f"`reduced` needs an image processor with a size in pixels, got {size}.")
    return REDUCED_SIDES * max(sides)
