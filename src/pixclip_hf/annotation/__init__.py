"""Annotation pipelines: region-text datasets in the record schema, made from images by models."""
