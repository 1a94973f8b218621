"""Encoding in shards that survive an interruption: what was embedded is read back and not computed again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.whole_files import whole_file
from ..finite import check_finite, check_finite_weights
from ..images import StoredImage, open_image
from ..pipelines.text_embeddings import WeightsState, weights_state
from ..tensor_digest import add_tensor
from .protocol import Encoder, Record
from .templates import check_templates, fill_templates

logger = logging.get_logger(__name__)


class CachedEncoder:
    """An encoder with progress bars and, with a folder, a cache of safetensors shards. What it gives are normalized
    tensors in the memory of the CPU.

    A shard is named by the hash of all that decides its embeddings: the model's weights and configuration, its
    processor and settings, and the shard's images (content, or path with size and time of change), regions and texts.
    What changes gets another name and is computed again; a run that was interrupted continues with the next shard.

    A model whose weights are not finite, and embeddings that are not, computed or read from a shard, are refused with
    a ValueError: nothing is measured on them.

    Args:
        encoder: a [`RegionEncoder`], a [`ViewEncoder`], or any other [`Encoder`].
        folder: holds the shards; no cache when None.
        shard_size: records or texts per shard.
        progress: show progress bars.
        batch_size: images and texts per pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: str | Path | None = None,
        shard_size: int = 256,
        progress: bool = True,
        batch_size: int = 32,
    ):
        if shard_size < 1:
            raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
        self.encoder, self.shard_size, self.progress, self.batch_size = encoder, shard_size, progress, batch_size
        self.folder = None if folder is None else Path(folder)
        self.computed = 0  # shards, for those who want to know what a cache saved
        # Since they were last set to 0: texts that were embedded, and those of them that were too long for the model.
        self.texts = self.cut_texts = 0
        self._weights: WeightsState | None = None
        self._finite_weights: WeightsState | None = None
        self._key = ""

    @property
    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "show_progress_bar": False, "convert_to_tensor": True}

    def encode_texts(
        self, texts: Sequence[str], templates: str | Sequence[str] | None = None, max_length: int | None = None
    ) -> Tensor:
        """`(T, D)` of texts; cut to `max_length` tokens, the encoder's own limit when None. Texts that are equal up to
        there are embedded once: they tie exactly, in whatever shards they lie.

        Args:
            texts: T texts, at least one.
            templates: as in [`RegionEncoder.encode_texts`].
            max_length: most tokens of a text.
        """
        if not texts:
            raise ValueError("`texts` must hold at least one text, got none.")
        if templates is not None:
            templates = check_templates(templates)
            rows = self.encode_texts(fill_templates(texts, templates), max_length=max_length)
            return F.normalize(rows.unflatten(0, (len(texts), len(templates))).mean(1), dim=-1)
        keys, cut = self.encoder.text_keys(texts, max_length)
        if max_length is None:
            self.texts += len(texts)
            self.cut_texts += cut
        first: dict[Any, str] = {}
        for key, text in zip(keys, texts, strict=True):
            first.setdefault(key, text)
        name = "texts" if max_length is None else f"texts cut to {max_length}"

        def encode(part: Sequence[str]) -> list[Tensor]:
            return list(self.encoder.encode_texts(part, max_length=max_length, **self._options).split(1))

        embeds = torch.cat([rows for rows, _ in self._shards(list(first.values()), name, encode, lambda text: text)])
        numbers = {key: number for number, key in enumerate(first)}
        return embeds[[numbers[key] for key in keys]]

    def encode_images(self, images: Sequence[Any], unscaled_mask: bool = False) -> Tensor:
        """`(N, D)` of whole images; `unscaled_mask` as in [`RegionEncoder.encode_images`]."""

        def encode(part: Sequence[Any]) -> list[Tensor]:
            rows = self.encoder.encode_images(part, unscaled_mask=unscaled_mask, **self._options)
            return list(rows.split(1))

        name = "images, unscaled mask" if unscaled_mask else "images"
        return torch.cat([rows for rows, _ in self._shards(images, name, encode, _image_key)])

    def encode_records(
        self,
        records: Sequence[Record],
        show: Callable[[Image.Image, Mapping[str, Any]], Record] | None = None,
        name: str = "regions",
        prompt: str | None = None,
        mode: str | None = None,
    ) -> list[Tensor]:
        """`(R, D)` of the regions of each record.

        Args:
            records: with `image` and `regions`.
            show: from an image and a region to the record of that region alone, as in `views`; the whole record is
                embedded as it is when None.
            name: the name of what is shown; part of the shard's name, and in the progress bar.
            prompt, mode: the prompt and mode of whole records, as in [`RegionEncoder.encode_regions`].
        """

        def encode(part: Sequence[Record]) -> list[Tensor]:
            if show is None:
                return self.encoder.encode_records(part, prompt=prompt, mode=mode, **self._options)
            return [self._encode_shown(record, show) for record in part]

        found = []
        name += "".join(f", {option}" for option in (prompt, mode) if option is not None)
        for rows, lengths in self._shards(records, name, encode, _record_key):
            found += rows.split(lengths)
        return found

    def find_boxes(self, image: Image.Image, texts: Sequence[str]) -> Tensor:
        """As [`RegionEncoder.find_boxes`]; not cached."""
        self._check_weights()
        return self.encoder.find_boxes(image, texts)

    def find_scored_boxes(self, image: Image.Image, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As [`RegionEncoder.find_scored_boxes`]; not cached."""
        self._check_weights()
        return self.encoder.find_scored_boxes(image, texts)

    def _encode_shown(self, record: Record, show: Callable) -> Tensor:
        image = open_image(record["image"])
        shown = [show(image, region) for region in record["regions"]]
        return self.encoder.encode_shown(shown, batch_size=self.batch_size)

    def _check_weights(self) -> None:
        """Refuses weights that are not finite; those that were looked at once are not looked at again."""
        model = getattr(self.encoder, "model", None)  # an encoder may have none
        if model is None:
            return
        weights = weights_state([*model.parameters(), *model.buffers()])
        if weights is None or self._finite_weights is None or not weights.equals(self._finite_weights):
            check_finite_weights(model)
            self._finite_weights = weights

    def _weights_key(self) -> str:
        """The fingerprint of the encoder, computed again where its weights have changed."""
        model = self.encoder.model
        weights = weights_state([*model.parameters(), *model.buffers()])
        if weights is None or self._weights is None or not weights.equals(self._weights):
            self._weights, self._key = weights, fingerprint(self.encoder)
        return self._key

    def _shards(self, items: Sequence[Any], name: str, encode: Callable, describe: Callable) -> Iterator[Any]:
        """Rows of each shard and how many of them each item has."""
        self._check_weights()
        weights_key = "" if self.folder is None else self._weights_key()
        starts = range(0, len(items), self.shard_size)
        for start in tqdm(starts, desc=f"encoding {name}", disable=not self.progress, leave=False):
            part = [items[index] for index in range(start, min(start + self.shard_size, len(items)))]
            path = None
            if self.folder is not None:
                key = json.dumps([weights_key, name, [describe(item) for item in part]])
                path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
                if (stored := _read_shard(path)) is not None:
                    check_finite(stored[0], f"The cached shard {str(path)!r}, row", range(len(stored[0])))
                    yield stored
                    continue
            rows = encode(part)
            self.computed += 1
            embeds, lengths = torch.cat(rows).contiguous(), [len(row) for row in rows]
            owners = [start + number for number, length in enumerate(lengths) for _ in range(length)]
            dtype = getattr(getattr(self.encoder, "model", None), "dtype", None)
            check_finite(embeds, f"The embedding of {name}, item", owners, dtype)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as unfinished:  # a run may end at any time
                    save_file(
                        {"embeds": embeds, "lengths": torch.tensor(lengths)},
                        unfinished,
                        {_CHECKSUM: _checksum(embeds)},
                    )
            yield embeds, lengths


_CHECKSUM = "sha256"


def _checksum(embeds: Tensor) -> str:
    return hashlib.sha256(embeds.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _read_shard(path: Path) -> tuple[Tensor, list[int]] | None:
    """What a shard of the cache holds; None where there is none, or one that is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as stored:
            embeds, lengths = stored.get_tensor("embeds"), stored.get_tensor("lengths").tolist()
            checksum = (stored.metadata() or {}).get(_CHECKSUM)
    except (SafetensorError, OSError, ValueError) as error:
        fault = f"can't be read ({error})"
    else:
        if sum(lengths) == len(embeds) and checksum in (None, _checksum(embeds)):
            return embeds, lengths
        fault = "has another content than its checksum says"
    logger.warning(f"The shard {str(path)!r} of the cache {fault}: it is computed again.")
    return None


def fingerprint(encoder: Encoder) -> str:
    """Hash of an encoder's weights, configuration, processor and settings."""
    digest = hashlib.sha256()
    for part in (
        encoder.model.config.to_json_string(),
        json.dumps(processor_key(encoder.processor)),
        encoder.settings,
    ):
        digest.update(part.encode())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def processor_key(processor: Any) -> list[str]:
    """All that decides what a processor makes of images and texts."""
    key = [processor.image_processor.to_json_string()]
    if (tokenizer := processor.tokenizer) is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        key.append(json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str())
    return key


def _image_key(image: Any) -> Any:
    if isinstance(image, str | os.PathLike):
        status = os.stat(image)
        return [os.fspath(image), status.st_size, status.st_mtime_ns]
    if isinstance(image, StoredImage):
        return [image.dataset._fingerprint, image.index]
    if isinstance(image, Image.Image):
        return [image.size, image.mode, hashlib.sha256(image.tobytes()).hexdigest()]
    raise TypeError(f"`image` must be a PIL image, a path or a StoredImage, got {type(image).__name__}.")


def _record_key(record: Record) -> Any:
    regions = [[list(map(float, region["box"])), _mask_key(region.get("mask"))] for region in record["regions"]]
    return [_image_key(record["image"]), regions]


def _mask_key(mask: Any) -> Any:
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        return [list(mask["size"]), counts.decode() if isinstance(counts, bytes) else counts]
    return mask
