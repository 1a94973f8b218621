"""What may leave this machine: names without paths, text without markup, files without secrets.

Whatever is published goes through here. Names are made public where they are written ([`public_name`],
[`public_values`], [`plain_markdown`]); before a push, [`check_outgoing`] looks at the files themselves.
"""

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

# No part of a pattern is without a limit: a text that begins like a secret a thousand times would be read to its end a
# thousand times.
SECRETS = {
    "a private key": r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{20}",
    "a key of OpenAI or Anthropic": r"\bsk-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{20}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30}|github_pat_[A-Za-z0-9_]{30})",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a key of Google": r"\bAIza[A-Za-z0-9_-]{35}",
    "a token of Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10}",
    "a token of PyPI": r"\bpypi-[A-Za-z0-9_-]{50}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,400}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10}",
    "an address with a password": r"[A-Za-z0-9]://[^\s/:@]{1,200}:[^\s/@]{1,200}@",
}
_SECRETS = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
# What `hf auth login` or the environment holds, whatever it looks like.
_SECRET_NAMES = re.compile(r"(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")
_LEAST_SECRET = 12  # characters
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# A slash or a drive that begins a path of at least two parts. Not within a word, an address or a relative path.
_PATH = re.compile(
    r"""(?<![\w.~:/\\<-])(?:file://)?(?:/|~/|[A-Za-z]:[\\/]|\\\\)(?:[^\s/\\'"`<>|,;()\[\]{}]+[\\/])+[^\s/\\'"`<>|,;()\[\]{}]*"""
)
_NUMBERS = (".safetensors", ".bin", ".parquet", ".arrow", ".gguf", ".onnx")  # shards are looked at by column
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # which hold words of any text
# A backslash before them makes them text. A backslash itself only where it would do that to what follows, "@" only
# where a mail address would become a link.
_MARKUP = re.compile(r"(\\(?=[!-/:-@\[-`{-~]|$)|[<>\[\]|]|@(?=[\w-]+\.\w))")


def is_hub_id(name: Any) -> bool:
    """Whether `name` can only mean a repository: `owner/name`, and nothing of that name lies here."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def is_local_path(value: str) -> bool:
    """Whether a text is an absolute path of some machine, or one below a home folder."""
    return bool(_PATH.fullmatch(value)) or (len(value) > 1 and os.path.isabs(value) and Path(value).exists())


def last_part(path: str) -> str:
    """The name at the end of a path with either kind of slash; what is no UTF-8 of it as `\\xe9`."""
    name = PureWindowsPath(path).name or path
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def public_name(name: str) -> str:
    """The name of a model or a dataset as others may read it: of a local path its last part."""
    return last_part(name) if _is_path(name) and not is_hub_id(name) else name


def recorded_name(name: str) -> str:
    """The name of a model or a dataset as the records of a run keep it: a Hub id whole, and of what lies here its last
    part behind `./`, with which no Hub id begins."""
    return f"./{last_part(name)}" if is_local_name(name) else name


def is_local_name(name: str) -> bool:
    """Whether the name of a model or a dataset is that of a folder or a file; a word alone may be a Hub id."""
    return (_is_path(name) and not is_hub_id(name)) or Path(name).exists()


def public_word(word: str) -> str:
    """A word of a source (`folder=/data/photos`) without the path in it."""
    name, equals, value = word.partition("=")
    if not equals:
        return public_name(word)
    return f"{name}={last_part(value)}" if _is_path(value) else word


def public_words(source: str) -> str:
    """The words of a source in one line, without the paths in them."""
    return " ".join(map(public_word, source.split(" ")))


def public_text(text: str) -> str:
    """A text whose absolute paths are cut to their last parts."""
    return _PATH.sub(lambda found: last_part(found[0].rstrip("/\\")), text)


def public_values(content: Any, start: str = "") -> Any:
    """JSON without the absolute paths of this machine: of each, its last part. `start` goes before a text that was
    nothing but a path: `"./"` keeps it from being read as a Hub id."""
    if isinstance(content, Mapping):
        return {public_values(name, start): public_values(value, start) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [public_values(value, start) for value in content]
    if not isinstance(content, str):
        return content
    return start + last_part(content) if is_local_path(content) else public_text(content)


def _is_path(value: str) -> bool:
    return "/" in value or "\\" in value


def plain_markdown(text: Any) -> str:
    """A text as a line of Markdown that shows it: no HTML, no link, no new cell or line."""
    line = " ".join(str(text).split())
    line = _MARKUP.sub(r"\\\1", line)
    return line.replace("://", "\\://").replace("www.", "www\\.")


def markdown_code(text: Any) -> str:
    """A text as it stands between two backticks."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def python_string(text: Any) -> str:
    """A text as it stands between two double quotes of Python."""
    return json.dumps(str(text), ensure_ascii=False)[1:-1]


