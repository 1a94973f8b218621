"""Recall of retrieval."""
