"""One pipeline object in several threads: each caller has its own results."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import pipeline

LABELS = [["a red disc", "a blue ring"], ["something long", "x", "y and z"]]


def images_and_boxes(seed):
    image = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return image, [[2, 3, 20 + seed, 30], [5, 5, 39, 12 + seed]][: 1 + seed]


@pytest.mark.parametrize("stage", ["preprocess", "get_region_features", "postprocess"])
@pytest.mark.parametrize("task", ["zero-shot-region-classification", "region-feature-extraction"])
def test_callers_meet_and_keep_their_own(task, stage, tiny_cloc, monkeypatch):
    """Both calls are in the same stage before either goes on: what one of them left on the pipeline, the other would
    find."""
    model, processor = tiny_cloc
    pipe = pipeline(task, model=model, processor=processor)
    calls = []
    for seed, labels in enumerate(LABELS):
        image, boxes = images_and_boxes(seed)
        options = {"candidate_labels": labels} if task.startswith("zero") else {}
        calls.append(lambda image=image, boxes=boxes, options=options: pipe(image, boxes=boxes, **options))
    expected = [call() for call in calls]
    assert expected[0] != expected[1]

    barrier = threading.Barrier(2, timeout=30)
    owner = pipe.model if stage == "get_region_features" else pipe
    original = getattr(owner, stage)

    def meeting(*args, **options):
        barrier.wait()
        result = original(*args, **options)
        barrier.wait()
        return result

    monkeypatch.setattr(owner, stage, meeting)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert [future.result() for future in [pool.submit(call) for call in calls]] == expected


def test_lists_of_two_threads(tiny_cloc):
    """Lists go through a loader of their own, with batches that are sorted by the number of regions."""
    model, processor = tiny_cloc
    pipe = pipeline("zero-shot-region-classification", model=model, processor=processor)
    items = [images_and_boxes(seed) for seed in (0, 1, 0, 1)]

    def call(number):
        chosen = items if number % 2 else items[::-1]
        return pipe(
            [image for image, _ in chosen],
            boxes=[boxes for _, boxes in chosen],
            candidate_labels=LABELS[number % 2],
            batch_size=2,
        )

    expected = [call(0), call(1)]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(call, range(8))):
            assert found == expected[number % 2]
