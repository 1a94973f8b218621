"""The files of programs that serve a published model: a Space with the demo of `pixclip_hf.app`, and the handler of an
Inference Endpoint."""

import json
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .outgoing import is_hub_id, python_string
from .versions import SUPPORTED

# What the package needs; the version of Gradio is part of the card.
PINNED = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow")
CARD = """\
---
title: {quoted_title}
emoji: 🔲
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
- {model}
pinned: false
---

# {title}

Draw regions on an image and compare them with texts: a demo of [{model}](https://huggingface.co/{model}), made by
`pixclip-hf publish --space`. The folder `pixclip_hf` is the package that made it.
"""
APP = '''\
"""The demo of {model}, see README.md."""

from pixclip_hf.app import launch

launch("{model}", revision="{revision}")
'''
HANDLER = '''\
"""Answers the requests of an Inference Endpoint, see `EndpointHandler.__call__`."""

import sys
from pathlib import Path

# The folder `pixclip_hf` beside this file is the package that wrote it.
sys.path.insert(0, str(Path(__file__).parent))

from pixclip_hf.endpoint import EndpointHandler  # noqa: E402

__all__ = ["EndpointHandler"]
'''


def space_files(model: str, repo_id: str, revision: str | None = None) -> dict[str, Path | bytes]:
    """What a Space consists of, by the paths in its repository: card, program, pinned requirements and the package
    itself, so that it needs no release of it.

    Args:
        model: Hub id of the model that it shows.
        repo_id: `"organization/name"` of the Space.
        revision: branch, tag or commit of the model; `main` when None.

    Raises:
        ValueError: names that are no Hub ids, or Gradio or another library that is not installed here, whose version
            could not be pinned.
    """
    for name, value in (("model", model), ("space", repo_id)):
        if not is_hub_id(value):
            raise ValueError(f"`{name}` must be a Hub id, organization/name, got {value!r}.")
    title = repo_id.rpartition("/")[2]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    card = CARD.format(
        title=title, quoted_title=json.dumps(title), gradio=_installed("gradio"), python=python, model=model
    )
    app = APP.format(model=python_string(model), revision=python_string(revision or "main"))
    return _with_package({"README.md": card, "app.py": app, "requirements.txt": _pinned(PINNED)})


def handler_files() -> dict[str, Path | bytes]:
    """What serves a model by an Inference Endpoint, by the paths in the model's repository: `handler.py`, its
    requirements and the package itself. The requirements leave an endpoint the PyTorch of its image, which fits its
    GPU, where this package works with it."""
    requirements = f"torch{SUPPORTED['torch']}\n{_pinned(name for name in PINNED if name != 'torch')}"
    return _with_package({"handler.py": HANDLER, "requirements.txt": requirements})


def _pinned(names: Iterable[str]) -> str:
    """Requirements with the versions that are installed here."""
    return "".join(f"{name}=={_installed(name)}\n" for name in names)


def _with_package(texts: Mapping[str, str]) -> dict[str, Path | bytes]:
    """Texts and the files of this package, by their paths in a repository."""
    files: dict[str, Path | bytes] = {name: text.encode("utf-8") for name, text in texts.items()}
    package = Path(__file__).parent
    for path in sorted(package.rglob("*")):
        below = path.relative_to(package)
        if path.suffix in (".py", ".txt", ".typed") and below.parts[0] != "hub_cards":
            files[f"pixclip_hf/{below.as_posix()}"] = path
    return files


def _installed(name: str) -> str:
    """The version of a library without its local part, such as +cpu, which an index need not have."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError as error:
        raise ValueError(
            f'A Space pins the versions that are installed here, and {name} is not: pip install "pixclip-hf[app]".'
        ) from error
