"""Keeps the code of a model's pipelines beside its saved configuration."""

import shutil
import sys
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from transformers.dynamic_module_utils import custom_object_save, get_relative_imports
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)


class SavesPipelines:
    """Mixin of a configuration: `save_pretrained` writes the pipelines' code and names it in `custom_pipelines`.

    transformers copies the code of models and processors, but that of a pipeline only when a pipeline is saved, and
    loses it when a model is loaded and saved again.
    """

    # Task -> pipeline class, filled where the package is installed; empty in code that came with a repository.
    pipeline_classes: ClassVar[dict[str, type]] = {}
    _auto_class: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A registration is for the class that it names: saving a subclass from elsewhere would copy its module and die
        # on what that imports.
        cls._auto_class = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pipeline_classes:
            # The tasks are registered. transformers would all the same ask for `trust_remote_code` and run the
            # repository's code, if it saw that the repository brings pipelines along.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves `config.json` and the code that it names: of the configuration and of the pipelines."""
        folder = Path(save_directory)
        installed = bool(self.pipeline_classes)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if installed:
                self.custom_pipelines = self._copy_installed_pipelines(folder)
            elif getattr(self, "custom_pipelines", None):
                self.custom_pipelines = self._copy_repository_pipelines(folder)
        try:
            super().save_pretrained(save_directory)  # type: ignore[misc]
        finally:
            if installed:
                vars(self).pop("custom_pipelines", None)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, **kwargs)  # type: ignore[attr-defined]

    def _copy_installed_pipelines(self, folder: Path) -> dict[str, dict[str, Any]]:
        tasks = {}
        for task, pipeline_class in self.pipeline_classes.items():
            custom_object_save(pipeline_class, folder)
            module = pipeline_class.__module__.split(".")[-1]
            tasks[task] = {"impl": f"{module}.{pipeline_class.__name__}", "pt": ["AutoModel"]}
        return tasks

    def _copy_repository_pipelines(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Copies from where the configuration came from; a task whose code is no longer found there is left out."""
        tasks = {}
        for task, info in self.custom_pipelines.items():
            try:
                todo, done = [info["impl"].split(".")[0]], set()
                while todo:
                    done.add(module := todo.pop())
                    source = self._find_code(f"{module}.py")
                    todo += set(get_relative_imports(source)) - done
                    target = folder / f"{module}.py"
                    if not (target.exists() and target.samefile(source)):
                        shutil.copyfile(source, target)
            except OSError as error:
                logger.warning(f"The code of the pipeline {task!r} is not saved, {folder} loads without it: {error}")
            else:
                tasks[task] = info
        return tasks

    def _find_code(self, name: str) -> str | Path:
        # transformers keeps the code that it has loaded in a folder named after the commit.
        loaded = Path(sys.modules[type(self).__module__].__file__).parent
        if (loaded / name).is_file():
            return loaded / name
        return cached_file(self._name_or_path, name, revision=loaded.name)  # type: ignore[attr-defined]


__all__ = ["SavesPipelines"]
