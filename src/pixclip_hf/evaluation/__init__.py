"""Evaluation of region-text models."""
