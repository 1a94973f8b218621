"""The measures of the demo, on its two settings."""

from collections.abc import Sequence
from typing import Any

from ...encoders.cached import CachedEncoder
from ...scenes.dataset import make_scene
from ...scenes.measures import measure_scenes, scene_chances
from ..image_sets import parse_scenes, refuse_split
from ..intervals import RESAMPLES
from ..report import Result
from .base import Task


class Scenes(Task):
    """What a model has learned of drawn scenes, by the names of the demo's `metrics.json`."""

    name = "scenes"
    layout = "scenes:N:SEED                                     drawn scenes, nothing to download"
    primary_measure = "region_description_exact"
    hub_task = "zero-shot-image-classification"

    def run(
        self,
        encoder: CachedEncoder,
        data_dir: str | Sequence[str],
        protocol: str | None = None,
        split: str | None = None,
        resamples: int = RESAMPLES,
        **options: Any,
    ) -> list[Result]:
        refuse_split(split, str(data_dir), own="test")
        number, seed = parse_scenes(data_dir)
        if encoder.encoder.view is not None:
            raise ValueError(
                "`scenes` measures CLOC and PixCLIP; for other models take region-classification or region-retrieval "
                f"with `--data_dir {data_dir}`."
            )
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        chance: dict[str, float] = {}
        for setting, prefix in (("default", ""), ("hard", "hard_")):
            records = [make_scene(index, "test", seed, setting=setting) for index in range(number)]
            measured, ranges = measure_scenes(encoder, records, resamples)
            metrics |= {prefix + name: value for name, value in measured.items()}
            chance |= {prefix + name: value for name, value in scene_chances(measured).items()}
            intervals |= {prefix + name: value for name, value in ranges.items()}
        return [Result(self.name, "scenes", f"seed {seed}", metrics, intervals, split="test", chance=chance)]
