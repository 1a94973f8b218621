"""VESL, the annotation pipeline of CLOC: regions and phrases of images, from captions."""

from .pipeline import VeslArguments, caption_model, vesl_models, vesl_stages
from .regions import VeslRegions

__all__ = ["VeslArguments", "VeslRegions", "caption_model", "vesl_models", "vesl_stages"]
