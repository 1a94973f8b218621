"""Text inputs of a processor call, and processors that work without a tokenizer."""

from typing import Any, Literal, TypedDict

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
# Text towers that read the padding behind a text too.
PADDING_READERS = ("siglip_text_model", "siglip2_text_model")
# A tokenizer without a limit reports int(1e30).
UNLIMITED = 10**20
# Ways to cut a text that has no second one.
TRUNCATIONS = (True, False, "longest_first", "only_first", "do_not_truncate")


class RegionTextKwargs(TypedDict, total=False):
    """
    What a call may say about its texts, those of the regions included; flat or in `text_kwargs`.

    Attributes:
        add_special_tokens: whether the tokenizer adds its special tokens; by default it does.
        padding: True or "longest" (the default), "max_length", or False for texts of equal length.
        truncation: True (the default) or a strategy of the tokenizer cuts longer texts to `max_length`, and a warning
            says how many; False leaves them whole.
        max_length: most tokens of a text, special ones included; None is the tokenizer's own limit.
        pad_to_multiple_of: rounds the padded length up.
        padding_side: "left" or "right"; by default the tokenizer's.
        verbose: False silences the warning about cut texts.
        return_tensors: the type of the whole batch: "pt" (the default), "np", or None for numpy arrays.
    """

    add_special_tokens: bool | None
    padding: Any
    truncation: Any
    max_length: Any
    pad_to_multiple_of: Any
    padding_side: Literal["left", "right"] | None
    verbose: bool | None
    return_tensors: str | None


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
        mapped = hasattr(self, "auto_map")
        if self.tokenizer is None:
            # The mixin saves every attribute that it lists and would ask the missing tokenizer to save itself.
            self.get_attributes = _image_processor_only
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.__dict__.pop("get_attributes", None)
            # Saving notes in the processor where the folder keeps its code. Left there, it would tell the processor
            # apart from the one that the folder gives.
            if not mapped:
                self.__dict__.pop("auto_map", None)

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


def lowers_in_name_only(tokenizer: Any) -> bool:
    """Whether a tokenizer is said to lower-case (`do_lower_case`) and does not, as Gemma's in checkpoints of SigLIP 2,
    which were trained on lower-cased texts."""
    if not tokenizer.init_kwargs.get("do_lower_case"):
        return False
    upper, lower = (tokenizer(text, verbose=False)["input_ids"] for text in ("A B C", "a b c"))
    return upper != lower


