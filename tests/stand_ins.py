"""Stand-ins for models: encoders with known embeddings, and a tiny CLIP, SigLIP and SigLIP 2 with their
processors."""

import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from pixclip_hf.encoders.cached import CachedEncoder
from pixclip_hf.images import open_image


class KnownEncoder:
    """Texts, images and regions by look-up: a text by itself, an image by its size, a region by its `name`."""

    prompt, prompts, modes, view, grounds = "mask", ("mask",), (), None, False
    mean_color, settings, text_limit = [0.5, 0.5, 0.5], "", None

    def __init__(self, texts=None, images=None, regions=None):
        self.texts, self.images, self.regions = texts or {}, images or {}, regions or {}

    def text_keys(self, texts, max_length=None):
        return list(texts), 0

    def encode_texts(self, texts, max_length=None, **options):
        return torch.tensor([self.texts[text] for text in texts])

    def encode_images(self, images, unscaled_mask=False, **options):
        self.unscaled = unscaled_mask
        return torch.tensor([self.images[open_image(image).size] for image in images])

    def encode_records(self, records, **options):
        return [
            torch.tensor([self.regions[region["name"]] for region in record["regions"]]).reshape(-1, 2)
            for record in records
        ]

    def encode_shown(self, records, **options):
        return torch.cat([torch.zeros(0, 2), *self.encode_records(records, **options)])


def known(**tables):
    return CachedEncoder(KnownEncoder(**tables), progress=False)


def tiny_clip():
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config).eval(), CLIPProcessor(image_processor, build_tokenizer())


def tiny_siglip():
    torch.manual_seed(0)
    vision = {name: value for name, value in VISION_CONFIG.items() if name != "model_type"}
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "model_type"}
    config = SiglipConfig(vision_config=vision, text_config={**text, "max_position_embeddings": 64})
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return SiglipModel(config).eval(), SiglipProcessor(image_processor, build_tokenizer())


def tiny_naflex():
    torch.manual_seed(0)
    vision = {name: value for name, value in VISION_CONFIG.items() if name not in ("model_type", "image_size")}
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "model_type"}
    config = Siglip2Config(
        vision_config={**vision, "num_patches": 16}, text_config={**text, "max_position_embeddings": 64}
    )
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz▁"]
    vocab = {word: number for number, word in enumerate(words)}
    # Whatever it writes into its folder, transformers loads a tokenizer of this class.
    tokenizer = Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right")
    return Siglip2Model(config).eval(), Siglip2Processor(image_processor, tokenizer)
