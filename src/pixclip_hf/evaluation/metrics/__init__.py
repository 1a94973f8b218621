"""Metrics for `evaluate.load`, a folder each that loads by its path or from the Hub."""
