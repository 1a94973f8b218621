"""The `region-feature-extraction` pipeline, and what it shares with the other region pipelines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from itertools import count
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .region_batches import BucketedOutputs, PreparedItems, PreparedStream, numbered

_REGION_KEYS = ("boxes", "masks", "points", "point_labels")


def is_one_image(inputs: Any) -> bool:
    """Whether `inputs` is one image (or one `{"image": ...}` item) rather than a collection of them."""
    return isinstance(inputs, (str, PathLike, Image.Image, np.ndarray, torch.Tensor, Mapping))


def image_item(image: Any, keys: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """One image with what belongs to it, as a dict.

    Args:
        image: an image in any form that the processor reads, or such a dict already.
        keys: what may belong to an image.
        given: what belongs to `image`, by these names; not together with that of a dict.

    Raises:
        ValueError: a dict with unknown keys or without an image, or something given twice.
    """
    item = dict(image) if isinstance(image, Mapping) else {"image": image}
    if unknown := sorted(map(str, item.keys() - {"image", *keys})):
        raise ValueError(f"An input dict takes the keys {', '.join(('image', *keys))}, got also {', '.join(unknown)}.")
    if item.get("image") is None:
        raise ValueError("An input dict must have an `image`, got none.")
    for name, regions in given.items():
        if regions is None:
            continue
        if item.get(name) is not None:
            raise ValueError(f"`{name}` must be given once, got it in the call and in the input dict.")
        item[name] = regions
    return item


def _region_item(image: Any, **given: Any) -> dict[str, Any]:
    """[`image_item`] of an image and its regions; `ValueError` for an image without any."""
    item = image_item(image, _REGION_KEYS, **given)
    if all(item.get(name) is None for name in ("boxes", "masks", "points")):
        raise ValueError("A region pipeline needs `boxes` or `masks`, or `points`, for every image, got none.")
    return item


class RegionPipeline(Pipeline):
    """Images with boxes, masks or points through one image pass each, whatever their number of regions.

    A subclass provides `postprocess`. The processor does the preprocessing; a batch has one row per image, with its
    regions padded.

    Several threads may call one pipeline at a time. A call keeps all that is its own, images, labels and results, in
    its own variables; what calls share, embedded texts, is behind a lock. The model must not be trained, moved or
    changed meanwhile, and an iterator over results belongs to the thread that asked for it.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self,
        boxes: Any = None,
        masks: Any = None,
        box_format: str | None = None,
        normalized: bool | None = None,
        mode: str | None = None,
        prompt: str | None = None,
        points: Any = None,
        point_labels: Any = None,
        size: Mapping[str, int] | None = None,
        max_num_patches: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params = {
            "boxes": boxes,
            "masks": masks,
            "points": points,
            "point_labels": point_labels,
            "box_format": box_format,
            "normalized": normalized,
            "prompt": prompt,
            "size": size,
            "max_num_patches": max_num_patches,
        }
        takes_patches = self.model.takes_patches
        name, value = ("size", size) if takes_patches else ("max_num_patches", max_num_patches)
        if value is not None:
            raise ValueError(f"`{name}` is not an option of a model with this vision tower, got {value!r}.")
        # The model passes keyword arguments on to the vision tower, which would swallow a `mode`.
        if mode is not None and not self.model.region_modes:
            raise ValueError(f"`mode` is not an option of {type(self.model).__name__}, got {mode!r}.")
        forward_params = {"mode": mode, "interpolate_pos_encoding": None if size is None else True}
        return given_parameters(preprocess_params), given_parameters(forward_params), {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if is_one_image(inputs):
            return super().__call__(inputs, **kwargs)
        # Regions of several images: they join their image here, since every further step sees one image at a time.
        regions = {name: kwargs.pop(name) for name in _REGION_KEYS if kwargs.get(name) is not None}
        return self.call_on_many(inputs, regions, _region_item, **kwargs)

    def call_on_many(
        self, inputs: Any, belongings: dict[str, Any], join: Callable[..., dict[str, Any]], **kwargs: Any
    ) -> Any:
        """The pipeline on a list, generator or dataset of images.

        Args:
            inputs: the images.
            belongings: what belongs to the images, by name, a list with an entry for each image of a list.
            join: from an image and what belongs to it to its dict.
            kwargs: as in a call.
        """
        if isinstance(inputs, (list, tuple)):
            items = _zip_regions(inputs, belongings, join)
            return super().__call__(items, **kwargs) if items else []
        if not isinstance(inputs, (Dataset, Iterable)):
            raise TypeError(
                f"`inputs` must be an image, a dict, or a list, generator or dataset of them, got {inputs!r:.100}."
            )
        if belongings:
            name = next(iter(belongings))
            raise ValueError(
                f"`{name}` goes with one image or a list of images; a {type(inputs).__name__} must "
                f'yield dicts {{"image": ..., "{name}": ...}}.'
            )
        if isinstance(inputs, Sized) and not isinstance(inputs, Dataset):
            return super().__call__(PipelineDataset(inputs, _unchanged, {}), **kwargs)
        return super().__call__(inputs if isinstance(inputs, Dataset) else (item for item in inputs), **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        # Not the base class's own: it batches in the order of the images, and pads on the tokenizer's side.
        prepare = partial(self.preprocess, **preprocess_params)
        dataset: Dataset
        if isinstance(inputs, Sized):
            dataset = PreparedItems(inputs, prepare)
        else:
            dataset = PreparedStream(inputs, prepare)
            num_workers = min(num_workers, 1)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_unchanged)
        outputs = BucketedOutputs(loader, partial(self.forward, **forward_params), batch_size)
        numbers = count()

        def postprocess(model_outputs: dict[str, Any], **options: Any) -> Any:
            with numbered(next(numbers)):
                return self.postprocess(model_outputs, **options)

        return PipelineIterator(outputs, postprocess, postprocess_params)

    def preprocess(self, inputs: Any, **kwargs: Any) -> dict[str, Any]:
        item = _region_item(inputs, **{name: kwargs.pop(name, None) for name in _REGION_KEYS})
        regions = {name: item[name] for name in _REGION_KEYS if item.get(name) is not None}
        if all(isinstance(values, Sized) and not len(values) for values in regions.values()):
            # A detector that found nothing. The processor, which takes images alone, refuses empty regions.
            sized = {name: kwargs[name] for name in ("size", "max_num_patches") if name in kwargs}
            processed = self.processor(images=item["image"], return_tensors="pt", **sized)
            processed["region_attention_mask"] = torch.zeros(1, 0, dtype=torch.long)
            processed["regions"] = [[]]
        else:
            processed = self.processor(
                images=item["image"], **regions, return_regions=True, return_tensors="pt", **kwargs
            )
        # Boxes and masks keep their own dtype: half precision has too few digits for a coordinate.
        processed["pixel_values"] = processed["pixel_values"].to(self.dtype)
        return dict(processed)

    def _forward(self, model_inputs: dict[str, Any], **model_kwargs: Any) -> dict[str, Any]:
        regions = model_inputs.pop("regions")
        if not any(regions):
            pixels = model_inputs["pixel_values"]
            width = self.model.config.projection_dim
            return {"per_region": pixels.new_zeros(len(pixels), 0, width, dtype=torch.float32), "regions": regions}
        features = self.model.get_region_features(**model_inputs, **model_kwargs).pooler_output
        return {"per_region": features.float(), "regions": regions}

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Saves the model and the processor: a folder that all region pipelines load.

        Their code is saved with the model's configuration, so the base class, which would name only one task, has
        nothing to add.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    @staticmethod
    def split_outputs(model_outputs: dict[str, Any]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """The model's rows (R, ...) for the R regions of one image and the dicts of these regions, without padding.

        Raises:
            ValueError: a row is not finite: no number stands for a region that the model could not embed.
        """
        (regions,) = model_outputs["regions"]
        rows = model_outputs["per_region"][0, : len(regions)]
        finite = rows.isfinite().all(-1)
        if not finite.all():
            number = int(finite.int().argmin())
            # Regions of points, and texts to be found, have no box.
            region = regions[number].get("box", regions[number])
            raise ValueError(
                f"Region {number}, {region}, has NaN or infinite values: the model's weights are "
                "damaged, or its dtype is too narrow (take bfloat16 or float32 in place of float16)."
            )
        return rows, regions


class RegionFeatureExtractionPipeline(RegionPipeline):
    """Embeds the regions of an image.

    ```python
    extract = pipeline("region-feature-extraction", model="org/cloc")
    extract(image, boxes=[[10, 20, 200, 180], [0, 0, 64, 64]])
    extract([image_a, image_b], masks=[[mask], [mask, mask]], batch_size=2)
    ```
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Embeds regions.

        Args:
            inputs: an image (path, URL, PIL image, array or tensor), a dict `{"image": ..., "boxes": ...}` or
                `{"image": ..., "masks": ...}`, or a list, generator or dataset of either.
            boxes: the image's boxes, (R, 4); for a list of images one such list per image. It is empty where a
                detector found nothing, and so is the result.
            masks: the image's R masks, in any form that the processor reads; for a list of images one such list
                per image.
            box_format (`str`): `"xyxy"` (default), `"xywh"` or `"cxcywh"`.
            normalized (`bool`): boxes in [0, 1] of the image (True) or pixels (False). By default pixels, and boxes
                without any value above 1 are refused, because they look like fractions.
            points: the points of the image's R regions, `[[[x, y], ...], ...]`, nested as SAM's; for a list of images
                one such list per image. For a CLOC with `config.prompter_points`. In an image that has boxes or masks
                too, each region has None where it has no points, or no box or mask.
            point_labels: nested as `points`: 1 on the region (default), 0 beside it.
            prompt (`str`): `"box"`, `"mask"` or `"point"`, what prompts the model. Needed where a region has several,
                or to convert a box into a mask or the other way around (CLOC takes either, PixCLIP takes masks).
            mode (`str`): PixCLIP only: `"prompted"` (one pass per region) or `"pooled"` (one pass per image).
            size (`dict`): `{"height": ..., "width": ...}`, in pixels, that images are resized to in place of the
                model's own size; multiples of its patch size.
            max_num_patches (`int`): the most patches of an image, for a vision tower of variable resolution, in place
                of the processor's own number.
            normalize (`bool`): L2-normalized embeddings (default), or the model's own lengths.
            return_tensors (`bool`): returns one float32 tensor (R, D) per image instead of dicts.
            batch_size (`int`): images per model pass, for a list, generator or dataset. Above 1, four batches are read
                ahead, and images with about as many regions share one.
            num_workers (`int`): processes that read and preprocess images; one at most for a generator.

        Returns:
            For one image, a list of R dicts `{"embedding": list of D floats, "box": {"xmin", "ymin", "xmax", "ymax"}
            in pixels of the original image, "mask_area": pixels}`, with `"points"` and `"point_labels"` in place of
            box and area where points prompt; for a list of images, a list of those; for a generator or dataset, an
            iterator over them.

        Raises:
            OSError, TypeError, ValueError: no boxes, masks or points for an image, or regions that do not fit their
                image or the number of images. The message names the image of a list, generator or dataset by its
                index.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, normalize: bool | None = None, return_tensors: bool | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        postprocess_params |= given_parameters({"normalize": normalize, "return_tensors": return_tensors})
        return preprocess_params, forward_params, postprocess_params

    def postprocess(
        self, model_outputs: dict[str, Any], normalize: bool = True, return_tensors: bool = False
    ) -> list[dict[str, Any]] | torch.Tensor:
        embeddings, regions = self.split_outputs(model_outputs)
        if normalize:
            embeddings = F.normalize(embeddings, dim=-1)
        if return_tensors:
            return embeddings
        return [
            {"embedding": embedding, **region} for embedding, region in zip(embeddings.tolist(), regions, strict=True)
        ]


def given_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are not None."""
    return {name: value for name, value in parameters.items() if value is not None}


def _unchanged(item: Any) -> Any:
    return item


def _zip_regions(
    images: list | tuple, regions: dict[str, Any], join: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    for name, values in regions.items():
        if len(values) != len(images):
            raise ValueError(f"`{name}` must hold a list per image: got {len(values)} for {len(images)} images.")
    items = []
    for number, image in enumerate(images):
        with numbered(number):
            items.append(join(image, **{name: values[number] for name, values in regions.items()}))
    return items


__all__ = ["RegionFeatureExtractionPipeline", "RegionPipeline"]
