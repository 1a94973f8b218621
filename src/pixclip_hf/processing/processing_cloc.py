"""Processor of CLOC: images, region boxes, masks or points, and texts."""

from .processing_region_text import RegionTextProcessor, RegionTextProcessorKwargs


class CLOCProcessorKwargs(RegionTextProcessorKwargs, total=False):  # type: ignore[call-arg]
    """What a call may say beside its images, texts and regions: see [`RegionTextProcessorKwargs`]."""


class CLOCProcessor(RegionTextProcessor):
    """
    Image processor and tokenizer of CLOC in one, which a box, a mask or, where its configuration has
    `prompter_points`, points may prompt.

    Args:
        image_processor, tokenizer, text_model_name, reads_padding, lowercase_texts: see [`RegionTextProcessor`].
    """

    valid_processor_kwargs = CLOCProcessorKwargs
    prompts = ("box", "mask", "point")
