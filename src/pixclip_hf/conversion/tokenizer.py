"""The tokenizer of a converted text tower: from a folder, the Hub, or OpenAI's list of merges."""

import gzip
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = "bpe_simple_vocab_16e6.txt.gz"
# 2 x 256 bytes, 48,894 merges, start and end of text.
OPENAI_VOCABULARY = 49408


def find_merges() -> Path | None:
    """OpenAI's list of merges, where an installed package (`open_clip_torch`, `clip`) brings it along."""
    for package in ("open_clip", "clip"):
        if (spec := find_spec(package)) and spec.origin and (path := Path(spec.origin).with_name(MERGES)).is_file():
            return path
    return None


def load_tokenizer(tokenizer: str | PathLike, text_config: Any, pooling: str | None) -> Any:
    """The tokenizer of a text tower, checked against it.

    Args:
        tokenizer: folder or Hub id, or OpenAI's file of merges.
        text_config: configuration of the text tower.
        pooling: `text_pooling` of the model.

    Raises:
        ValueError: more tokens than the tower knows, or another end token than it pools at.
        OSError: no tokenizer there.
    """
    if str(tokenizer).endswith(".txt.gz"):
        loaded = _tokenizer_from_merges(Path(tokenizer), text_config.vocab_size)
    else:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    if len(loaded) > text_config.vocab_size:
        raise ValueError(
            f"`tokenizer` ({str(tokenizer)!r}) has {len(loaded)} tokens, the text tower knows "
            f"{text_config.vocab_size}."
        )
    if pooling == "eos" and loaded.eos_token_id != text_config.eos_token_id:
        raise ValueError(
            f"`tokenizer` ({str(tokenizer)!r}) ends texts with token {loaded.eos_token_id}, the text tower pools at "
            f"token {text_config.eos_token_id}."
        )
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    loaded.model_max_length = min(loaded.model_max_length, text_config.max_position_embeddings)
    return loaded


def _tokenizer_from_merges(path: Path, vocabulary: int) -> CLIPTokenizer:
    """CLIP's tokenizer as OpenAI's code numbers it: bytes, bytes that end a word, merges in turn, start, end."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    merges = [tuple(line.split()) for line in lines[1 : 1 + vocabulary - 2 * 256 - 2]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
