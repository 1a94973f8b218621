"""The folder of a run: its settings, its lock, and which shards are done."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..data.whole_files import UNFINISHED, whole_file

MANIFESTS = "shards"
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
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._start_or_continue(settings)
                yield
        except Timeout as error:
            raise ValueError(f"`output` {str(self.path)!r} is being written to by another process.") from error

    def _start_or_continue(self, settings: Mapping[str, Any]) -> None:
        for folder in (self.path, *(self.path / name for name in self.folders)):
            for leftover in [name for name in file_names(folder) if name.endswith(UNFINISHED)]:  # of a run that died
                (folder / leftover).unlink(missing_ok=True)
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
        """Which of so many shards are done: `(S,)` bool."""
        found = np.zeros(shards, dtype=bool)
        found[done_shards(self.path)] = True
        return found


def file_names(folder: Path) -> Iterator[str]:
    """The names of the files and folders in a folder, one after another: a list of a million takes 100 MB. None where
    the folder does not exist."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name


def done_shards(output: str | os.PathLike) -> np.ndarray:
    """The numbers of the shards that are done, ascending: `(D,)` int64."""
    names = (os.path.splitext(name) for name in file_names(Path(output, MANIFESTS)))
    numbers = (int(name) for name, suffix in names if suffix == ".json" and not name.startswith("."))
    return np.sort(np.fromiter(numbers, dtype=np.int64))


def manifest_path(output: Path, number: int) -> Path:
    """The file that says that a shard is done, and what became of it."""
    return output / MANIFESTS / f"{number:05d}.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def manifests(output: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The manifests of the shards that are done, in their order."""
    for number in done_shards(output):
        yield json.loads(manifest_path(Path(output), int(number)).read_text(encoding="utf-8"))
