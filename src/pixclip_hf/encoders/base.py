"""What all encoders have in common: lists and single items, batches, progress, remembered texts, forms of results."""

import logging as python_logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ..pipelines.text_embeddings import EmbeddedTexts, input_device
from .joint import Preparation, PreparedBatch
from .preparation import Parts, as_images, batches, prepared
from .protocol import Embeddings, Record
from .templates import check_templates, fill_templates

logger = logging.get_logger(__name__)


class BaseEncoder:
    """The shared part of [`RegionEncoder`] and [`ViewEncoder`], which define how their model is called.

    Args:
        model: moved to evaluation mode.
        processor: its processor.
        prompt: what prompts regions unless a call says otherwise; the first of `prompts` when None.
        max_length: tokens that texts are cut to; the limit of tokenizer or model when None.

    Raises:
        ValueError: a `prompt` that the model does not take.
    """

    prompts: tuple[str, ...]
    modes: tuple[str, ...] = ()
    view: str | None = None

    @property
    def grounds(self) -> bool:
        """Whether the model finds the boxes of texts."""
        return False

    def __init__(self, model: Any, processor: Any, prompt: str | None = None, max_length: int | None = None):
        self.model, self.processor = model.eval(), processor
        self._check("prompt", prompt, self.prompts)
        self.prompt = prompt or self.prompts[0]
        self.max_length = max_length
        self._embedded_texts = EmbeddedTexts()

    @torch.no_grad()
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
    ) -> list[Embeddings] | Embeddings:
        """Embeds the regions of images.

        Args:
            images: a list of images, each in any form of `open_image` (PIL, path, URL, array, tensor, a row of a
                dataset); or one image.
            boxes: for each image the boxes of its regions, `(R, 4)` xyxy in pixels; for one image its boxes. An image
                without regions has an empty list.
            masks: for each image the masks of its regions, in any form that the processor reads (PIL, arrays, RLE,
                polygons); for one image its masks. Where boxes are given too, the counts must match.
            prompt: what prompts the model, `"box"` (a mask becomes its tight box), `"mask"` (a box becomes a
                rectangle) or `"point"`. When None it is `"point"` where nothing but points is given, and else the
                encoder's own prompt, whatever is given.
            batch_size: images per pass.
            num_workers: processes that open and preprocess images ahead of the model.
            show_progress_bar: None shows one at the logging levels INFO and DEBUG.
            convert_to_tensor: tensors in place of numpy arrays.
            normalize_embeddings: L2-normalized rows, or the model's own lengths.
            mode: one of `modes`, for a model that has several ways to read a region.
            points: for each image the points of its regions, each a list of `[x, y]` in pixels; for one image those of
                its regions. Where boxes or masks are given too, a region has None where it lacks one of them.
            point_labels: nested alike, 1 for a point on the region, 0 for one beside it; all 1 when None.

        Returns:
            For each image `(R, D)` float32 in the memory of the CPU, `(0, D)` for an image without regions; for one
            image its `(R, D)`.

        Raises:
            FileNotFoundError, TypeError, ValueError: no boxes, masks or points, a list of another length than
                `images`, an unknown prompt or mode, or bad input; the message names the image by its index.
        """
        self._check("prompt", prompt, self.prompts)
        self._check("mode", mode, self.modes)
        items, one = as_images(images)
        if points is not None and "point" not in self.prompts:
            raise ValueError(
                f"`points` must be None: they prompt no such {type(self.model).__name__}. Make masks of them first "
                "with `masks_from_points`."
            )
        given = {"boxes": boxes, "masks": masks, "points": points, "point_labels": point_labels}
        regions = {name: [values] if one else values for name, values in given.items() if values is not None}
        if not regions:
            raise ValueError("`boxes`, `masks` or `points` must be given, got none of them.")
        for name, values in regions.items():
            if len(values) != len(items):
                raise ValueError(f"`{name}` must hold a list for each of the {len(items)} images, got {len(values)}.")
        counts = [max(_length(values[number]) for values in regions.values()) for number in range(len(items))]
        numbers = batches(range(len(items)), self._images_per_part(batch_size))
        filled = [[number for number in part if counts[number]] for part in numbers]
        parts = Parts(items, regions, [part for part in filled if part])
        usual = "point" if boxes is None and masks is None else self.prompt
        call = self._region_call(prompt or usual)
        found: dict[int, Tensor] = {}
        inputs_of_parts = prepared(call, parts, num_workers, self._shows(show_progress_bar), "regions")
        features_of_parts = self._features_of_parts(inputs_of_parts, batch_size, mode)
        for part, features in zip(parts.numbers, features_of_parts, strict=True):
            for number, rows in zip(part, features.float().cpu(), strict=True):
                found[number] = rows[: counts[number]]
        rows = [found[number] if number in found else torch.zeros(0, self.width) for number in range(len(items))]
        if normalize_embeddings:
            rows = [F.normalize(row, dim=-1) for row in rows]
        rows = [_converted(row, convert_to_tensor) for row in rows]
        return rows[0] if one else rows

    def encode_shown(self, records: Sequence[Record], batch_size: int = 32) -> Tensor:
        """Embeds records of one region each, such as crops: `(N, D)`, normalized.

        Args:
            records: each with `image` and one region.
            batch_size: images per pass.
        """
        rows = self.encode_records(records, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
        return torch.cat([torch.zeros(0, self.width), *rows])

    @torch.no_grad()
    def encode_images(
        self,
        images: Any,
        batch_size: int = 32,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        unscaled_mask: bool = False,
    ) -> Embeddings:
        """Embeds whole images.

        Args:
            images, batch_size, num_workers, show_progress_bar, convert_to_tensor, normalize_embeddings: as in
                [`RegionEncoder.encode_regions`].
            unscaled_mask: a model whose tower sees a mask gets one of 1.0 *behind* its scaling, as in PixCLIP's
                published retrieval scripts, in place of all ones before it (1.92 behind it). Nothing for other models.

        Returns:
            `(N, D)` float32; for one image `(D,)`.

        Raises:
            FileNotFoundError, TypeError, ValueError: bad input; the message names the image by its index.
        """
        items, one = as_images(images)
        parts = Parts(items, {}, batches(range(len(items)), batch_size))
        features = [torch.zeros(0, self.width)]
        for inputs in prepared(self._image_call(), parts, num_workers, self._shows(show_progress_bar), "images"):
            features.append(self._image_features(inputs, unscaled_mask).float().cpu())
        rows = torch.cat(features)
        if normalize_embeddings:
            rows = F.normalize(rows, dim=-1)
        return _converted(rows[0] if one else rows, convert_to_tensor)

    @torch.no_grad()
    def encode_texts(
        self,
        texts: str | Sequence[str],
        templates: str | Sequence[str] | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
    ) -> Embeddings:
        """Embeds texts. A text that is given again is embedded only once as long as the weights do not change.

        Args:
            texts: a text or a list of T texts.
            templates: a text or several around each of `texts`, which stands where `{}` is. An embedding is then the
                mean over the templates of normalized embeddings (Radford et al. 2021, section 3.1.4).
            max_length: most tokens of a text; `text_limit` when None.
            batch_size: texts per pass.
            show_progress_bar: None shows one at the logging levels INFO and DEBUG.
            convert_to_tensor, normalize_embeddings: as in [`RegionEncoder.encode_regions`].

        Returns:
            `(T, D)` float32; for one text `(D,)`.

        Raises:
            TypeError: a text that is no string.
            ValueError: no texts, a template without `{}`, or a processor without a tokenizer.
        """
        one = isinstance(texts, str)
        every = [texts] if isinstance(texts, str) else list(texts)
        if not every:
            raise ValueError("`texts` must hold at least one text, got none.")
        for number, text in enumerate(every):
            if not isinstance(text, str):
                raise TypeError(f"`texts[{number}]` must be a string, got {type(text).__name__}.")
        limit = self.text_limit if max_length is None else max_length
        filled_in = None if templates is None else check_templates(templates)
        embed = partial(self._embed_keys, batch_size=batch_size, show=self._shows(show_progress_bar))
        rows = self._embedded_texts.rows(self.model, [(text, filled_in, limit) for text in every], embed).cpu()
        if normalize_embeddings:
            rows = F.normalize(rows, dim=-1)
        return _converted(rows[0] if one else rows, convert_to_tensor)

    def preparation(self, regions: bool = True, images: bool = True) -> Preparation:
        """What makes the inputs of [`BaseEncoder.encode_prepared`] out of opened images and their regions, in any
        process.

        Args:
            regions, images: what is to be embedded.
        """
        return Preparation(
            self._region_arguments(),
            self._region_call(self.prompt) if regions else None,
            self._image_call() if images else None,
            by_image=self.view is not None,
            shared=self.view is None,
        )

    @torch.no_grad()
    def encode_prepared(self, batch: PreparedBatch, batch_size: int = 32) -> tuple[Tensor, Tensor | None]:
        """Embeds regions and whole images of some images, in one pass of the model where it has one for both.

        Args:
            batch: made by [`BaseEncoder.preparation`].
            batch_size: views of regions per pass, for an encoder that shows regions one by one.

        Returns:
            `(N, D)` of the N regions of all images, in their order, and `(B, D)` of whole images, None where they are
            not asked for; float32, normalized, where the model computed them (the call may return before it has).
        """
        rows, whole = [torch.zeros(0, self.width, device=input_device(self.model))], None
        found: Iterable[Tensor]
        if batch.joint:
            ((_, inputs),) = batch.parts
            features, whole = self._joint_features(inputs)
            found = [features]
        else:
            found = self._features_of_parts((inputs for _, inputs in batch.parts), batch_size, None)
        for (numbers, _), features in zip(batch.parts, found, strict=True):
            rows += [row[: batch.counts[number]] for number, row in zip(numbers, features, strict=True)]
        if batch.images is not None:
            whole = self._image_features(batch.images, False)
        regions = F.normalize(torch.cat([row.float() for row in rows]), dim=-1)
        return regions, None if whole is None else F.normalize(whole.float(), dim=-1)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarities of embeddings.

        Args:
            embeddings1 (`(N, D)` or `(D,)`), embeddings2 (`(M, D)` or `(D,)`): arrays or tensors; of any length.

        Returns:
            `(N, M)` float32.

        Raises:
            ValueError: other shapes, or two widths.
        """
        sides = []
        for name, rows in (("embeddings1", embeddings1), ("embeddings2", embeddings2)):
            rows = torch.as_tensor(rows).float().cpu()
            if rows.ndim not in (1, 2):
                raise ValueError(f"`{name}` must have shape (N, D) or (D,), got {tuple(rows.shape)}.")
            sides.append(F.normalize(rows.reshape(-1, rows.shape[-1]), dim=-1))
        if sides[0].shape[1] != sides[1].shape[1]:
            widths = " and ".join(str(side.shape[1]) for side in sides)
            raise ValueError(f"`embeddings1` and `embeddings2` must be of one width, got {widths}.")
        return sides[0] @ sides[1].T

    def text_keys(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[tuple[int, ...]], int]:
        """The tokens of each text, equal for texts that the model cannot tell apart; and how many texts were cut.

        Args:
            texts: any number.
            max_length: as in [`RegionEncoder.encode_texts`].

        Raises:
            ValueError: no tokenizer.
        """
        tokenizer, limit = self.processor.tokenizer, self.text_limit if max_length is None else max_length
        if tokenizer is None:
            raise ValueError("The processor has no tokenizer: its model takes text states, and no texts.")
        if getattr(self.processor, "lowercase_texts", False):
            texts = [text.lower() for text in texts]
        rows = tokenizer(list(texts), verbose=False)["input_ids"]
        cut = 0 if limit is None else sum(len(row) > limit for row in rows)
        if cut:
            rows = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        return [tuple(row) for row in rows], cut

    # What a kind of encoder says.
    width: int

    @property
    def text_limit(self) -> int | None:
        """Tokens that texts are cut to; None without a limit."""
        raise NotImplementedError

    def encode_records(self, records: Sequence[Record], *args: Any, **kwargs: Any) -> list[Any]:
        """See [`Encoder.encode_records`]."""
        raise NotImplementedError

    def _images_per_part(self, batch_size: int) -> int:
        """Images that are prepared and embedded together."""
        raise NotImplementedError

    def _region_call(self, prompt: str) -> Callable[..., Any]:
        """Takes `images`, `boxes` and `masks` as far as they are given, of one image or of a list, and returns what
        `_region_features` takes. Called in worker processes."""
        raise NotImplementedError

    def _region_arguments(self) -> Callable[..., Any]:
        """From the regions of each image to the arguments of `_region_call`'s result. Called in worker processes."""
        raise NotImplementedError

    def _joint_features(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """`(B, R, D)` of regions and `(B, D)` of their images; only for an encoder without a view."""
        raise NotImplementedError

    def _image_call(self) -> Callable[..., Any]:
        """Takes `images`, one or a list, and returns their `pixel_values`. Called in worker processes."""
        raise NotImplementedError

    def _region_features(self, inputs: Any, batch_size: int, mode: str | None) -> Tensor:
        """`(B, R, D)` of a part of images; rows beyond an image's regions are padding."""
        raise NotImplementedError

    def _features_of_parts(self, parts: Iterable[Any], batch_size: int, mode: str | None) -> Iterator[Tensor]:
        """`_region_features` of some parts, in their order."""
        return (self._region_features(inputs, batch_size, mode) for inputs in parts)

    def _image_features(self, inputs: Any, unscaled_mask: bool) -> Tensor:
        """`(B, D)` of whole images."""
        raise NotImplementedError

    def _text_features(self, texts: Sequence[str], limit: int | None, batch_size: int, show: bool) -> Tensor:
        """`(T, D)` float32 of texts, cut to `limit` tokens."""
        raise NotImplementedError

    def _embed_keys(self, keys: Sequence[tuple[str, tuple[str, ...] | None, int | None]], **options: Any) -> Tensor:
        """Rows of [`EmbeddedTexts`], whose keys are all of one call: text, templates, limit."""
        _, templates, limit = keys[0]
        texts = [text for text, _, _ in keys]
        if templates is None:
            return self._text_features(texts, limit, **options)
        rows = F.normalize(self._text_features(fill_templates(texts, templates), limit, **options), dim=-1)
        return rows.unflatten(0, (len(texts), len(templates))).mean(1)

    def _shows(self, show_progress_bar: bool | None) -> bool:
        if show_progress_bar is None:
            return logger.getEffectiveLevel() in (python_logging.INFO, python_logging.DEBUG)
        return show_progress_bar

    def _check(self, name: str, value: str | None, known: Sequence[str]) -> None:
        if value is None or value in known:
            return
        kind = type(self.model).__name__
        if not known:
            raise ValueError(f"`{name}` is not an option of {kind}, got {value!r}.")
        raise ValueError(f"`{name}` of {kind} must be one of {', '.join(map(repr, known))}, got {value!r}.")


def logit_scale_and_bias(model: Any) -> tuple[Tensor, Tensor | None]:
    """What the model of an encoder multiplies cosine similarities by, and what it adds to them then; the bias is None
    for a model that was trained with a softmax."""
    if hasattr(model, "get_logit_scale"):
        return model.get_logit_scale(), model.get_logit_bias()
    # CLIP and SigLIP of transformers.
    return model.logit_scale.exp(), getattr(model, "logit_bias", None)


def _length(regions: Any) -> int:
    return 0 if regions is None else len(regions)


def _converted(rows: Tensor, convert_to_tensor: bool) -> Embeddings:
    return rows if convert_to_tensor else rows.numpy()
