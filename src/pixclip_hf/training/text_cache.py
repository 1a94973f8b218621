"""Pooled text states of a frozen LLM, computed once, kept in memory-mapped Arrow files."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.whole_files import file_fault, file_record, whole_file, write_json
from ..finite import check_finite, check_finite_weights
from ..modeling.configuration_region_text import TEXT_POOLINGS, check_choice, pooled_width
from ..modeling.modeling_text import encode_text
from ..processing.processing_text import lowers_in_name_only
from .llm import load_text_model, text_model_revision

logger = logging.get_logger(__name__)

# A tokenizer without a limit reports int(1e30).
_UNLIMITED = 10**20


def text_hash(text: str) -> str:
    """128 bits of a text's digest, in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TextEmbeddingCache:
    """The pooled, not yet projected states of texts under one frozen LLM, on disk.

    Every key (model, revision, pooling, length, direction, precision) has a sub-folder of its own, so that states of
    another key are never reused. Its files are written whole or not at all, so that a run that was
    killed continues where it was; several ranks share the work and need one file system. States are kept in float32.

    Args:
        folder: holds the caches of any number of models.
        text_model: the LLM: Hub id, or folder, whose content counts as its revision.
        pooling: as `config.text_pooling` of the model to train.
        max_length: most tokens of a text; the tokenizer's own limit when None.
        bidirectional: as `config.bidirectional` of the model to train.
        dtype: precision in which the LLM computes.
        quantization: None, `"4bit"` or `"8bit"`; see [`quantization_config`].
        revision: the revision of a Hub id.

    Raises:
        ValueError: an unknown pooling, no limit to the length of a text, or a sub-folder of this key that holds the
            states of another one.
    """

    def __init__(
        self,
        folder: str | PathLike,
        text_model: str,
        *,
        pooling: str = "mean",
        max_length: int | None = None,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
        revision: str | None = None,
    ):
        check_choice("pooling", pooling, TEXT_POOLINGS)
        self.text_model = str(Path(text_model).resolve()) if Path(text_model).is_dir() else text_model
        self.dtype, self.quantization, self.revision = dtype, quantization, revision
        self.tokenizer = _load_tokenizer(self.text_model, revision)
        if max_length is None:
            max_length = self.tokenizer.model_max_length
        if not 0 < max_length < _UNLIMITED:
            raise ValueError(
                f"`max_length` must be a number of tokens (`--text_max_length`), for the tokenizer has no limit; got "
                f"{max_length}."
            )
        config = AutoConfig.from_pretrained(self.text_model, revision=revision)
        self.width = pooled_width(getattr(config, "text_config", None) or config)
        self.key: dict[str, Any] = {
            "text_model_name": self.text_model,
            "revision": text_model_revision(self.text_model, revision),
            "text_pooling": pooling,
            "max_length": int(max_length),
            "bidirectional": bidirectional,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": quantization,
        }
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder, digest[:16])
        self._parts: dict[Path, Dataset] = {}
        self._check_folder()
        self._open()

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._hashes)

    def __contains__(self, text: str) -> bool:
        return bool(self._find([text])[1].all())

    def check(self, config: Any) -> None:
        """Refuses a model that these states are not for.

        Args:
            config: the configuration of a [`CLOCModel`] or [`PixCLIPModel`].

        Raises:
            ValueError: another LLM, pooling, direction or width; names what differs.
        """
        own = {name: self.key[name] for name in ("text_pooling", "bidirectional")} | {"text_hidden_size": self.width}
        if config.text_model_name is not None:
            own["text_model_name"] = self.text_model
        differing = [f"{name} {own[name]!r}, not {getattr(config, name)!r}" for name in own
                     if own[name] != getattr(config, name)]  # fmt: skip
        if differing:
            raise ValueError(f"The text cache holds other states than the model expects: {'; '.join(differing)}.")

    def fill(self, texts: Iterable[str], batch_size: int = 32, texts_per_file: int = 1024) -> int:
        """Computes the states of those texts that are not there yet; the LLM is loaded only if there are any.

        To be called on every rank with the same texts.

        Args:
            texts: any texts, repeated or not.
            batch_size: texts that the LLM reads at a time; they are of about one length.
            texts_per_file: how much a kill can lose.

        Returns:
            The number of texts that this rank computed.

        Raises:
            TypeError, ValueError: a text that is no str, or gives no tokens; or an LLM whose weights, or whose states
                of a text, are not finite: float16 ends at 65,504, which the states of some LLMs exceed.
        """
        state = PartialState()
        todo: dict[str, str] = {}
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"`texts` must be str, got {text!r:.80}.")
            # A rank's share is decided by the text alone: what other ranks have written by now does not matter.
            digest = text_hash(text)
            if int(digest, 16) % state.num_processes == state.process_index:
                todo[digest] = text
        found = self._find_hashes(list(todo))[1]
        # The longest first: what does not fit into memory fails at once.
        missing = sorted(
            (item for item, known in zip(todo.items(), found, strict=True) if not known),
            key=lambda item: -len(item[1]),
        )
        if missing:
            self._compute(missing, batch_size, texts_per_file, state)
        for path in self._damaged:
            for file in (path, path.with_suffix(".json")):
                file.unlink(missing_ok=True)
        state.wait_for_everyone()
        self._open()
        return len(missing)

    def states(self, texts: Sequence[str]) -> Tensor:
        """States `(T, width)` of texts, float32.

        Raises:
            ValueError: a text that is not in the cache, or whose states there are not finite.
        """
        if not len(texts):
            return torch.zeros(0, self.width)
        rows, found = self._find(texts)
        if not found.all():
            first = texts[int(np.argmin(found))]
            raise ValueError(
                f"{(~found).sum()} of {len(texts)} texts are not in the text cache {str(self.folder)!r}, the first is "
                f"{first!r:.80}: call `fill` with them."
            )
        states = torch.from_numpy(self._table[rows]["state"])
        check_finite(states, f"The text cache {str(self.folder)!r} must be deleted: its state of", texts)
        return states

    def _find(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._find_hashes([text_hash(text) for text in texts])

    def _find_hashes(self, hashes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Row of each hash, and whether it is there."""
        wanted = np.array(hashes, dtype="S32")
        if not len(self._hashes):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
        places = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return self._rows[places], self._hashes[places] == wanted

    def _check_folder(self) -> None:
        path = self.folder / "key.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            differing = [f"{name} {stored.get(name)!r}, not {value!r}" for name, value in self.key.items()
                         if stored.get(name) != value]  # fmt: skip
            if differing:
                raise ValueError(f"{str(self.folder)!r} holds the states of another model: {'; '.join(differing)}.")

    def _open(self) -> None:
        self._damaged = []
        paths = sorted(self.folder.glob("*.arrow"))
        for path in paths:
            if path in self._parts:
                continue  # its checksum held before, and takes long to compute for many texts
            fault = _fault(path)
            if fault is None:
                self._parts[path] = Dataset.from_file(str(path))
            else:
                logger.warning(f"{str(path)!r} of the text cache {fault}: its states are computed again.")
                self._damaged.append(path)
        parts = [self._parts[path] for path in paths if path in self._parts]
        self._table: Any = concatenate_datasets(parts).with_format("numpy") if parts else None
        columns = [part.data.column("hash").to_pylist() for part in parts]
        hashes = np.array([entry for column in columns for entry in column], dtype="S32")
        # Two runs at a time may have computed a text twice: the first one counts.
        self._hashes, self._rows = np.unique(hashes, return_index=True)

    def _compute(
        self, missing: list[tuple[str, str]], batch_size: int, texts_per_file: int, state: PartialState
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").is_file():
            write_json(self.folder / "key.json", self.key)
        model = load_text_model(
            self.text_model, self.dtype, self.key["bidirectional"], self.quantization, revision=self.revision
        )
        check_finite_weights(model, "text_model")
        if self.quantization is None:
            model.to(state.device)
        features = Features({"hash": Value("string"), "state": List(Value("float32"), length=self.width)})
        cut = 0
        with logging.tqdm(
            total=len(missing), desc="text states", unit="text", disable=not state.is_local_main_process
        ) as bar:
            for start in range(0, len(missing), texts_per_file):
                part = missing[start : start + texts_per_file]
                path = self.folder / f"{part[0][0]}-{uuid4().hex[:8]}.arrow"
                with whole_file(path) as unfinished, ArrowWriter(features=features, path=str(unfinished)) as writer:
                    for first in range(0, len(part), batch_size):
                        hashes, texts = zip(*part[first : first + batch_size], strict=True)
                        states, over = self._encode(model, list(texts))
                        writer.write_batch({"hash": list(hashes), "state": list(states)})
                        cut += over
                        bar.update(len(texts))
                    writer.finalize()
                write_json(path.with_suffix(".json"), file_record(path))
        if cut:
            logger.warning(f"{cut} of {len(missing)} texts exceed {self.key['max_length']} tokens and were cut.")
        del model
        clear_device_cache(garbage_collection=True)

    @torch.inference_mode()
    def _encode(self, model: Any, texts: list[str]) -> tuple[np.ndarray, int]:
        limit = self.key["max_length"]
        if lowers_in_name_only(self.tokenizer):
            texts = [text.lower() for text in texts]
        inputs = self.tokenizer(
            texts,
            truncation=True,
            max_length=limit,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        if not inputs.attention_mask.any(-1).all():
            empty = int(inputs.attention_mask.any(-1).int().argmin())
            raise ValueError(f"`texts` must give tokens, got {texts[empty]!r:.80}.")
        pooled = encode_text(model, inputs.input_ids, inputs.attention_mask, self.key["text_pooling"]).pooler_output
        full = [text for text, mask in zip(texts, inputs.attention_mask, strict=True) if mask.sum() == limit]
        over = sum(len(self.tokenizer(text, verbose=False)["input_ids"]) > limit for text in full)
        check_finite(pooled, "The state of the text", texts, pooled.dtype)
        return pooled.float().cpu().numpy(), over


def _fault(path: Path) -> str | None:
    """What is wrong with a file of states, in words that follow its name, or None."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = None  # of an earlier version, or of a run that was killed in between
    except (ValueError, RecursionError):
        return file_fault(path, None)
    if record is not None:
        return file_fault(path, record)
    try:
        Dataset.from_file(str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"can't be read ({error})"
    return None


def _load_tokenizer(text_model: str, revision: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(text_model, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
