"""Tiny models, processors and a tokenizer that every test may use, and no network."""

import gc
import os

# Before transformers and datasets are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

import pixclip_hf  # noqa: E402

VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_CONFIG = {
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 259,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 258,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """What is imported stays, and no collection of garbage walks through it; each training asks for one."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """That files are synced, and when, is tested in tests/data/test_whole_files.py; the suite writes thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def build_tokenizer():
    """A byte-level tokenizer without merges: any text, one token per byte, between <bos> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 258)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    )


def build_tiny(config_class, model_class, processor_class):
    """A model with seeded random weights and its processor, 32 x 32 images in a 4 x 4 grid of patches.

    The mask projection, zero in a new model, is random too: a mask has an effect.
    """
    config = config_class(vision_config=dict(VISION_CONFIG), text_config=dict(TEXT_CONFIG), projection_dim=16)
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mask_weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    image_processor = pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    return model, processor_class(image_processor=image_processor, tokenizer=build_tokenizer())


@pytest.fixture
def tiny_tokenizer():
    return build_tokenizer()


@pytest.fixture
def tiny_cloc():
    """(model, processor) of a tiny CLOC."""
    return build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor)


@pytest.fixture
def tiny_pixclip():
    """(model, processor) of a tiny PixCLIP."""
    return build_tiny(pixclip_hf.PixCLIPConfig, pixclip_hf.PixCLIPModel, pixclip_hf.PixCLIPProcessor)
