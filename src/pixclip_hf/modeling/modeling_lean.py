"""Models built from weights that are there already: every weight is held once, and none is drawn to be overwritten."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

# Names of floating-point types in the headers of safetensors files.
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def laid_out(build: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without memory: its modules, and the names, shapes and types of its weights."""
    with torch.device("meta"), init.no_init_weights():
        return build(config)


def model_of_weights(
    model_class: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model in evaluation mode that takes over the tensors of a state dict. Only weights that are not in it start
    anew.

    Args:
        model_class: a class of [`PreTrainedModel`].
        config: its configuration.
        state: tensors by the model's names, each of its shape and of `dtype`.
        dtype: of the model.
    """
    with _without_load_report():
        model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    # As in a model that was built from its configuration: it comes from no folder.
    model.name_or_path = model.config.name_or_path = ""
    model._weight_conversions = None
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers would list every weight that starts anew. Those that a checkpoint could have had are warned of by
    name where the state dict is made; the others start anew in every model."""
    reporter = logging.get_logger("transformers.modeling_utils")

    def nothing(record: LogRecord) -> bool:
        return False

    reporter.addFilter(nothing)
    try:
        yield
    finally:
        reporter.removeFilter(nothing)


def load_converted(
    model_class: Any, name: str, config: Any, dtype: torch.dtype | str, hub_kwargs: dict[str, Any], **options: Any
) -> Any:
    """What `model_class.from_pretrained` returns, without holding converted weights twice.

    transformers maps the files of a checkpoint into memory. Weights that are used as they are stored are then never
    copied, but of those that it converts, both forms stay resident until the last one is read. Here each of them is
    let go when it is converted, shard by shard.

    Args:
        model_class: the class of the checkpoint's model, and none of the auto classes.
        name: folder or Hub id.
        config: the checkpoint's configuration.
        dtype: the type that the weights will have.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
        options: other arguments of `from_pretrained`.
    """
    slices = weights_to_convert(name, config, dtype, hub_kwargs)
    if slices is None:
        return model_class.from_pretrained(name, dtype=dtype, **options, **hub_kwargs)
    loaded = model_class.from_pretrained(None, config=config, state_dict=slices, dtype=dtype, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = name
    return loaded


def weights_to_convert(
    name: str, config: Any, dtype: torch.dtype | str, hub_kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The weights of a checkpoint that are stored in another type than they are to have, each read when it is asked
    for. Arguments as in [`load_converted`].

    Returns:
        Unread slices of the files by name, of all weights as soon as one is to be converted; None where none is, for
        checkpoints that are not safetensors, for quantized ones, and for `dtype="auto"`.
    """
    special = getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None)
    if dtype == "auto" or special:
        return None
    slices, converted = {}, False
    for path in _safetensors_files(name, hub_kwargs):
        # `pread` copies out of the file, where a mapping would keep its pages.
        file = safe_open(path, framework="pt", device="cpu", backend="pread")
        for key in file.keys():  # noqa: SIM118 - a file and not a dict
            slices[key] = file.get_slice(key)
            converted |= STORED.get(slices[key].get_dtype(), dtype) != dtype
    return slices if converted else None


def _safetensors_files(name: str, hub_kwargs: dict[str, Any]) -> list[str]:
    """The shards of a checkpoint, in the order in which transformers looks for them; none if it has no safetensors."""
    options: Any = {**hub_kwargs, "_raise_exceptions_for_missing_entries": False}
    if path := cached_file(name, SAFE_WEIGHTS_NAME, **options):
        return [path]
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options):
        return get_checkpoint_shard_files(name, index, **hub_kwargs)[0]
    return []
