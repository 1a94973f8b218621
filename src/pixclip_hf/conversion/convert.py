"""From a public checkpoint to a saved model: reads, converts, checks what was written, and only then names it."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from ..data.whole_files import sync, write_json
from ..modeling.configuration_pixclip import PixCLIPConfig
from ..modeling.modeling_lean import laid_out, model_of_weights
from ..modeling.modeling_pixclip import PixCLIPModel
from ..processing.image_processing_region import RegionImageProcessor
from ..processing.processing_pixclip import PixCLIPProcessor
from ..tensor_digest import add_tensor
from .alpha_clip import plan_alpha_clip
from .checkpoint import read_checkpoint
from .official_pixclip import plan_pixclip
from .open_clip import plan_open_clip
from .openai_clip import plan_clip
from .tokenizer import OPENAI_VOCABULARY, find_merges, load_tokenizer
from .weights import Plan, fill

PLANS: dict[str, Callable[..., Plan]] = {
    "alpha-clip": plan_alpha_clip,
    "pixclip": plan_pixclip,
    "clip": plan_clip,
    "open-clip": plan_open_clip,
}
DTYPES = ("float32", "float16", "bfloat16")
REPORT = "conversion_report.json"


def convert(
    source: str,
    checkpoint: str | PathLike,
    output: str | PathLike,
    *,
    dtype: str | None = None,
    tokenizer: str | PathLike | None = None,
    allow: Iterable[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Converts a checkpoint into a folder with a [`PixCLIPModel`], its processor and `conversion_report.json`.

    The folder is written beside `output` under another name, read back and compared with what was converted; only then
    does it become `output`. Whatever fails leaves no `output`.

    Args:
        source: `"alpha-clip"`, `"pixclip"`, `"clip"` or `"open-clip"`.
        checkpoint: the file; see [`read_checkpoint`].
        output: a folder that does not exist yet, or is empty.
        dtype: the precision of the saved weights, `"float32"`, `"float16"` or `"bfloat16"`; the checkpoint's own
            when None (the narrowest that holds all of its tensors without loss).
        tokenizer: folder or Hub id of the text tower's tokenizer, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`. When
            None: that of `text_model`; for a CLIP with OpenAI's vocabulary the merges of an installed
            `open_clip_torch` or `clip`; else the processor is saved without a tokenizer, and the report says so.
        allow: patterns (`*`, `?`) of names that may be left over in the checkpoint, or missing in the model.
        options: the options of the source: [`plan_alpha_clip`], [`plan_pixclip`], [`plan_clip`] or [`plan_open_clip`].

    Returns:
        The report: `source`, `checkpoint`, `prefix` that its names had, `beside` the weights in the file, `dtype`,
        `notes`, `allow`, and the account of [`fill`]: `sources` and `targets`.

    Raises:
        ValueError: an unknown source or dtype, an output that is not empty, a damaged or unsafe file, one that is not
            what it was called, weights that are left over, missing or of another shape, or a tokenizer that does not
            fit.
        TypeError: `allow` is one pattern and not a list of them.
        FileNotFoundError: no such checkpoint.
    """
    if source not in PLANS:
        raise ValueError(f"`source` must be one of {', '.join(map(repr, PLANS))}, got {source!r}.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    if isinstance(allow, str):
        raise TypeError(f"`allow` must be a list of patterns, got the text {allow!r}.")
    allow = tuple(allow)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` must be a new or empty folder, got {str(output)!r}.")
    # Beside the output: moving it there takes no copy and no time.
    unfinished = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        report, digests = _convert(source, checkpoint, unfinished, dtype, tokenizer, allow, options)
        _read_back(digests, unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file():
                sync(path)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _convert(
    source: str,
    checkpoint: str | PathLike,
    folder: Path,
    dtype: str | None,
    tokenizer: str | PathLike | None,
    allow: tuple[str, ...],
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Writes the folder. The report, and the digests of the weights that were written: nothing holds the weights
    themselves any more when they are read back."""
    given = read_checkpoint(checkpoint)
    about = {"checkpoint": given.path.name, "prefix": given.prefix, "beside": list(given.beside)}
    plan = PLANS[source](given, **options)
    # The plan gives the tensors away one by one; nothing else may keep them.
    del given
    config = PixCLIPConfig(**plan.config)
    processor = _build_processor(config, plan, tokenizer, options.get("text_model"))
    wanted = getattr(torch, dtype) if dtype else plan.dtype
    layout = laid_out(partial(PixCLIPModel._from_config, dtype=wanted), config)
    weights, account = fill(layout, plan, allow)
    model = model_of_weights(layout, weights)
    report = {
        "source": source,
        **about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "notes": plan.notes,
        "allow": list(allow),
        **account,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(folder / REPORT, report)
    return report, _digests(model)


def _build_processor(
    config: PixCLIPConfig, plan: Plan, tokenizer: str | PathLike | None, text_model: str | None
) -> PixCLIPProcessor:
    # Objects of transformers by now: a configuration declares what it may be given, dicts among it.
    vision: Any = config.vision_config
    text: Any = config.text_config
    side = vision.image_size
    image_processor = RegionImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_mean=plan.image_mean or RegionImageProcessor.image_mean,
        image_std=plan.image_std or RegionImageProcessor.image_std,
    )
    loaded = None
    if text is None and tokenizer is not None:
        raise ValueError(f"`tokenizer` ({str(tokenizer)!r}) needs a text tower: `text_model` must name it.")
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer, text, config.text_pooling)
    elif text_model is not None:
        try:
            loaded = load_tokenizer(text_model, text, config.text_pooling)
        except (OSError, ValueError) as error:
            plan.notes.append(f"no tokenizer at {text_model!r}: {error}")
    elif text is not None and text.vocab_size == OPENAI_VOCABULARY and (merges := find_merges()):
        loaded = load_tokenizer(merges, text, config.text_pooling)
        plan.notes.append(f"tokenizer: OpenAI's, from {merges}")
    if text is not None and loaded is None:
        plan.notes.append("the processor has no tokenizer, text= raises: --tokenizer names one")
    return PixCLIPProcessor(image_processor, loaded, text_model_name=config.text_model_name)


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """Name of each weight of a model -> its digest."""
    digests = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256()
        add_tensor(digest, name, tensor)
        digests[name] = digest.hexdigest()
    return digests


def _read_back(digests: dict[str, str], folder: Path) -> None:
    again = _digests(AutoModel.from_pretrained(folder, dtype="auto"))
    if again != digests:
        changed = [name for name in {**digests, **again} if digests.get(name) != again.get(name)]
        raise RuntimeError(f"What was written reads back differently: {', '.join(changed)}.")
    AutoProcessor.from_pretrained(folder)
