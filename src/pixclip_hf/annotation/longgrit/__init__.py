"""LongGRIT, the annotation pipeline of PixCLIP: one long, checked caption of every region."""

from .pipeline import LongGritArguments, longgrit_models, longgrit_stages

__all__ = ["LongGritArguments", "longgrit_models", "longgrit_stages"]
