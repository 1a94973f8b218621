"""Texts around class names, such as ImageNet's templates."""

from collections.abc import Sequence

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


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple.

    Raises:
        ValueError: none, or a template without `{}`.
    """
    checked = (templates,) if isinstance(templates, str) else tuple(templates)
    if not checked:
        raise ValueError("`templates` must hold at least one template, got none.")
    if wrong := [template for template in checked if "{}" not in template]:
        raise ValueError(f"`templates` must each have a '{{}}' for the class, got {wrong[0]!r}.")
    return checked


def fill_templates(texts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each text in each template: all templates of the first text, then those of the second."""
    return [template.replace("{}", text) for text in texts for template in templates]
