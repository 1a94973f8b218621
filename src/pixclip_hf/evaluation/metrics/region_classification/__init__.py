"""Accuracy of zero-shot classification."""
