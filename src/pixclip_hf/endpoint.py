"""Answers the requests of an Inference Endpoint: JSON with a base64 image and its regions or texts."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from .processing.processing_images import open_image_file, read_image
from .processing.processing_numbers import shown

FEATURES, CLASSES, GROUNDING = TASKS = (
    "region-feature-extraction", "zero-shot-region-classification", "region-grounding",
)  # fmt: skip
MOST_BYTES = 32 * 2**20
"""Of an encoded image or mask."""
MOST_PIXELS = 2**26
"""Of an image."""
MOST_MASK_PIXELS = 2**30
"""Of all masks of a request together."""
MOST_REGIONS = 256
MOST_POINTS = 64
"""Of a region."""
MOST_TEXTS = 1024
MOST_CHARACTERS = 10_000
"""Of a text."""
_REGION_FIELDS = ("boxes", "masks", "points", "point_labels")
_REGION_PARAMETERS = ("box_format", "normalized", "prompt", "mode")
_PARAMETERS = {
    FEATURES: (*_REGION_PARAMETERS, "normalize"),
    CLASSES: (*_REGION_PARAMETERS, "candidate_labels", "hypothesis_template", "top_k"),
    GROUNDING: ("candidate_labels", "hypothesis_template", "threshold", "top_k"),
}
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("box_format", "prompt", "mode", "hypothesis_template"), (str, "a text")),
    **dict.fromkeys(("normalized", "normalize"), (bool, "true or false")),
    "top_k": (int, "a whole number"),
    "threshold": ((int, float), "a number"),
}


class EndpointHandler:
    """A published model behind an Inference Endpoint, whose server calls it once per request.

    Args:
        path: the model's folder.
    """

    def __init__(self, path: str = ""):
        model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipelines = {
            task: pipeline(task, model=model, processor=processor, device=device)
            for task in TASKS
            if model.can_ground or task != GROUNDING
        }

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answers one request. Nothing that it names is opened: images and masks are in the request itself.

        Args:
            data: `{"inputs": {...}, "parameters": {...}}`, where the parameters may be left out. `inputs` has `image`,
                an image file in base64, and for a task on regions `boxes`, `masks` (COCO run-length encodings, or
                image files in base64) or `points` with `point_labels`, in pixels of the upright image, as the
                pipelines take them. `parameters` has `task`, by default `"zero-shot-region-classification"` with
                `candidate_labels` and `"region-feature-extraction"` without; `candidate_labels`; and further options
                of the task's pipeline: `box_format`, `normalized`, `prompt`, `mode`, `normalize`,
                `hypothesis_template`, `top_k` and `threshold`.

        Returns:
            What the pipeline of the task gives for one image, made of lists, dicts, texts and numbers.

        Raises:
            ValueError: a field that is unknown, missing, of another form or beyond its limit, a task that the model
                does not have, or what the pipeline refuses.
        """
        _check_fields(data, "data", ("inputs", "parameters"))
        inputs, parameters = data.get("inputs"), data.get("parameters")
        task, options = self._read_parameters({} if parameters is None else parameters)
        _check_fields(inputs, "inputs", ("image",) if task == GROUNDING else ("image", *_REGION_FIELDS))
        given = {name: value for name, value in inputs.items() if value is not None}  # type: ignore[union-attr]
        if "image" not in given:
            raise ValueError("`inputs.image` must be an image file in base64, got none.")
        image = _read_image(given.pop("image"))
        regions = _read_regions(given, image.size)
        try:
            return self._pipelines[task](image, **regions, **options)
        except TypeError as error:
            # Numbers and lists of a request that are of another type than the processor takes.
            raise ValueError(str(error)) from error

    def _read_parameters(self, parameters: Any) -> tuple[str, dict[str, Any]]:
        """The task of a request and the options of its pipeline."""
        if not isinstance(parameters, Mapping):
            raise ValueError(f"`parameters` must be an object, got {shown(parameters)}.")
        options = {name: value for name, value in parameters.items() if value is not None}
        task = options.pop("task", CLASSES if "candidate_labels" in options else FEATURES)
        if task not in TASKS:
            raise ValueError(f"`parameters.task` must be one of {', '.join(TASKS)}, got {shown(task)}.")
        if task not in self._pipelines:
            raise ValueError(f"`parameters.task` must be a task of this model, which has no box head, got {task!r}.")
        _check_fields(options, "parameters", _PARAMETERS[task], f" for the task {task}")
        for name, value in options.items():
            if name == "candidate_labels":
                _check_texts(value)
                continue
            kind, expected = _TYPES[name]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"`parameters.{name}` must be {expected}, got {shown(value)}.")
            if isinstance(value, str):
                _check_length(value, f"parameters.{name}")
        return task, options


