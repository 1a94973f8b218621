"""Every snippet of the README and of the guides to models and their use runs alone as printed, with tiny models for
the named ones."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tiny, build_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import pixclip_hf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What publishes needs a Hub: tests/hub/test_push_and_pull.py runs it.
PUBLISHING = re.search(r"^## Publish and load\n.*?^## ", README, flags=re.S | re.M)[0]
MODELS = (ROOT / "docs" / "models.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README.replace(PUBLISHING, "") + MODELS, flags=re.S)


# Guides whose snippets need no more than the demo's models; their number of snippets.
GUIDES = {"install": 1, "quickstart": 4, "regions": 5, "inference": 4, "faq": 1}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The working folder of a reader who has run both demos, and the Hub repositories that the README names."""
    for family, name in (("cloc", "CLOC"), ("pixclip", "PixCLIP")):
        classes = (getattr(pixclip_hf, name + part) for part in ("Config", "Model", "Processor"))
        for part in build_tiny(*classes):
            part.save_pretrained(tmp_path / "runs" / "demo" / family)
    clip, llm = tmp_path / "openai/clip-vit-large-patch14-336", tmp_path / "any/llm"
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16)).save_pretrained(
        clip
    )
    CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(clip)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=259, num_key_value_heads=2, **sizes)).save_pretrained(llm)
    build_tokenizer().save_pretrained(llm)
    siglip = tmp_path / "google/siglip2-base-patch16-224"
    text = {**sizes, "vocab_size": 259, "max_position_embeddings": 16, "projection_size": 32}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(siglip)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(siglip)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(siglip)
    monkeypatch.chdir(tmp_path)


def test_snippets_run_as_printed(places):
    assert len(SNIPPETS) >= 4
    names = {}
    for snippet in SNIPPETS:
        own = {}  # each can be copied alone
        exec(compile(snippet, "README.md", "exec"), own)
        names |= own
    assert len(names["regions"]) == 2 and names["tensor"].shape == (1, 16)
    assert names["out"].logits_per_region.shape == (2, 2, 2)
    assert isinstance(names["model"], pixclip_hf.PixCLIPModel)
    assert names["processor"].image_processor.size == {"height": 32, "width": 32}


def test_snippets_of_guides_run_as_printed(places):
    found = {}
    for guide, count in GUIDES.items():
        text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
        snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
        assert len(snippets) == count, guide
        for number, snippet in enumerate(snippets):
            own = {}
            exec(compile(snippet, f"{guide}.md, snippet {number}", "exec"), own)
            found[guide, number] = own
    assert found["quickstart", 2]["boxes"].shape == (2, 4)
    assert found["regions", 2]["fast"].shape == found["regions", 2]["accurate"].shape
    assert found["regions", 3]["out"].logits_per_region.shape == (3, 2, 2)
    assert found["inference", 1]["half"].shape == (2, 16)
    assert found["faq", 0]["labels"].shape == (2, 16)


def test_files_and_targets_exist():
    for path in re.findall(r"\]\(([^)#]+)\)|python (\S+\.py)", README):
        path = next(filter(None, path))
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.M)) <= set(targets)
