"""Embeddings of a collection at rest: regions, whole images and captions of any source, in a folder of shards."""
