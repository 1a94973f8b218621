"""What is asked of a collection, and the vectors of it, by the model that made the collection and no other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding.encoder_choice import EncoderChoice, describe_encoder
from ..finite import check_finite
from ..images import open_image
from ..processing.processing_regions import encode_rle, mask_box, read_mask

# How much of the mean of the negative queries is taken off. With all of it, hits are far from the negatives rather
# than near to the query.
NEGATIVE_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class Query:
    """A text, a region, an image, or an embedding of the collection.

    Args:
        text: a text of any length that the model takes.
        image: path, PIL image or anything else that [`open_image`] reads.
        box: [x0, y0, x1, y1] in pixels of the upright image: the region to look for. Needs `image`.
        mask: the region as a mask in any form that processors take. Needs `image`.
        points: the region by points on it, each [x, y] in pixels of the upright image, for a model that points prompt.
            Needs `image`.
        id: id of an embedding of the collection, which is not among its own hits.
        negative: queries, or texts, that hits should be unlike.

    Raises:
        ValueError: none or several of text, image and id; a box, mask or points without an image; several of them.
    """

    text: str | None = None
    image: Any = None
    box: Sequence[float] | None = None
    mask: Any = None
    points: Sequence[Sequence[float]] | None = None
    id: str | None = None
    negative: "tuple[Query | str, ...]" = ()

    def __post_init__(self) -> None:
        given = [name for name in ("text", "image", "id") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"A query must have one of text, image and id, got {', '.join(given) or 'none'}.")
        regions = [name for name in ("box", "mask", "points") if getattr(self, name) is not None]
        if self.image is None and regions:
            raise ValueError("`box`, `mask` and `points` need the `image` that they are in.")
        if len(regions) > 1:
            raise ValueError(f"A query must have one of box, mask and points, got {' and '.join(regions)}.")
        if self.text is not None and not self.text.strip():
            raise ValueError(f"`text` must say something, got {self.text!r}.")

    @property
    def label(self) -> str:
        """What sheets and tables call it."""
        if self.text is not None:
            label = self.text
        elif self.id is not None:
            label = f"like {self.id}"
        else:
            name = Path(self.image).name if isinstance(self.image, str | os.PathLike) else "an image"
            if self.box is not None:
                name = f"{[round(edge) for edge in self.box]} of {name}"
            elif self.points is not None:
                name = f"what is at {', '.join(str(list(map(round, point))) for point in self.points)} in {name}"
            label = name if self.mask is None else f"a mask in {name}"
        without = ", ".join(as_query(negative).label for negative in self.negative)
        return f"{label}, unlike {without}" if without else label


def as_query(query: Query | str) -> Query:
    """A text as a query."""
    return Query(text=query) if isinstance(query, str) else query


def load_query_encoder(
    settings: Mapping[str, Any], model: str | os.PathLike | None = None, revision: str | None = None
) -> Any:
    """The encoder of a collection's queries, which shows and prompts regions as the collection did.

    Args:
        settings: `embeddings.json` of the collection.
        model: where the model is now; by default where it was.
        revision: of the model on the Hub; by default that of the collection.

    Raises:
        ValueError: another model, revision or preprocessing than the collection's, or a folder that is gone.
    """
    name = os.fspath(model) if model is not None else settings["model"]
    if settings["weights"] is not None and not Path(name).is_dir():
        raise ValueError(f"`model` must be the folder of the collection's model: {name!r} is no folder.")
    choice = EncoderChoice(
        name,
        revision or settings["revision"] or "main",
        settings["view"] or EncoderChoice.view,
        settings["prompt"],
        settings["max_length"],
    )
    if settings["weights"] is None and name != settings["model"]:
        raise ValueError(f"`model` must be {settings['model']!r}, which made the collection, got {name!r}.")
    encoder = choice.load()
    check_encoder(settings, encoder, choice)
    return encoder


def check_encoder(settings: Mapping[str, Any], encoder: Any, choice: EncoderChoice | None = None) -> None:
    """Compares an encoder with the one that made a collection.

    Args:
        settings: `embeddings.json` of the collection.
        encoder: as [`load_encoder`] gives it, from a folder or the Hub.
        choice: how it was named; by what the model says of itself when None.

    Raises:
        ValueError: they differ in model, revision, weights, preprocessing, prompt or view.
    """
    if choice is None:
        name = encoder.model.name_or_path
        if not name:
            raise ValueError("`encoder` must be loaded from a folder or the Hub: what it is could not be told.")
        choice = EncoderChoice(name)
    found = describe_encoder(choice, encoder)
    # A folder may have moved: its weights say what it is.
    names = ["revision", "weights", "preprocessing", "prompt", "view", "width"]
    for name in names if settings["weights"] is not None else ["model", *names]:
        if found[name] != settings[name]:
            raise ValueError(
                f"The model {choice.model!r} is not the one that made the collection, {settings['model']!r}: its "
                f"{name} is {found[name]!r}, that of the collection {settings[name]!r}."
            )


def encode_queries(queries: Sequence[Query], encoder: Any, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vectors `(Q, D)` of some queries, float32 of unit length.

    Args:
        queries: the queries.
        encoder: of the model of the collection; None where nothing but ids are asked for.
        stored: id -> `(D,)`, for those that the queries name.

    Raises:
        ValueError: a negative query with negative queries, or a query whose embedding is not finite.
    """
    parts = list(queries)
    negatives = [[as_query(negative) for negative in query.negative] for query in queries]
    for own in negatives:
        if any(query.negative for query in own):
            raise ValueError("A negative query must not have negative queries of its own.")
        parts += own
    texts = list(dict.fromkeys(query.text for query in parts if query.text is not None))
    embeds = encoder.encode_texts(texts, show_progress_bar=False) if texts else ()
    by_text = dict(zip(texts, embeds, strict=True))
    found = np.stack([_vector(query, encoder, stored, by_text) for query in parts])
    check_finite(found, "The embedding of the query", [query.label for query in parts])
    vectors = _unit(found)
    combined, start = [], len(queries)
    for vector, own in zip(vectors, negatives, strict=False):
        if own:
            vector = vector - NEGATIVE_WEIGHT * vectors[start : start + len(own)].mean(0)
            start += len(own)
        combined.append(vector)
    return _unit(np.stack(combined))


