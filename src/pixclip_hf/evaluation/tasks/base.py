"""What a task of the evaluation is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...encoders.cached import CachedEncoder
from ..image_sets import Images, read_images
from ..intervals import RESAMPLES
from ..report import Result


@dataclass(frozen=True)
class Option:
    """An argument of a task, in Python and on the command line.

    Args:
        default: its value when it is not given, whose type it has.
        help: its help text on the command line.
        choices: values that it may have; any when None.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] | None = None


class Task:
    """One way to measure an encoder. A new task is a file in this folder with a subclass, and its line in `TASKS`.

    Attributes:
        name: its name on the command line and in results.
        layout: how its data must be laid out.
        protocols: those beside `corrected`, which follows the paper; `official` repeats a published script.
        primary_measure: the measure that selects a model; higher is better.
        options: its own arguments.
        hub_task: its nearest task on the Hub, for model cards.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    protocols: ClassVar[tuple[str, ...]] = ()
    primary_measure: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    hub_task: ClassVar[str]

    def read(
        self, data_dir: str | Sequence[str], split: str | None = None, protocol: str | None = None, **options: Any
    ) -> Images:
        """Reads the data.

        Args:
            data_dir: a folder, as `layout` says, `scenes:N:SEED`, or the words of any source, as in [`read_images`].
            split: the split of a dataset that has several.
            protocol: None for `corrected`, or one of `protocols`.
            options: all of `options`.

        Raises:
            FileNotFoundError: nothing there that the task can read; the message shows the layout.
            ValueError: a split that is not there, or an image that is missing.
        """
        return read_images(self.name, data_dir, split)

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        """Measures on data that was read.

        Args:
            encoder: what is measured.
            data: as [`Task.read`] gives it.
            protocol, options: as in [`Task.read`].
            resamples: the number of resamples of the bootstrap intervals; 0 for none.
        """
        raise NotImplementedError

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        """Draws what was measured, on some of the images.

        Args:
            encoder, data, protocol, options: as in [`Task.measure`].
            folder: where the pictures go, which exists.
            name: what their names begin with.

        Returns:
            The names of the files; none for a task that has no pictures.
        """
        return []

    def run(
        self,
        encoder: CachedEncoder,
        data_dir: str | Sequence[str],
        protocol: str | None = None,
        split: str | None = None,
        resamples: int = RESAMPLES,
        **options: Any,
    ) -> list[Result]:
        """Reads the data and measures. Arguments as in [`Task.read`] and [`Task.measure`]; options that are left out
        have their defaults."""
        data, options = self.prepared(data_dir, protocol, split, options)
        return self.measure(encoder, data, protocol, resamples, **options)

    def prepared(
        self, data_dir: str | Sequence[str], protocol: str | None, split: str | None, options: Mapping[str, Any]
    ) -> tuple[Images, dict[str, Any]]:
        """The data, and the task's own options: those that are left out have their defaults."""
        if not isinstance(data_dir, str) and len(data_dir) == 1:
            (data_dir,) = data_dir
        own = {name: options.get(name, option.default) for name, option in self.options.items()}
        return self.read(data_dir, split, protocol, **own), own


def joined_options(tasks: Sequence[Task]) -> dict[str, Option]:
    """The options of all tasks by name.

    Raises:
        ValueError: two tasks have different options of one name.
    """
    joined: dict[str, Option] = {}
    for task in tasks:
        for name, option in task.options.items():
            if joined.setdefault(name, option) != option:
                raise ValueError(f"Option {name!r} of {task.name!r} differs from that of another task.")
    return joined
