"""Processors of PixCLIP and CLOC: from images, regions and texts to model inputs, and back to original pixels."""
