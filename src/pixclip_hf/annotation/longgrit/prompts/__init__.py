"""The prompts of LongGRIT, a versioned file each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template


@dataclass(frozen=True)
class Prompt:
    """A prompt from a file: its first line is `version: …`, the rest a template with `$name` for what is put in.

    Attributes:
        name: the name of the file, without `.txt`.
        version: from the file.
        digest: start of the SHA-256 of the text, which tells an edited file from the original.
        text: the template.
    """

    name: str
    version: str
    digest: str
    text: str = field(repr=False)

    @property
    def label(self) -> str:
        """What a record says: `object_caption 1 (5f0c1b2a)`."""
        return f"{self.name} {self.version} ({self.digest})"

    def fill(self, **values: str) -> str:
        return Template(self.text).substitute(values)


def load_prompt(name: str, names: Sequence[str], folder: str | None = None) -> Prompt:
    """Reads `NAME.txt`, from `folder` where it is given and has the file, else from the package.

    Args:
        name: the name of the prompt.
        names: what its template must put in, and all that it may.
        folder: holds the user's own prompts.

    Raises:
        ValueError: no version line, or a template with other names.
        FileNotFoundError: `folder` does not exist.
    """
    path = files(__package__) / f"{name}.txt"
    if folder is not None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"`prompts` must be a folder, got {folder!r}, which does not exist.")
        if (own := Path(folder, f"{name}.txt")).exists():
            path = own
    head, _, text = path.read_text(encoding="utf-8").partition("\n")
    key, _, version = head.partition(":")
    if key.strip() != "version" or not version.strip():
        raise ValueError(f"{path}: the first line must be `version: …`, got {head!r}.")
    text = text.strip()
    template = Template(text)
    if not template.is_valid() or set(template.get_identifiers()) != set(names):
        wanted = ", ".join(f"${name}" for name in names)
        raise ValueError(f"{path}: the template must hold {wanted} and no other name, got {text!r:.200}.")
    return Prompt(name, version.strip(), hashlib.sha256(text.encode()).hexdigest()[:8], text)