def encode_texts(
    tokenizer: Any,
    text_model_name: str | None,
    text: Any,
    region_text: list | None,
    region_counts: list[int],
    batched: bool,
    settings: dict[str, Any],
    reads_padding: bool = False,
    lowercase: bool = False,
) -> dict[str, np.ndarray]:
    """
    Tokenize the texts of a call.

    Args:
        text: a text or a list of T texts, or None.
        region_text: a text for each of the R_i regions of an image: a list of lists, or one list for one bare image.
        region_counts: R_i of each image.
        batched: the images came as a list, so `region_text` is a list of lists.
        settings: see `RegionTextKwargs`. Texts are cut as the tokenizer cuts them, and one warning says how many texts
            and tokens that were.
        reads_padding: the text tower reads the padding too: every text is filled up to the tokenizer's limit, and the
            tokens that fill it up count as its own.
        lowercase: texts are lower-cased before the tokenizer sees them.

    Returns:
        `input_ids`, `attention_mask` (T, L) and `region_input_ids`, `region_text_attention_mask` (B, R, L), int64.
        Slots after an image's last region hold the pad token and mask 0 throughout.

    Raises:
        TypeError: a text is not a str.
        ValueError: an empty text, no tokenizer or no pad token, counts that differ from the regions', or settings that
            are unknown or cannot make one tensor of these texts.
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
    named = texts + [entry for group in groups for entry in group]
    if lowercase:
        named = [(name, entry.lower()) for name, entry in named]
    limit = _limit(tokenizer, settings.get("max_length"))
    rows = _tokenize(tokenizer, named, limit, settings)
    # Texts and region texts are padded by themselves.
    parts = [part for part in (slice(0, len(texts)), slice(len(texts), None)) if rows[part]]
    length: int | None
    if reads_padding:
        length, settings = _tower_length(tokenizer, named, rows, settings), {"padding_side": "right"}
    else:
        length = _padded_length(named, rows, limit, bool(groups), settings)
    padded = [_pad(tokenizer, rows[part], length, settings, reads_padding) for part in parts]
    data = {}
    if texts:
        data["input_ids"], data["attention_mask"] = padded[0]
    if groups:
        shape = (len(groups), max(region_counts))
        filled = np.arange(shape[1]) < np.array(region_counts)[:, None]
        ids, mask = padded[-1]
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
    return _positive("max_length", max_length)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _tokenize(
    tokenizer: Any, named: list[tuple[str, str]], limit: int | None, settings: dict[str, Any]
) -> list[list[int]]:
    texts = [text for _, text in named]
    special = settings.get("add_special_tokens")
    asked = {"return_attention_mask": False, "add_special_tokens": special is None or special}
    rows = tokenizer(texts, verbose=False, **asked)["input_ids"]
    for (name, text), row in zip(named, rows, strict=True):
        if not row:
            raise ValueError(f"{name} gives no tokens, got {text!r:.80}")
    truncation = settings.get("truncation")
    if truncation is None:
        truncation = True
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {truncation!r}")
    if truncation in (False, "do_not_truncate"):
        return rows
    excess = [len(row) - limit for row in rows if limit is not None and len(row) > limit]
    if excess:
        # A second pass and not a slice: the tokenizer keeps its special tokens and its own truncation side.
        rows = tokenizer(texts, truncation=truncation, max_length=limit, **asked)["input_ids"]
        if settings.get("verbose") is not False:
            logger.warning(
                f"{len(excess)} of {len(rows)} texts exceed max_length={limit}: {sum(excess)} tokens were cut"
            )
    return rows


def _padded_length(
    named: list[tuple[str, str]],
    rows: list[list[int]],
    limit: int | None,
    has_region_texts: bool,
    settings: dict[str, Any],
) -> int | None:
    """The length that `padding` gives every text, None for that of the longest."""
    padding = settings.get("padding")
    if padding in (None, True, "longest"):
        return None
    if padding in (False, "do_not_pad"):
        if has_region_texts or len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"padding={padding!r} cannot make one tensor of texts of several lengths or of region_text"
            )
        if (multiple := settings.get("pad_to_multiple_of")) is not None:
            raise ValueError(f"pad_to_multiple_of={multiple!r} needs padding, got padding={padding!r}")
        return None
    if padding != "max_length":
        raise ValueError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
    if limit is None:
        raise ValueError("padding='max_length' needs max_length, because the tokenizer has no limit of its own")
    for (name, _), row in zip(named, rows, strict=True):
        if len(row) > limit:
            raise ValueError(
                f"{name} has {len(row)} tokens, more than padding='max_length' fills up, {limit}: set truncation=True"
            )
    return limit


def _tower_length(
    tokenizer: Any, named: list[tuple[str, str]], rows: list[list[int]], settings: dict[str, Any]
) -> int:
    """The length of all texts of a tower that reads the padding, whatever `max_length` cuts them to."""
    refused = {"padding": (None, True, "max_length"), "padding_side": (None, "right"), "pad_to_multiple_of": (None,)}
    for name, taken in refused.items():
        if (value := settings.get(name)) not in taken:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, taken))} for a text tower that reads the padding, got "
                f"{value!r}"
            )
    length = tokenizer.model_max_length
    for (name, _), row in zip(named, rows, strict=True):
        if len(row) > length:
            raise ValueError(f"{name} has {len(row)} tokens, more than the text tower takes, {length}: truncate it")
    return length


def _pad(
    tokenizer: Any, rows: list[list[int]], length: int | None, settings: dict[str, Any], as_text: bool
) -> tuple[np.ndarray, np.ndarray]:
    length = length or max(len(row) for row in rows)
    if (multiple := settings.get("pad_to_multiple_of")) is not None:
        length += -length % _positive("pad_to_multiple_of", multiple)
    side = settings.get("padding_side") or tokenizer.padding_side
    ids = np.full((len(rows), length), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        filled = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, filled] = row
        mask[i, slice(None) if as_text else filled] = 1
    return ids, mask
