"""Which model embeds, and what a folder of embeddings says about it. Models are imported when one is loaded."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.source_index import content_digest, digest


@dataclass(frozen=True)
class EncoderChoice:
    """A model and how it is used; what [`load_encoder`] takes.

    Args:
        model, revision, view, prompt, max_length: as in [`load_encoder`].
        precision: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, that of the checkpoint.
    """

    model: str
    revision: str = "main"
    view: str = "crop"
    prompt: str | None = None
    max_length: int | None = None
    precision: str = "auto"

    def load(self, device: str | None = None) -> Any:
        """The encoder; on the accelerator where there is one unless `device` says otherwise."""
        from ..encoders.view_encoder import load_encoder

        return load_encoder(
            self.model,
            self.view,
            self.max_length,
            self.revision,
            prompt=self.prompt,
            device=device,
            dtype=self.precision,
        )


@lru_cache(maxsize=1)
def cached_encoder(choice: EncoderChoice) -> Any:
    """The encoder, loaded once per process; `cached_encoder.cache_clear()` forgets it."""
    return choice.load()


def describe_encoder(choice: EncoderChoice, encoder: Any) -> dict[str, Any]:
    """What `embeddings.json` says about an encoder.

    Args:
        choice: how it was named.
        encoder: as [`load_encoder`] gives it.
    """
    from ..encoders.cached import processor_key

    folder = Path(choice.model)
    commit = getattr(encoder.model.config, "_commit_hash", None) or choice.revision
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin") and path.is_file())
    return {
        "model": choice.model,
        "revision": None if folder.is_dir() else commit,
        "weights": digest([path.name, content_digest(path)] for path in files) if folder.is_dir() else None,
        "preprocessing": digest(processor_key(encoder.processor)),
        "prompt": encoder.prompt if encoder.view is None else None,
        "view": encoder.view,
        "max_length": choice.max_length,
        "precision": str(encoder.model.dtype).removeprefix("torch."),
        "width": encoder.width,
    }
