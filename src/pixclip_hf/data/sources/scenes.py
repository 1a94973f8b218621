"""Drawn scenes: nothing to download."""

import io
from dataclasses import dataclass

from ...scenes.dataset import make_scene
from .base import AnnotatedImage, Source


@dataclass
class Scenes(Source, kind="scenes"):
    """Scenes, each drawn when it is read.

    Args:
        number: the number of scenes.
        seed: the seed of the drawing.
        split: `train`, `validation` or `test`, which never meet.
        size: pixels of a side.
        setting: `default` or `hard`.
    """

    number: int
    seed: int = 0
    split: str = "train"
    size: int = 64
    setting: str = "default"

    def __post_init__(self) -> None:
        try:
            self.number, self.seed, self.size = int(self.number), int(self.seed), int(self.size)
        except ValueError as error:
            raise ValueError(f"`source` must have the form scenes:NUMBER[:SEED] in whole numbers: {error}.") from error
        if self.number < 1:
            raise ValueError(f"`source` must have at least one scene, got {self.number}.")
        super().__post_init__()

    def __len__(self) -> int:
        return self.number

    def read(self, position: int) -> AnnotatedImage:
        scene = make_scene(position, self.split, self.seed, self.size, self.setting)
        buffer = io.BytesIO()
        scene["image"].save(buffer, format="PNG", compress_level=1)
        texts = scene["captions"], scene["alt_text"]
        size = scene["width"], scene["height"]
        name = f"scene-{self.seed}-{position:08d}"
        return AnnotatedImage(name, buffer.getvalue(), scene["regions"], *texts, size=size)
