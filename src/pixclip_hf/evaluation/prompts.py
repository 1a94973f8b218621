"""Texts around class names: ImageNet's templates and the embeddings of classes."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

ONE_TEMPLATE = ("a photo of a {}.",)

_BOTH_ARTICLES = (
    "{} bad photo of {}", "{} cropped photo of {}", "{} bright photo of {}", "{} close-up photo of {}",
    "{} black and white photo of {}", "{} jpeg corrupted photo of {}", "{} blurry photo of {}", "{} good photo of {}",
    "{} pixelated photo of {}", "{} low resolution photo of {}", "{} dark photo of {}", "{} rendering of {}",
    "{} rendition of {}", "{} sculpture of {}", "{} painting of {}", "{} drawing of {}", "{} sketch of {}",
    "{} doodle of {}", "{} tattoo of {}",
)  # fmt: skip
_PHOTOS_OF = ("clean", "dirty", "cool", "large", "small", "nice", "weird", "hard to see")
_THINGS = ("embroidered {}", "plastic {}", "origami {}", "toy {}", "cartoon {}", "plushie {}")


def _imagenet_templates() -> tuple[str, ...]:
    templates = ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."]
    for article in ("a", "the"):
        templates += [f"{stem.format('a', article)} {{}}." for stem in _BOTH_ARTICLES]
        templates += [f"a photo of {article} {kind} {{}}." for kind in _PHOTOS_OF]
        templates += [f"{article} {thing}." for thing in _THINGS]
        templates += [f"{start} {article} {{}}." for start in ("a photo of", "graffiti of", "art of", "itap of")]
        templates.append(f"{article} {{}} in a video game.")
    return tuple(templates)


IMAGENET_TEMPLATES = _imagenet_templates()
"""The 80 templates of CLIP's ImageNet evaluation (Radford et al. 2021)."""


def class_embeddings(encoder: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embedding of each class `(C, D)`: the normalised mean of its templates' normalised embeddings.

    Args:
        encoder: with `embed_texts`.
        names: of the classes.
        templates: each with a `{}` for the name.

    Raises:
        ValueError: no names, or a template without `{}`.
    """
    if not names:
        raise ValueError("`names` must hold at least one class, got none.")
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"`templates` must each have a '{{}}' for the class, got {wrong[0]!r}.")
    texts = [template.replace("{}", name) for name in names for template in templates]
    embeds = encoder.embed_texts(texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(embeds.mean(1), dim=-1)
