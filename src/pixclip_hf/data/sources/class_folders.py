"""Class folders, as ImageNet has them: a folder per class with its images."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..source_index import Notes, Row
from .base import IMAGE_SUFFIXES, AnnotatedImage, IndexedSource, readable

logger = logging.get_logger(__name__)


@dataclass
class ClassFolders(IndexedSource, kind="class_folders"):
    """Images in the folder of their class; as records, the class is the category of a region that is the whole image.

    Hidden folders and folders without an image are no classes.

    Args:
        folder: above the folders of the classes, in the order of their names, and `classes.json` where the folders
            have other names than the classes (`{"FOLDER": "name"}`).
    """

    folder: str

    def paths(self) -> Sequence[str]:
        return [self.folder]

    def rows(self, notes: Notes) -> Iterator[Row]:
        path = Path(self.folder, "classes.json")
        names = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
        root = os.fsencode(self.folder)
        lacking, skipped = [], []
        for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
            images = [
                name
                for name in sorted(os.listdir(os.path.join(root, folder)))
                if not name.startswith(b".") and os.fsdecode(os.path.splitext(name)[1]).lower() in IMAGE_SUFFIXES
            ]
            name = readable(folder)
            if folder.startswith(b".") or not images:
                skipped.append(name)
            elif names is not None and name not in names:
                lacking.append(name)
            else:
                notes.categories.append(name.replace("_", " ") if names is None else names[name])
                for image in images:
                    path_of_image = os.path.join(folder, image)
                    yield Row(readable(path_of_image), path_of_image, str(len(notes.categories) - 1))
        if lacking:
            raise ValueError(f"{path} must name every class folder; it lacks {', '.join(lacking[:5])}.")
        if skipped:
            logger.warning(f"{self.folder!r} has folders that are no classes: {', '.join(skipped[:5])}.")

    def build(self, position: int, row: Row) -> AnnotatedImage:
        label = int(row.content)
        region = {"id": position, "box": (0, 0, 1, 1), "category": self.categories[label]}
        return AnnotatedImage(row.name, self.image_path(row.image), [region], normalized=True, label=label)
