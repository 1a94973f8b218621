"""What evaluation, search and pictures ask of an encoder, whatever model is behind it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

Record = Mapping[str, Any]
Embeddings = np.ndarray | Tensor


class Encoder(Protocol):
    """Embeds regions, whole images and texts into one space.

    [`RegionEncoder`] implements it for CLOC and PixCLIP, [`ViewEncoder`] for any CLIP or SigLIP, which sees a region
    in a view of its image. `encode_regions`, `encode_images` and `encode_texts` take one item or a list of them.

    Attributes:
        model, processor: what embeds; the model is in evaluation mode.
        prompts: what may prompt a region, among `"box"`, `"mask"` and `"point"`, the usual one first.
        prompt: what prompts a region unless a call says otherwise.
        modes: ways of the model to read a region, for the argument `mode`; empty where there is one way.
        view: how a region is shown to a model that knows no regions; None for a model that takes prompts.
        grounds: whether `find_boxes` and `find_scored_boxes` can be called.
        mean_color: RGB in [0, 1], the color that is 0 after normalization.
        text_limit: tokens that texts are cut to; None without a limit.
        settings: what decides the embeddings beside model and processor.
    """

    model: Any
    processor: Any
    prompts: tuple[str, ...]
    prompt: str
    modes: tuple[str, ...]
    view: str | None
    mean_color: list[float]

    @property
    def grounds(self) -> bool: ...

    @property
    def text_limit(self) -> int | None: ...

    @property
    def settings(self) -> str: ...

    def encode_regions(
        self,
        images: Any,
        boxes: Any = None,
        masks: Any = None,
        prompt: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        mode: str | None = None,
        points: Any = None,
        point_labels: Any = None,
    ) -> Any:
        """One `(R, D)` per image."""
        ...

    def encode_records(
        self,
        records: Sequence[Record],
        prompt: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        mode: str | None = None,
    ) -> list[Any]:
        """One `(R, D)` for the regions of each record of the schema."""
        ...

    def encode_shown(self, records: Sequence[Record], batch_size: int = 32) -> Tensor:
        """`(N, D)` of records of one region each, whose images show that region."""
        ...

    def encode_images(
        self,
        images: Any,
        batch_size: int = 32,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        unscaled_mask: bool = False,
    ) -> Any:
        """`(N, D)` of whole images."""
        ...

    def encode_texts(
        self,
        texts: str | Sequence[str],
        templates: str | Sequence[str] | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
    ) -> Any:
        """`(T, D)` of texts."""
        ...

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """`(N, M)` cosine similarities."""
        ...

    def text_keys(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[tuple[int, ...]], int]:
        """The tokens of each text after the cut, and how many texts were cut."""
        ...

    def find_boxes(self, image: Image.Image, texts: Sequence[str]) -> Tensor:
        """`(T, 4)`, xyxy in pixels: where each text is in an image; only where `grounds`."""
        ...

    def find_scored_boxes(self, image: Image.Image, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[`Encoder.find_boxes`] and a score `(T,)` of each, higher for texts that are there; only where `grounds`."""
        ...
