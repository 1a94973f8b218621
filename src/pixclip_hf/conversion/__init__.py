"""Public checkpoints turned into folders that `AutoModel`, `AutoProcessor` and the pipelines load."""