def _vector(query: Query, encoder: Any, stored: Mapping[str, np.ndarray], texts: Mapping[str, Any]) -> np.ndarray:
    if query.id is not None:
        return np.asarray(stored[query.id], dtype=np.float32)
    if query.text is not None:
        return np.asarray(texts[query.text], dtype=np.float32)
    image = open_image(query.image)
    if query.points is not None:
        regions = encoder.encode_regions(image, points=[query.points], show_progress_bar=False)
        return np.asarray(regions[0], dtype=np.float32)
    if query.box is None and query.mask is None:
        return np.asarray(encoder.encode_images([image], show_progress_bar=False)[0], dtype=np.float32)
    region: dict[str, Any] = {"box": query.box, "mask": None}
    if query.mask is not None:
        mask = read_mask(query.mask, image.size[::-1], "mask") != 0
        region = {"box": mask_box(mask).tolist(), "mask": encode_rle(mask)}
    else:
        _check_box(query.box, image.size)
    record = {"image": image, "regions": [region]}
    return np.asarray(encoder.encode_records([record], show_progress_bar=False)[0][0], dtype=np.float32)


def _check_box(box: Any, size: tuple[int, int]) -> None:
    edges = [float(edge) for edge in box]
    if len(edges) != 4 or not (0 <= edges[0] < edges[2] <= size[0] and 0 <= edges[1] < edges[3] <= size[1]):
        raise ValueError(
            f"`box` must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1 inside of the image of {size[0]} x {size[1]} "
            f"pixels, got {edges}."
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