def base_name(name: Any, what: str) -> str:
    """A name of a file that may be read from, and written to, a folder of our own.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or PureWindowsPath(name).name != name:
        raise ValueError(f"{what} must be the name of a file without a folder, got {name!r}.")
    return name


def own_file(folder: str | os.PathLike, name: Any, what: str) -> Path:
    """A file that lies in a folder, and not behind a link.

    Raises:
        ValueError: the name leads elsewhere, or is a link or no file.
    """
    path = Path(folder, base_name(name, what))
    if path.is_symlink():
        raise ValueError(f"{what} must be a file, got {str(path)!r}, a link, which is not followed.")
    if not path.is_file():
        raise ValueError(f"{what} must be a file, got {str(path)!r}.")
    return path


def check_no_links(folder: str | os.PathLike, paths: Iterable[str | os.PathLike]) -> None:
    """
    Raises:
        ValueError: one of the files, or a folder between it and `folder`, is a link.
    """
    for path in map(Path, paths):
        below = path.relative_to(folder)
        for part in (path, *(Path(folder, parent) for parent in list(below.parents)[:-1])):
            if part.is_symlink():
                raise ValueError(f"Links are not published, got {str(part)!r}, which leads to {os.readlink(part)!r}.")


def find_secret(text: str) -> str | None:
    """What secret a text holds, in words that do not repeat it, or None."""
    for what, pattern in _SECRETS.items():
        if pattern.search(text):
            return what
    return next((what for what, value in _own_secrets() if value in text), None)


def find_private(text: str) -> str | None:
    """What a text says of this machine or holds of secrets, in words that do not repeat it, or None."""
    if (secret := find_secret(text)) is not None:
        return secret
    home, host = str(Path.home()), socket.gethostname()
    if len(home) > 1 and re.search(rf"(?<!\w){re.escape(home)}(?!\w)", text):
        return "the path of the home folder"
    # Short ones are words of any text.
    if len(host) >= 8 and host != "localhost" and re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text):
        return "the name of this machine"
    return None


def _own_secrets() -> Iterator[tuple[str, str]]:
    if (token := get_token()) and len(token) >= _LEAST_SECRET:
        yield "the token of this login", token
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= _LEAST_SECRET:
            yield f"the value of {name}", value


def clean_folder(folder: str | os.PathLike) -> None:
    """Takes the absolute paths of this machine out of the JSON and Markdown of a folder that is to be published."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix not in (".json", ".md") or path.name in _VOCABULARIES:
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            cleaned = public_text(text)
        else:
            content = json.loads(text)
            public = public_values(content)
            cleaned = text if public == content else json.dumps(public, indent=2, ensure_ascii=False) + "\n"
        if cleaned != text:
            path.write_text(cleaned, encoding="utf-8")


