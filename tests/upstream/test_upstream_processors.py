"""transformers' common tests over both processors and the image processor, and over CLIP's for comparison."""

import runpy
import unittest
from pathlib import Path

from suite import load
from transformers import CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import pixclip_hf

processing = load("test_processing_common")
images = load("test_image_processing_common")
build_tokenizer = runpy.run_path(str(Path(__file__).parent.parent / "conftest.py"))["build_tokenizer"]


class ImageProcessorTester(images.ImageProcessingTester):
    image_processor_class = pixclip_hf.RegionImageProcessor

    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"height": 20, "width": 20}, do_resize=True, do_normalize=True, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": self.image_processor_class}


class CLIPImageProcessorTester(ImageProcessorTester):
    image_processor_class = CLIPImageProcessorPil

    def __init__(self, parent):
        super().__init__(parent, crop_size={"height": 18, "width": 18})


class TestRegionImageProcessor(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester


class TestCLIPImageProcessor(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = CLIPImageProcessorTester


class ProcessorTests(processing.ProcessorTesterMixin):
    image_processor_class = pixclip_hf.RegionImageProcessor

    @classmethod
    def _setup_image_processor(cls):
        return cls.image_processor_class(size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()


class TestCLOCProcessor(ProcessorTests, unittest.TestCase):
    processor_class = pixclip_hf.CLOCProcessor


class TestPixCLIPProcessor(ProcessorTests, unittest.TestCase):
    processor_class = pixclip_hf.PixCLIPProcessor


class TestCLIPProcessor(ProcessorTests, unittest.TestCase):
    processor_class = CLIPProcessor
    image_processor_class = CLIPImageProcessorPil
