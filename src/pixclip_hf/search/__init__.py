"""Search over the regions of a collection: embeddings in Parquet shards, an index over them, and queries by text."""
