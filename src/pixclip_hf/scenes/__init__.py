"""The drawn world of the demo: what its small models are trained by, and what they have learned of it."""