def check_outgoing(files: Mapping[str, Path | bytes]) -> None:
    """Looks through all of what is to be pushed that is not numbers.

    Args:
        files: path in the repository -> file, or its content.

    Raises:
        ValueError: one of them holds a secret, or a path or the name of this machine; the message says which file and
            what, and does not repeat it.
    """
    for name, file in files.items():
        if Path(name).suffix.lower() in _NUMBERS:
            continue
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        find = find_secret if Path(name).name in _VOCABULARIES else find_private
        if (found := find(content.decode("utf-8", "replace"))) is not None:
            raise ValueError(f"{name!r} is not pushed: it holds {found}.")


def check_outgoing_shard(path: str | os.PathLike) -> None:
    """Looks through all that a Parquet file says: its images, its texts in columns of any type, and what its schema
    notes.

    Raises:
        ValueError: the file is damaged; it holds bytes that are no image, or an image with EXIF, a place or other
            metadata; or a text holds a secret, or a path or the name of this machine.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .data.parquet_shards import small_batches

    name = Path(path).name
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            noted = "\n".join(_notes(file))
            if (found := find_private(noted)) is not None:
                raise ValueError(f"{name!r} is not pushed: its schema holds {found}.")
            for batch in small_batches(file):
                for column, values in zip(batch.schema.names, batch.columns, strict=True):
                    texts, images = _said(values)
                    if (found := find_private("\n".join(texts))) is not None:
                        raise ValueError(f"{name!r} is not pushed: its column {column!r} holds {found}.")
                    _check_pixels_alone(images, name)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as Parquet: {error}") from error


def _notes(file: Any) -> Iterator[str]:
    """Names and notes of the columns of a `pyarrow.parquet.ParquetFile`, and those of the file."""
    yield str(file.schema)
    for noted in (file.metadata.metadata, *(field.metadata for field in file.schema_arrow)):
        for name, value in (noted or {}).items():
            if name != b"ARROW:schema":  # the same again, in base64
                yield name.decode("utf-8", "replace")
                yield value.decode("utf-8", "replace")


def _said(values: Any) -> tuple[list[str], list[Any]]:
    """All texts below a column of Arrow, and the columns of bytes there, which are its images."""
    import pyarrow as pa

    kind = values.type
    texts: list[str] = []
    images: list[Any] = []
    parts: list[Any] = []
    if isinstance(kind, pa.BaseExtensionType):
        parts = [values.storage]
    elif pa.types.is_dictionary(kind):
        parts = [values.dictionary]
    elif pa.types.is_struct(kind):
        names = {field.name for field in kind}
        # The run lengths of masks are no text.
        parts = [values.field(name) for name in names if not (name == "counts" and names == {"size", "counts"})]
    elif pa.types.is_map(kind):
        parts = [values.keys, values.items]
    elif pa.types.is_nested(kind):
        parts = [values.flatten()]
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        texts = [text for text in values.to_pylist() if text]
    elif pa.types.is_large_binary(kind) or pa.types.is_binary(kind) or pa.types.is_binary_view(kind):
        images = [values]
    for part in parts:
        below_texts, below_images = _said(part)
        texts += below_texts
        images += below_images
    return texts, images


def _check_pixels_alone(images: Iterable[Any], name: str) -> None:
    from .images import holds_more

    for cell in chain.from_iterable(images):
        try:
            more = cell.is_valid and holds_more(cell.as_py())
        except ValueError as error:
            raise ValueError(f"{name!r} is not pushed: it holds bytes that are no image: {error}") from error
        if more:
            raise ValueError(
                f"{name!r} is not pushed: one of its images holds more than its pixels, such as where it was taken. "
                "`pixclip_hf.save_records` writes pixels alone."
            )


def listing(files: Mapping[str, Path | bytes]) -> str:
    """One line per file: its size in bytes and its path in the repository."""
    sizes = {name: len(file) if isinstance(file, bytes) else Path(file).stat().st_size for name, file in files.items()}
    return "\n".join(f"{size:>15,}  {name}" for name, size in sorted(sizes.items()))
