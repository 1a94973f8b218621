"""Configurations, models, losses and tensor geometry: the files that travel to the Hub with a model."""
