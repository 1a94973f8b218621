"""Training on streams: resumed runs end as uninterrupted ones, over ranks every record is seen as often as in one."""

import os
from collections import Counter

import datasets
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModel, AutoProcessor, TrainingArguments
from transformers.utils import logging

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.streaming import RecordStream, stream_records
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.training import RegionTrainer

CLOCKS = {"train_runtime", "images_per_second", "regions_per_second", "tokens_per_second"}
IMAGES = 12


class Collator(RegionCollator):
    """Keeps the key of each record, in the batch too: workers are other processes."""

    def __call__(self, records):
        keys = torch.tensor([record["sample_key"] for record in records])
        return {**super().__call__(records), "keys": keys}


class Keeper(RegionTrainer):
    """Takes the keys out again and keeps them."""

    def training_step(self, model, inputs, *args):
        self.keys = [*getattr(self, "keys", []), *map(tuple, inputs.pop("keys").tolist())]
        return super().training_step(model, inputs, *args)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = scenes_dataset(IMAGES, size=32)
    for shard in range(4):
        records.shard(4, shard).to_parquet(tmp_path / "data" / f"train-{shard}.parquet")
    return str(tmp_path / "data")


def train(tiny, data, folder, resume=None, trainer_class=Keeper, **changes):
    model, processor = tiny
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 8,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4,
        "learning_rate": 1e-3, "dataloader_num_workers": 2,
    }  # fmt: skip
    trainer = trainer_class(
        model,
        TrainingArguments(**settings | changes),
        data_collator=Collator(processor, regions_per_image=2),
        train_dataset=RecordStream(stream_records(data, "train"), shuffle_buffer=2),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulation", (1, 2))
def test_resumes_to_the_same_end(accumulation, tiny_cloc, data, tmp_path):
    """Stopped in the first or the second pass: same records, logs and weights, and none repeated or left out."""
    model, processor = tiny_cloc
    model.save_pretrained(tmp_path / "start")
    options = {"gradient_accumulation_steps": accumulation}
    whole = train(tiny_cloc, data, tmp_path / "whole", **options)
    assert len(whole.keys) == 16 * accumulation
    passes = Counter(epoch for epoch, _ in whole.keys)
    assert passes[0] == IMAGES and len(set(whole.keys)) == len(whole.keys)
    fresh = AutoModel.from_pretrained(tmp_path / "start"), processor
    resumed = train(fresh, data, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"), **options)
    assert resumed.keys == whole.keys[8 * accumulation :]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    logs = [
        [{name: value for name, value in log.items() if name not in CLOCKS} for log in run.state.log_history[:8]]
        for run in (whole, resumed)
    ]
    assert logs[0] == logs[1] and logs[0][0]["corrupt_records"] == 0 and logs[0][3]["epoch"] == 0.5


def test_a_checkpoint_without_a_place_is_refused(tiny_cloc, data, tmp_path):
    train(tiny_cloc, data, tmp_path / "run", max_steps=4)
    (tmp_path / "run" / "checkpoint-4" / "stream_0.json").unlink()
    with pytest.raises(ValueError, match="holds no position of the stream for rank 0"):
        train(tiny_cloc, data, tmp_path / "again", str(tmp_path / "run" / "checkpoint-4"))
    with pytest.raises(ValueError, match="cannot go on with"):
        train(tiny_cloc, data, tmp_path / "run", max_steps=4, save_steps=2)
        checkpoint = str(tmp_path / "run" / "checkpoint-2")
        train(tiny_cloc, data, tmp_path / "again", checkpoint, dataloader_num_workers=1)


def test_a_stream_needs_max_steps(tiny_cloc, data, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        train(tiny_cloc, data, tmp_path / "run", max_steps=-1)


def work(rank, folder, data):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # fmt: skip
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    processor = AutoProcessor.from_pretrained(folder / "start")
    found = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-2"))):
        tiny = AutoModel.from_pretrained(folder / "start"), processor
        options = {"max_steps": 4, "save_steps": 2, "ddp_backend": "gloo"}
        trainer = train(tiny, data, folder / name, resume, **options)
        logs = [log for log in trainer.state.log_history if "images_per_second" in log]
        found[name] = trainer.keys, trainer.model.state_dict(), len(logs)
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks(tiny_cloc, data, tmp_path):
    """Each reads its share; both resume."""
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "start")
    mp.spawn(work, args=(tmp_path, data), nprocs=2)
    found = [torch.load(tmp_path / f"found{rank}.pt", weights_only=False) for rank in range(2)]
    keys = [found[rank]["whole"][0] for rank in range(2)]
    # Two of the four shards each, six records: three of the four steps are the first pass.
    first = [key for rank in range(2) for key in keys[rank] if key[0] == 0]
    assert len(first) == IMAGES == len(set(first))
    for rank in range(2):
        whole, resumed = found[rank]["whole"], found[rank]["resumed"]
        assert resumed[0] == whole[0][4:] and whole[2] == resumed[2] == 4
        for name, value in whole[1].items():
            assert torch.equal(resumed[1][name], value), name
