"""The annotation pipeline: images per second of each stage, what an engine adds to a record, and memory over 100,000.

Runs without arguments in a few minutes. Models are tiny and random: what is measured is the code around them. Prints
tables of medians and, last, one line of JSON.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from datasets import disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    PreTrainedTokenizerFast,
)

from pixclip_hf.annotation.longgrit import LongGritArguments, longgrit_stages
from pixclip_hf.annotation.passes import annotation_passes
from pixclip_hf.annotation.sources import ReadRecords
from pixclip_hf.annotation.stages import add_step, open_batch, pipeline_features
from pixclip_hf.annotation.vesl import VeslRegions
from pixclip_hf.annotation.vesl.captioning import CaptionColumn
from pixclip_hf.annotation.vesl.detection import BoxRules, OpenVocabularyDetector, SimulatedDetector
from pixclip_hf.annotation.vesl.phrases import NgramCandidates, PhraseCandidates
from pixclip_hf.jobs import JobFolder, plan_shards, run_passes
from pixclip_hf.jobs.passes import work

REPEATS = 3
IMAGES = 128
RECORDS, SHARD = 100_000, 1_000
ENGINE_RECORDS = 4_000


@dataclasses.dataclass
class OneScene:
    """Stub of a source: every record is the same scene."""

    batch_size: int = 64
    name: ClassVar[str] = "source"
    columns: ClassVar[dict[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch):
        batch = open_batch(batch)
        if not hasattr(self, "_scene"):
            empty = {name: [None] for name in batch} | {"position": [0]}
            self._scene = ReadRecords("scenes:1")(empty)
        for name, (value,) in self._scene.items():
            if name != "position":
                batch[name] = [value] * len(batch["position"])
        batch["record_id"] = [str(position) for position in batch["position"]]
        return batch


@dataclasses.dataclass
class StubModel:
    """Stub of a model: notes that it was there."""

    batch_size: int = 64
    name: ClassVar[str] = "stub"
    columns: ClassVar[dict[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __call__(self, batch):
        batch = open_batch(batch)
        for row in range(len(batch["position"])):
            add_step(batch, row, self.name, "stub")
        return batch


def tiny_owlv2(folder: str) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", *alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("<bos>", 1), ("<eos>", len(vocabulary) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 48, **sizes}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(vocabulary) - 1}
    vision = {"image_size": 64, "patch_size": 8, **sizes}
    torch.manual_seed(0)
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=64)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 64, "width": 64}), fast).save_pretrained(folder)
    return folder


def seconds(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def call_in_batches(stage, columns: dict[str, list]) -> dict[str, list]:
    parts = [
        stage({name: values[start : start + stage.batch_size] for name, values in columns.items()})
        for start in range(0, len(columns["position"]), stage.batch_size)
    ]
    return {name: [value for part in parts for value in part[name]] for name in columns}


def stage_rates(owlv2: str) -> dict[str, float]:
    """Images per second of each stage, in a pipeline with the stages in front of it; the first call loads models."""
    rules = BoxRules(threshold=0.0, min_area=0.0)
    before_detection = [ReadRecords(f"scenes:{IMAGES}"), CaptionColumn(), PhraseCandidates()]
    last = [SimulatedDetector(), VeslRegions()]
    branches = {
        "OWLv2 detector (tiny, random)": OpenVocabularyDetector(owlv2, rules),
        "n-gram candidates": NgramCandidates(max_candidates=32),
    }
    names = ["scenes read", "caption column", "phrase candidates (spaCy)", "simulated detector", "regions"]
    features = pipeline_features([*before_detection, *last])
    times: dict[str, list[float]] = {name: [] for name in [*names, *branches]}
    for _ in range(REPEATS + 1):
        columns = {name: [None] * IMAGES for name in features} | {"position": list(range(IMAGES))}
        for name, stage in zip(names, [*before_detection, *last], strict=True):
            if name == "simulated detector":
                for branch, other in branches.items():
                    times[branch].append(seconds(partial(call_in_batches, other, columns)))
            begin = time.perf_counter()
            columns = call_in_batches(stage, columns)
            times[name].append(time.perf_counter() - begin)
    return {name: IMAGES / statistics.median(values[1:]) for name, values in times.items()}


def longgrit_rates() -> dict[str, float]:
    """Images per second of each stage of LongGRIT, without models: cutting out, drawing, reading answers, checking."""
    source, *stages = [ReadRecords(f"scenes:{IMAGES}"), *longgrit_stages(LongGritArguments())]
    times: dict[str, list[float]] = {stage.name: [] for stage in stages}
    for _ in range(REPEATS + 1):
        empty = {name: [None] * IMAGES for name in pipeline_features([source, *stages])}
        columns = call_in_batches(source, empty | {"position": list(range(IMAGES))})
        for stage in stages:
            begin = time.perf_counter()
            columns = call_in_batches(stage, columns)
            times[stage.name].append(time.perf_counter() - begin)
    return {name: IMAGES / statistics.median(values[1:]) for name, values in times.items()}


def engine_times() -> dict[str, float]:
    """Milliseconds per record of a plain loop over the same stages, and of each engine, which writes what it makes."""
    stages = [OneScene(), *(StubModel() for _ in range(4))]
    features = pipeline_features(stages)
    plan = plan_shards([(ENGINE_RECORDS, None)], SHARD)

    def plain():
        for number in range(len(plan)):
            columns = {name: [None] * SHARD for name in features} | {"position": list(plan[number].positions)}
            for stage in stages:
                columns = call_in_batches(stage, columns)

    def engine(name):
        with tempfile.TemporaryDirectory() as output:
            folder = JobFolder(output, "run.json", ("data", "rejected"))
            with folder.claimed({}):
                run_passes(annotation_passes(stages, folder.path), plan, folder, engine=name, progress=False)
            assert folder.done(len(plan)).all()

    ways = {"plain loop": plain, "local engine": lambda: engine("local")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            times[name].append(seconds(way))
    if find_spec("ray") is not None:
        # The first run starts Ray; every run starts its actor.
        times["ray engine, with its actor's start"] = [seconds(lambda: engine("ray")) for _ in range(2)]
    return {name: 1000 * statistics.median(values[1:]) / ENGINE_RECORDS for name, values in times.items()}


def memory_megabytes() -> dict[int, float]:
    """Resident memory of this process after so many records, written as a run writes them."""
    stages = [OneScene(), StubModel()]
    plan = plan_shards([(RECORDS, None)], SHARD)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "rejected", "shards"):
            Path(folder, name).mkdir()
        shards = (plan[number] for number in range(len(plan)))
        for shard, _ in work(annotation_passes(stages, Path(folder)), Path(folder), shards):
            Path(folder, "data", f"train-{shard.number:05d}.parquet").unlink()
            done = shard.stop
            if done % (RECORDS // 5) == 0:
                found[done] = psutil.Process().memory_info().rss / 2**20
    return found


def main() -> None:
    torch.set_num_threads(2)
    disable_progress_bars()
    begin = time.perf_counter()
    memory = memory_megabytes()
    rate = RECORDS / (time.perf_counter() - begin)
    print(f"memory of the local engine, {rate:,.0f} records per second with stub models, written to disk")
    print(f"{'records':>9} {'MB':>8}")
    for records, megabytes in memory.items():
        print(f"{records:>9,} {megabytes:>8.0f}")
    with tempfile.TemporaryDirectory() as folder:
        rates = stage_rates(tiny_owlv2(folder))
    print(f"\n{'stage':<32} {'images per second':>16}")
    for name, rate in (rates | {f"LongGRIT: {name}": rate for name, rate in longgrit_rates().items()}).items():
        print(f"{name:<32} {rate:>16,.0f}")
    engines = engine_times()
    print(f"\n{'five stages of stubs':<32} {'ms per record':>16}")
    for name, milliseconds in engines.items():
        print(f"{name:<32} {milliseconds:>16.3f}")
    first, last = memory[RECORDS // 5], memory[RECORDS]
    print(
        json.dumps(
            {
                "memory_ratio_100k_to_20k": round(last / first, 3),
                "local_engine_added_ms": round(engines["local engine"] - engines["plain loop"], 3),
                "phrases_per_second": round(rates["phrase candidates (spaCy)"]),
            }
        )
    )


if __name__ == "__main__":
    main()
