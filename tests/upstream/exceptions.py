"""Tests of transformers that CLIP's classes pass and ours may fail: name and reason, for all our classes at once."""

EXCEPTIONS: dict[str, str] = {}
