"""Embeddings of texts, and a bounded memory of them, so that labels and templates that recur are embedded once."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch

MOST_TEXTS = 8192
_VISION_SIDE = "vision_model."


def embed_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    max_length: int | None = None,
    batch_size: int = 512,
    progress: Callable[[Sequence[torch.Tensor]], Iterable[torch.Tensor]] = iter,
) -> torch.Tensor:
    """Embeddings of texts as the model gives them.

    Texts that are equal, or that the cut to `max_length` makes equal, are embedded once: they tie exactly.

    Args:
        model: a model with `get_text_features`.
        processor: its processor, with a tokenizer.
        texts: T texts, at least one.
        max_length: most tokens of a text; None is the tokenizer's own limit.
        batch_size: texts per pass.
        progress: wraps the sequence of batches, such as a `tqdm`.

    Returns:
        `(T, D)` float32, not normalized, where the model computed them.
    """
    unique = list(dict.fromkeys(texts))
    inputs = processor(text=unique, max_length=max_length, return_tensors="pt")
    tokens = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)
    ]
    first: dict[tuple[int, ...], int] = {}
    for row, key in enumerate(tokens):
        first.setdefault(key, row)
    device = input_device(model)
    embeds = [
        model.get_text_features(
            input_ids=inputs.input_ids[rows].to(device),
            attention_mask=inputs.attention_mask[rows].to(device),
        ).pooler_output.float()
        for rows in progress(torch.tensor(list(first.values())).split(batch_size))
    ]
    numbers = {key: number for number, key in enumerate(first)}
    number_of_text = {text: numbers[key] for text, key in zip(unique, tokens, strict=True)}
    return torch.cat(embeds)[[number_of_text[text] for text in texts]]


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: where its first weights are, or the CPU while those are offloaded, since the
    hooks that load them move the inputs too."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


class EmbeddedTexts:
    """Remembers embeddings of texts as long as the weights that made them do not change.

    Several threads may share one: a text that two of them ask for is embedded once. Nothing is remembered of a model
    in training mode, whose dropout makes no two embeddings equal, or of weights whose changes cannot be seen (tensors
    made in inference mode, sharded tensors).

    Args:
        most: rows that are kept; those that were asked for the longest ago are dropped first.
    """

    def __init__(self, most: int = MOST_TEXTS):
        if most < 1:
            raise ValueError(f"`most` must be at least 1, got {most}.")
        self.most = most
        self._lock = threading.Lock()
        self._rows: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._weights: WeightsState | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in another process or by `copy.deepcopy`, starts empty: locks and weak references cannot go along.
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, model: Any, keys: Sequence[Any], embed: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        """A row `(D,)` for each key, `(T, D)` in all.

        Args:
            model: what embeds. Its weights, without those under `vision_model`, are looked at in every call.
            keys: what decides a row beside the weights: the text and every setting. At least one.
            embed: the rows `(N, D)` of N different keys; called once, with those that are not known.
        """
        with self._lock:
            weights = text_weights(model)
            if weights is None or self._weights is None or not weights.equals(self._weights):
                self._rows.clear()
            self._weights = weights
            found: dict[Hashable, Any] = {key: self._rows.get(key) for key in keys}
            if missing := [key for key, row in found.items() if row is None]:
                found.update(zip(missing, embed(missing), strict=True))
                # Another thread may have trained in between: such rows belong to no one state. And what is not a
                # number is no embedding.
                finite = all(bool(found[key].isfinite().all()) for key in missing)
                after = text_weights(model) if finite and weights is not None else None
                if after is not None and weights is not None and after.equals(weights):
                    # Copies, because a row of a batch would keep the whole batch in memory.
                    self._rows.update((key, found[key].clone()) for key in missing[-self.most :])
            for key in found:
                if key in self._rows:
                    self._rows.move_to_end(key)
            while len(self._rows) > self.most:
                self._rows.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def remembered_texts(memory: EmbeddedTexts, model: Any, processor: Any, texts: Sequence[str]) -> torch.Tensor:
    """[`embed_texts`] of texts, `(T, D)`; those that `memory` knows are not embedded again."""
    limit = getattr(processor.tokenizer, "model_max_length", None)
    keys = [(text, limit) for text in texts]
    return memory.rows(model, keys, lambda missing: embed_texts(model, processor, [text for text, _ in missing]))


class WeightsState:
    """What some tensors are at a moment: which they are, where they lie, how often they were changed in place.

    In-place changes through `tensor.data` are counted nowhere, but one value of each tensor is kept too, which any
    step of a training, and any copying of other weights, changes in some of them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], settings: Any = None):
        self.settings = settings
        self.references = [weakref.ref(tensor) for tensor in tensors]
        self.versions = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        self.values = _middle_values(tensors)

    def equals(self, other: "WeightsState") -> bool:
        """Whether both are of the same tensors in the same state."""
        if (self.versions, self.values, self.settings) != (other.versions, other.values, other.settings):
            return False
        # A tensor that is gone equals none, though another one may lie where it was.
        pairs = zip(self.references, other.references, strict=True)
        return all(one() is not None and one() is another() for one, another in pairs)


def text_weights(model: Any) -> WeightsState | None:
    """The state of all that makes the model's text embeddings; None where changes could not be seen."""
    if model.training:
        return None
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = [tensor for name, tensor in named if not name.startswith(_VISION_SIDE)]
    # Adapters can be turned off and on without any change of weights.
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters))
        for module in model.modules()
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters")
    ]
    return weights_state(tensors, adapters)


def weights_state(tensors: Sequence[torch.Tensor], settings: Any = None) -> WeightsState | None:
    """The state of some tensors; None where changes could not be seen."""
    # Tensors of inference mode count no changes, those that are made of other tensors lie nowhere themselves.
    if any(tensor.is_inference() or hasattr(tensor, "__tensor_flatten__") for tensor in tensors):
        return None
    return WeightsState(tensors, settings)


def _middle_values(tensors: Sequence[torch.Tensor]) -> list[float]:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            middle = tensor.detach()[tuple(side // 2 for side in tensor.shape)]
            by_device.setdefault(tensor.device, []).append(middle.float())
    return [value for values in by_device.values() for value in torch.stack(values).tolist()]


__all__ = [
    "MOST_TEXTS",
    "EmbeddedTexts",
    "WeightsState",
    "embed_texts",
    "input_device",
    "remembered_texts",
    "text_weights",
    "weights_state",
]
