"""Text inputs of a processor call, and processors that work without a tokenizer."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoImageProcessor, AutoModel
from transformers import initialization as init
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .processing_regions import split_per_image

logger = logging.get_logger(__name__)

TEXT_INPUT_NAMES = ("input_ids", "attention_mask", "region_input_ids", "region_text_attention_mask")
# A tokenizer without a limit reports int(1e30).
UNLIMITED = 10**20


class OptionalTokenizer(ProcessorMixin):
    """`ProcessorMixin` whose `tokenizer` may be None: it constructs, saves and loads all the same."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "tokenizer" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.tokenizer is None:
            output["tokenizer"] = None
        return output

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        if self.tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # The mixin saves every attribute that it lists and would ask the missing tokenizer to save itself.
        self.get_attributes = _image_processor_only
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.get_attributes

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        if processor_dict is None or processor_dict.get("tokenizer", "saved") is not None:
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), None]


def _image_processor_only() -> list[str]:
    return ["image_processor"]


def position_limit(config: Any) -> int | None:
    """Tokens that a text tower has positions for; None without a limit.

    RoBERTa and its relatives count positions from behind the id of their padding: of 514 rows they use 512.

    Args:
        config: the tower's configuration.
    """
    rows = getattr(config, "max_position_embeddings", None)
    if not isinstance(rows, int):
        return None
    if type(config) not in MODEL_MAPPING:
        return rows
    # Only the tower knows. Built without memory.
    with torch.device("meta"), init.no_init_weights():
        tower = AutoModel.from_config(config)
    for name, module in tower.named_modules():
        positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if positions and module.num_embeddings == rows and module.padding_idx is not None:
            return rows - module.padding_idx - 1
    return rows


def encode_texts(
    tokenizer: Any,
    text_model_name: str | None,
    text: Any,
    region_text: list | None,
    region_counts: list[int],
    max_length: int | None,
    padding: bool | str,
    batched: bool,
) -> dict[str, np.ndarray]:
    """
    Tokenize the texts of a call.

    Args:
        text: a text or a list of T texts, or None.
        region_text: a text for each of the R_i regions of an image: a list of lists, or one list for one bare image.
        region_counts: R_i of each image.
        max_length: tokens per text, special ones included; None is the tokenizer's own limit. Longer texts are cut as
            the tokenizer cuts them, and one warning says how many texts and tokens that were.
        padding: True or "longest", "max_length", or False for texts of one length.
        batched: the images came as a list, so `region_text` is a list of lists.

    Returns:
        `input_ids`, `attention_mask` (T, L) and `region_input_ids`, `region_text_attention_mask` (B, R, L), int64.
        Slots after an image's last region hold the pad token and mask 0 throughout.

    Raises:
        TypeError: a text is not a str.
        ValueError: an empty text, no tokenizer or no pad token, counts that differ from the regions', or a bad
            `max_length` or `padding`.
    """
    if text is None and region_text is None:
        return {}
    if tokenizer is None:
        name = "text" if text is not None else "region_text"
        model = (
            f"{text_model_name!r} (text_model_name)" if text_model_name else "a language model (no text_model_name)"
        )
        raise ValueError(
            f"{name} needs a tokenizer and this processor has none: the model takes the pooled states of {model} "
            "as text_states or region_text_states"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no pad token: set tokenizer.pad_token")
    texts = [] if text is None else _named_texts(text, "text")
    if text is not None and not texts:
        raise ValueError("text must hold at least one text, got an empty list")
    groups = []
    per_image = [] if region_text is None else split_per_image(region_text, "region_text", len(region_counts), batched)
    for i, group in enumerate(per_image):
        name = f"region_text[{i}]" if batched else "region_text"
        if not isinstance(group, list | tuple):
            raise TypeError(f"{name} must be a list with one text per region, got {group!r:.80}")
        groups.append(_named_texts(group, name))
        if len(groups[-1]) != region_counts[i]:
            raise ValueError(
                f"{name} must hold one text per region, got {len(groups[-1])} for {region_counts[i]} regions"
            )
    limit = _limit(tokenizer, max_length)
    named = texts + [entry for group in groups for entry in group]
    rows = _tokenize(tokenizer, named, limit)
    length = None
    if padding == "max_length":
        if limit is None:
            raise ValueError("padding='max_length' needs max_length, because the tokenizer has no limit of its own")
        length = limit
    elif padding not in (True, False, "longest", "do_not_pad"):
        raise ValueError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
    elif padding in (False, "do_not_pad") and (region_text is not None or len({len(row) for row in rows}) > 1):
        raise ValueError(f"padding={padding!r} cannot make one tensor of texts of several lengths or of region_text")
    data = {}
    if texts:
        data["input_ids"], data["attention_mask"] = _pad(tokenizer, rows[: len(texts)], length)
    if groups:
        shape = (len(groups), max(region_counts))
        filled = np.arange(shape[1]) < np.array(region_counts)[:, None]
        ids, mask = _pad(tokenizer, rows[len(texts) :], length)
        region_ids = np.full((*shape, ids.shape[1]), tokenizer.pad_token_id, dtype=np.int64)
        region_mask = np.zeros_like(region_ids)
        region_ids[filled], region_mask[filled] = ids, mask
        data["region_input_ids"], data["region_text_attention_mask"] = region_ids, region_mask
    return data


def _named_texts(texts: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(texts, str):
        named = [(name, texts)]
    elif isinstance(texts, list | tuple):
        named = [(f"{name}[{i}]", text) for i, text in enumerate(texts)]
    else:
        raise TypeError(f"{name} must be a str or a list of str, got {type(texts).__name__}")
    for text_name, text in named:
        if not isinstance(text, str):
            raise TypeError(f"{text_name} must be a str, got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"{text_name} must not be empty, got {text!r}")
    return named


def _limit(tokenizer: Any, max_length: int | None) -> int | None:
    if max_length is None:
        return tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else None
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ValueError(f"max_length must be a positive integer, got {max_length!r}")
    return max_length


def _tokenize(tokenizer: Any, named: list[tuple[str, str]], limit: int | None) -> list[list[int]]:
    texts = [text for _, text in named]
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    for (name, text), row in zip(named, rows, strict=True):
        if not row:
            raise ValueError(f"{name} gives no tokens, got {text!r:.80}")
    excess = [len(row) - limit for row in rows if limit is not None and len(row) > limit]
    if excess:
        # A second pass and not a slice: the tokenizer keeps its special tokens and its own truncation side.
        rows = tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
        logger.warning(f"{len(excess)} of {len(rows)} texts exceed max_length={limit}: {sum(excess)} tokens were cut")
    return rows


def _pad(tokenizer: Any, rows: list[list[int]], length: int | None) -> tuple[np.ndarray, np.ndarray]:
    length = length or max(len(row) for row in rows)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        filled = slice(length - len(row), length) if tokenizer.padding_side == "left" else slice(0, len(row))
        ids[i, filled], mask[i, filled] = row, 1
    return ids, mask
