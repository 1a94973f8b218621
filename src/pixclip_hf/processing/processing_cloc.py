"""Processor of CLOC: images, region boxes or masks, and texts."""

from .processing_region_text import RegionTextProcessor


class CLOCProcessor(RegionTextProcessor):
    """
    Image processor and tokenizer of CLOC in one, which a box or a mask may prompt.

    Args:
        image_processor, tokenizer, text_model_name: see [`RegionTextProcessor`].
    """

    prompts = ("box", "mask")