def _check_fields(value: Any, name: str, fields: tuple[str, ...], where: str = "") -> None:
    """
    Raises:
        ValueError: no JSON object, or one with other fields.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be an object, got {shown(value)}.")
    if unknown := [field for field in value if field not in fields]:
        raise ValueError(f"`{name}` takes the fields {', '.join(fields)}{where}, got also {shown(unknown[0])}.")


def _check_list(value: Any, name: str, most: int, what: str) -> None:
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of {what}, got {shown(value)}.")
    if len(value) > most:
        raise ValueError(f"`{name}` must hold at most {most} {what}, got {len(value)}.")


def _check_length(text: str, name: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"`{name}` must have at most {MOST_CHARACTERS} characters, got {len(text)}.")


def _check_texts(labels: Any) -> None:
    _check_list(labels, "parameters.candidate_labels", MOST_TEXTS, "texts")
    for number, label in enumerate(labels):
        name = f"parameters.candidate_labels[{number}]"
        if not isinstance(label, str):
            raise ValueError(f"`{name}` must be a text, got {shown(label)}.")
        _check_length(label, name)


def _read_image(value: Any) -> Image.Image:
    """The image of a request, upright and in RGB."""
    file = _read_base64(value, "inputs.image")
    with open_image_file(file, "`inputs.image`") as image:
        width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"`inputs.image` must have at most {MOST_PIXELS} pixels, got {width} x {height}.")
    file.seek(0)
    return read_image(file, "`inputs.image`")


def _read_base64(value: Any, name: str) -> io.BytesIO:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be an image file in base64, got {shown(value)}.")
    if len(value) > 4 * (MOST_BYTES // 3 + 1):
        raise ValueError(f"`{name}` must have at most {MOST_BYTES} bytes, got {len(value)} characters of base64.")
    try:
        return io.BytesIO(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`{name}` must be an image file in base64, got {shown(value[:80])}: {error}") from error


def _read_regions(given: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The regions of a request as the pipelines take them; their numbers are the processor's to check.

    Args:
        given: fields of `inputs`.
        size: (width, height) of the image.
    """
    for name, rows in given.items():
        _check_list(rows, f"inputs.{name}", MOST_REGIONS, "regions")
        for number, row in enumerate(rows):
            if name in ("points", "point_labels") and row is not None:
                _check_list(row, f"inputs.{name}[{number}]", MOST_POINTS, "points")
    regions = dict(given)
    if (masks := given.get("masks")) is not None:
        if len(masks) * size[0] * size[1] > MOST_MASK_PIXELS:
            raise ValueError(
                f"`inputs.masks` must have at most {MOST_MASK_PIXELS} pixels together, got {len(masks)} of "
                f"{size[0]} x {size[1]}."
            )
        regions["masks"] = [_read_mask(mask, f"inputs.masks[{number}]", size) for number, mask in enumerate(masks)]
    return regions


def _read_mask(mask: Any, name: str, size: tuple[int, int]) -> Any:
    if mask is None or isinstance(mask, dict):
        return mask
    if not isinstance(mask, str):
        raise ValueError(f"`{name}` must be a run-length encoding or an image file in base64, got {shown(mask)}.")
    image = open_image_file(_read_base64(mask, name), f"`{name}`")
    # Before its pixels are decoded.
    if image.size != size:
        raise ValueError(f"`{name}` must have the size of its image, {size[0]} x {size[1]}, got {image.size}.")
    return image


__all__ = ["EndpointHandler"]
