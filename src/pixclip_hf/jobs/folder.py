"""The folder of a run: its settings, its lock, and which shards are done."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.whole_files import file_fault, file_names, only_writer, remove_unfinished, write_json

logger = logging.get_logger(__name__)

MANIFESTS = "shards"
SIZES = "bytes"
"""Entry of a manifest: the files of its shard, and how large they are."""
BETWEEN = "between"


class JobFolder:
    """The folder that a run writes to.

    Args:
        path: the folder, made if it does not exist.
        settings_name: the file that holds all that the output depends on.
        folders: folders of the output's files, beside that of the manifests.
    """

    def __init__(self, path: str | os.PathLike, settings_name: str, folders: Sequence[str] = ("data",)):
        self.path, self.settings_name = Path(path), settings_name
        self.folders = (*folders, MANIFESTS)

    @contextmanager
    def claimed(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Begins a run or continues one, as the only process that does.

        Raises:
            ValueError: the folder holds a run with other settings, or another process writes to it.
        """
        for name in self.folders:
            (self.path / name).mkdir(parents=True, exist_ok=True)
        with only_writer(self.path, "`output`"):
            self._start_or_continue(settings)
            yield

    def _start_or_continue(self, settings: Mapping[str, Any]) -> None:
        for folder in (self.path, *(self.path / name for name in self.folders)):
            remove_unfinished(folder)
        path = self.path / self.settings_name
        if not path.exists():
            write_json(path, settings)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        # What the run was made with is kept; everything else must be the same.
        for name in [name for name in settings if name != "package_version"]:
            if name == "items_digest" and found.get(name) != settings[name]:
                raise ValueError(
                    f"`output` {str(self.path)!r} holds a run over other items: what {settings['source']!r} lists has "
                    "changed since it began. Choose another folder."
                )
            if found.get(name) != settings[name]:
                raise ValueError(
                    f"`output` {str(self.path)!r} holds a run with other settings: its {name} is {found.get(name)}, "
                    f"now {settings[name]}. Choose another folder."
                )

    def done(self, shards: int) -> np.ndarray:
        """Which of so many shards are done: `(S,)` bool. A shard whose files were cut or removed since is named in a
        warning, and is to be done again."""
        found = np.zeros(shards, dtype=bool)
        for number in map(int, done_shards(self.path)):
            if (fault := _shard_fault(self.path, number)) is None:
                found[number] = True
            else:
                logger.warning(f"Shard {number} of {str(self.path)!r} is done again: {fault}.")
                manifest_path(self.path, number).unlink()
        return found


def done_shards(output: str | os.PathLike) -> np.ndarray:
    """The numbers of the shards that have a manifest, ascending: `(D,)` int64."""
    names = (os.path.splitext(name) for name in file_names(Path(output, MANIFESTS)))
    numbers = (int(name) for name, suffix in names if suffix == ".json" and not name.startswith("."))
    return np.sort(np.fromiter(numbers, dtype=np.int64))


def _shard_fault(output: Path, number: int) -> str | None:
    path = manifest_path(output, number)
    try:
        sizes = json.loads(path.read_text(encoding="utf-8")).get(SIZES, {})
    except (ValueError, AttributeError):
        return f"{path.name} is no JSON of a manifest"
    faults = ((name, file_fault(output / name, [size], content=False)) for name, size in sizes.items())
    return next((f"{name} {fault}" for name, fault in faults if fault), None)


def file_sizes(output: Path, paths: Sequence[Path]) -> dict[str, int]:
    """What a manifest keeps of the files of its shard under [`SIZES`], by their names in the folder."""
    return {path.relative_to(output).as_posix(): path.stat().st_size for path in paths}


def manifest_path(output: Path, number: int) -> Path:
    """The file that says that a shard is done, and what became of it."""
    return output / MANIFESTS / f"{number:05d}.json"


def manifests(output: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The manifests of the shards that are done, in their order."""
    for number in done_shards(output):
        yield json.loads(manifest_path(Path(output), int(number)).read_text(encoding="utf-8"))
