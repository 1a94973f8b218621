"""Models built from weights that are there already: every weight is held once, and none is drawn to be overwritten."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import find_adapter_config_file, logging

from .modeling_stored import STORED, StoredWeight, can_map_files, safetensors_files, stored_weights


def laid_out(build: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without memory: its modules, and the names, shapes and types of its weights."""
    with torch.device("meta"), init.no_init_weights():
        return build(config)


def model_of_weights(layout: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A model in evaluation mode that takes over the tensors of a state dict. Only weights that are not in it start
    anew.

    Args:
        layout: the model, see [`laid_out`], of the type that it is to have. It is the one that is returned unless
            transformers must place the weights or keep some of them in another type.
        state: tensors by the model's names, each of its shape.

    Raises:
        ValueError: tensors that the model does not have, or of another shape.
    """
    if _is_placed() or _mixes_types(layout, layout.dtype):
        return _model_by_transformers(layout, state)
    types = {name: weight.dtype for name, weight in layout.state_dict().items()}
    take_over(layout, {name: value.to(types.get(name)) for name, value in state.items()})
    tied = layout.all_tied_weights_keys
    missing = {name for name in types if name not in state}
    for name, module in layout.named_modules():
        for own, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None or not weight.is_meta:
                continue
            if (f"{name}." if name else "") + own in tied:
                # Takes another weight's place below, and drawing it would be for nothing.
                weight._is_hf_initialized = True
            else:
                memory = torch.empty_like(weight, device="cpu")
                if isinstance(weight, nn.Parameter):
                    memory = nn.Parameter(memory, requires_grad=weight.requires_grad)
                setattr(module, own, memory)
    layout.initialize_weights()
    layout.tie_weights(missing_keys=missing, recompute_mapping=False)
    return layout.eval()


def take_over(layout: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Puts tensors into a model by its names, not as copies, and marks them as weights that are not to be drawn.

    Raises:
        ValueError: tensors that the model does not have, or of another shape.
    """
    targets = layout.state_dict()
    wrong = [
        f"{name} {tuple(value.shape)}"
        for name, value in state.items()
        if name not in targets or targets[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{type(layout).__name__} has no weights of these names and shapes: {', '.join(wrong)}.")
    for name, value in state.items():
        path, _, own = name.rpartition(".")
        module = layout.get_submodule(path)
        weight: Any = value.detach()
        if own in module._parameters:
            weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        # What `initialize_weights` goes by.
        weight._is_hf_initialized = True
        setattr(module, own, weight)


def plain_weights(
    layout: PreTrainedModel, name: str, dtype: torch.dtype | str, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, StoredWeight], list[str]] | None:
    """The weights of a checkpoint, none of them read, where nothing has to be done with them but to give them to a
    model.

    Args:
        layout: the checkpoint's model, see [`laid_out`].
        name: folder or Hub id.
        dtype: the type that the weights will have.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The weights by the model's names, with the names that are left over in the checkpoint. None where
        [`load_converted`] must load it: what is quantized, split or merged, has an adapter, keeps some weights in
        another type, lacks some, or is named or shaped in another way than the model; files that are not safetensors
        or should not be mapped; `dtype="auto"`.
    """
    if isinstance(dtype, str) or _is_special(layout.config) or _is_placed() or _mixes_types(layout, dtype):
        return None
    if not can_map_files() or find_adapter_config_file(name, **hub_kwargs) is not None:
        return None
    if not all(isinstance(change, WeightRenaming) for change in get_model_conversion_mapping(layout)):
        return None
    targets, prefix = layout.state_dict(), f"{layout.base_model_prefix}."
    # Older versions of transformers stored buffers that the model computes.
    computed = {name for name, _ in layout.named_buffers()} - targets.keys()
    ignored = [re.compile(pattern) for pattern in layout._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, StoredWeight] = {}
    left_over = []
    for key, weight in stored_weights(name, hub_kwargs).items():
        # A head may have been saved with the model, or the model without the head that it has here.
        names = (key.removeprefix(prefix), prefix + key, key)
        target = next((name for name in names if name in targets), None)
        if target is not None:
            if target in found or weight.dtype is None or weight.shape != tuple(targets[target].shape):
                return None
            found[target] = weight
        elif computed.isdisjoint(names) and not any(pattern.search(key) for pattern in ignored):
            left_over.append(key)
    if found.keys() != targets.keys() or any(target.dtype != layout.dtype for target in targets.values()):
        return None
    return found, left_over


def _is_special(config: Any) -> bool:
    """Whether a checkpoint names its files or the type of its weights in a way of its own."""
    return bool(getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None))


def _is_placed() -> bool:
    """Whether the weights of a new model belong elsewhere than in the memory of this process: on the default device
    that a caller set, or distributed over processes."""
    return torch.get_default_device().type != "cpu" or is_deepspeed_zero3_enabled() or is_fsdp_enabled()


def _mixes_types(layout: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a model of fewer than 32 bits keeps some of its weights in float32."""
    kept = layout._keep_in_fp32_modules or layout._keep_in_fp32_modules_strict
    return bool(kept) and dtype.itemsize < 4


def _model_by_transformers(layout: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    with _without_load_report():
        model = type(layout).from_pretrained(None, config=layout.config, state_dict=state, dtype=layout.dtype)
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
    if dtype == "auto" or _is_special(config):
        return None
    slices, converted = {}, False
    for path in safetensors_files(name, hub_kwargs):
        # `pread` copies out of the file, where a mapping would keep its pages.
        file = safe_open(path, framework="pt", device="cpu", backend="pread")
        for key in file.keys():  # noqa: SIM118 - a file and not a dict
            slices[key] = file.get_slice(key)
            converted |= STORED.get(slices[key].get_dtype(), dtype) != dtype
    return slices if converted else None
