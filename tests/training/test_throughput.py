"""Images, regions and tokens per second: counted without padding, timed without what lies between two logs."""

import torch

from pixclip_hf.training import throughput
from pixclip_hf.training.throughput import Throughput


def batch(images, regions=None, **masks):
    found = {"pixel_values": torch.zeros(images, 3, 2, 2), **{k: torch.tensor(v) for k, v in masks.items()}}
    return found if regions is None else {**found, "region_attention_mask": torch.tensor(regions)}


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    counter = Throughput()
    assert counter.rates(lambda counts: counts) == {}
    counter.count(batch(2, [[1, 0], [1, 1]], attention_mask=[[1, 1, 0], [1, 0, 0]]))
    now[0] += 1.5
    counter.count(batch(4, [[1]], region_text_attention_mask=[[[1, 1, 1, 1, 1]]]))
    now[0] += 0.5
    rates = counter.rates(lambda counts: 2 * counts)  # two ranks alike
    assert rates == {"images_per_second": 6.0, "regions_per_second": 4.0, "tokens_per_second": 8.0}
    now[0] += 1000  # an evaluation
    counter.count(batch(3))
    now[0] += 1
    assert counter.rates(lambda counts: counts) == {"images_per_second": 3.0}
