"""How many scenes one core makes a second: whole records, their texts alone, and rows of a dataset.

Runs without arguments in under a minute. Prints medians over repeats and, last, one line of JSON.
"""

import json
import statistics
import time

from pixclip_hf.scenes.dataset import make_scene, scene_texts, scenes_dataset

REPEATS = 5
SCENES = 300


def rate(make, repeat: int) -> float:
    """Scenes per second; every repeat makes other scenes."""
    begin = time.process_time()
    make(repeat * SCENES)
    return SCENES / (time.process_time() - begin)


def main() -> None:
    columns = {
        "texts": lambda size: lambda start: [scene_texts(start + i, size=size) for i in range(SCENES)],
        "records": lambda size: lambda start: [make_scene(start + i, size=size) for i in range(SCENES)],
        "dataset": lambda size: lambda start: scenes_dataset(SCENES, size=size, start=start),
    }
    rates: dict[tuple[int, str], list[float]] = {}
    for repeat in range(REPEATS + 1):  # the first round fills the caches
        for size in (64, 128):
            for name, make in columns.items():
                value = rate(make(size), repeat)
                if repeat:
                    rates.setdefault((size, name), []).append(value)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    print("scenes per second on one core")
    print("| size | " + " | ".join(columns) + " |")
    print("| ---: |" + " ---: |" * len(columns))
    for size in (64, 128):
        print(f"| {size} | " + " | ".join(f"{medians[size, name]:,.0f}" for name in columns) + " |")
    print(
        json.dumps(
            {
                "scenes_per_second": round(medians[64, "records"]),
                "scenes_per_second_128": round(medians[128, "records"]),
                "dataset_rows_per_second": round(medians[64, "dataset"]),
            }
        )
    )


if __name__ == "__main__":
    main()
