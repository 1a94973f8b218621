"""A byte-level BPE tokenizer, trained on any captions."""

import copy
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .dataset import scene_texts

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_SMALLEST_VOCAB = 256 + 3  # every byte and the special tokens

_SCENES_FOR_TOKENIZER = 300


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, model_max_length: int = 256
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any Unicode text has tokens, there is no unknown token.

    Every text gets `<bos>` in front and `<eos>` behind; padding goes to the right. The same texts in the same order
    give the same tokenizer.

    Args:
        texts: what to learn the merges from.
        vocab_size: at least 259 (the 256 bytes and three special tokens); fewer tokens come out where the texts
            have no more pairs to merge.
        model_max_length: tokens after which the tokenizer truncates when asked to.

    Raises:
        ValueError: for too small a `vocab_size` or `model_max_length`, or no text at all.
        TypeError: for a text that is not a str.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ValueError(f"`vocab_size` must be at least {_SMALLEST_VOCAB}, got {vocab_size}")
    if model_max_length < 3:
        raise ValueError(f"`model_max_length` must be at least 3, got {model_max_length}")
    if isinstance(texts, str):
        raise TypeError("`texts` must be an iterable of str, got one str")
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` must hold at least one text, got none")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`texts[{i}]` must be a str, got {type(text).__name__}")

    tokenizer = Tokenizer(models.BPE())
    # The first word gets the space that words inside a text have, so that a label reads like part of a caption.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=model_max_length,
        padding_side="right",
    )


def scenes_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer of the scenes: 1,024 tokens at most, trained on the texts of 300 train scenes, none drawn. It is
    trained once per process; each call returns a copy."""
    return copy.deepcopy(_trained(seed))


@lru_cache(maxsize=4)
def _trained(seed: int) -> PreTrainedTokenizerFast:
    texts = []
    for index in range(_SCENES_FOR_TOKENIZER):
        scene = scene_texts(index, "train", seed)
        texts += [*scene["captions"], scene["alt_text"], *scene["descriptions"], *scene["long_captions"]]
    return train_tokenizer(texts)
