"""The two region pipelines: the files that travel to the Hub with them."""
