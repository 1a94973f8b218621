"""Training runs on scenes: losses that fall, parts that add up, evaluation, resuming."""

import json

import pytest
import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from pixclip_hf.data.collator import RegionCollator, RegionDataset, content_key
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset
from pixclip_hf.training.trainer import KeyedCollator, RegionTrainer

FAMILIES = ("cloc", "pixclip")
PARTS = {
    "cloc": {"image_text", "region_text", "grounding_l1", "grounding_giou"},
    "pixclip": {"image_text", "mask_text", "crop_text", "local_global"},
}
CLOCKS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"} | {
    f"{what}_per_second" for what in ("images", "regions", "tokens")
}


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, size=32) for index in range(12)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tiny(family, request):
    """(model, processor) of the family."""
    return request.getfixturevalue(f"tiny_{family}")


def collator(tiny, **arguments):
    crops = tiny[1].has_crops
    return RegionCollator(tiny[1], **{"regions_per_image": 2, "crops": crops, **arguments})


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(**given | changes)


def train(tiny, records, folder, trainer_class=RegionTrainer, resume=None, **changes):
    model, processor = tiny
    trainer = trainer_class(
        model,
        arguments(folder, **changes),
        data_collator=collator(tiny),
        train_dataset=records,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def test_loss_falls(tiny, family, scenes, tmp_path):
    settings = {"max_steps": 60, "warmup_steps": 5, "lr_scheduler_type": "constant_with_warmup"}
    logs = steps_of(train(tiny, scenes[:4], tmp_path, **settings))
    assert len(logs) == 60
    first, last = ({name: sum(log[name] for log in part) / 5 for name in part[0]} for part in (logs[:5], logs[-5:]))
    assert last["loss"] < 0.75 * first["loss"]
    for part in PARTS[family]:
        assert last[f"loss_{part}"] < 0.95 * first[f"loss_{part}"], part


def test_parts_add_up_to_the_loss(tiny, family, scenes, tmp_path):
    model = tiny[0]
    changes = {"cloc": ("region_text", "image_text"), "pixclip": ("mask_text", "local_global")}[family]
    for name, weight in zip(changes, (0.5, 2.0), strict=True):
        setattr(model.config, f"{name}_loss_weight", weight)
    weights = model.loss_weights()
    assert sorted(weights.values()) == [0.5, 1, 1, 2]
    trainer = train(tiny, scenes, tmp_path, max_steps=4, logging_steps=2)
    for log in steps_of(trainer):
        parts = {name.removeprefix("loss_") for name in log if name.startswith("loss_")}
        assert parts == PARTS[family]
        assert log["loss"] == pytest.approx(sum(weights[name] * log[f"loss_{name}"] for name in parts), abs=2e-4)
    assert not trainer._parts


def test_the_loss_is_the_models_own(tiny, scenes, tmp_path):
    """One step over all records at once: what is logged is the loss of the batch, and so for a plain Trainer."""
    model, _ = tiny
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = collator(tiny)([{**scene, "sample_key": (0, i)} for i, scene in enumerate(scenes[:4])])
    expected = model.train()(**batch).loss.item()
    for trainer_class, records in ((RegionTrainer, scenes[:4]), (Trainer, RegionDataset(scenes[:4]))):
        model.load_state_dict(state)
        trainer = train(tiny, records, tmp_path, trainer_class, max_steps=1, remove_unused_columns=False)
        assert steps_of(trainer)[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_plain_trainer_trains_and_evaluates(tiny, scenes, tmp_path):
    model, _ = tiny
    before = model.vision_model.embeddings.patch_embedding.weight.clone()
    trainer = Trainer(
        model,
        arguments(tmp_path, remove_unused_columns=False),
        data_collator=collator(tiny),
        train_dataset=scenes,
        eval_dataset=scenes,
    )
    trainer.train()
    assert not torch.equal(model.vision_model.embeddings.patch_embedding.weight, before)
    loss = trainer.evaluate()["eval_loss"]
    batches = [collator(tiny)(scenes[start : start + 4]) for start in (0, 4, 8)]
    with torch.no_grad():
        assert loss == pytest.approx(sum(model.eval()(**batch).loss.item() for batch in batches) / 3, abs=1e-4)


def test_evaluation(tiny, family, scenes, tmp_path):
    """Parts weigh as the loss does, an image once, though the last batch is smaller."""
    model, _ = tiny
    trainer = RegionTrainer(model, arguments(tmp_path), data_collator=collator(tiny), eval_dataset=scenes[:6])
    metrics = trainer.evaluate()
    weights = model.loss_weights()
    assert {name for name in metrics if name.startswith("eval_loss_")} == {f"eval_loss_{n}" for n in PARTS[family]}
    total = sum(weight * metrics[f"eval_loss_{name}"] for name, weight in weights.items())
    assert metrics["eval_loss"] == pytest.approx(total, abs=1e-4)
    assert 0 <= metrics["eval_region_to_text_recall@1"] <= 1 and 0 <= metrics["eval_text_to_region_recall@1"] <= 1
    again = trainer.evaluate(metric_key_prefix="test")
    assert again["test_loss"] == metrics["eval_loss"]
    assert again["test_region_to_text_recall@1"] == metrics["eval_region_to_text_recall@1"]


class Canned(torch.nn.Module):
    """Returns what is in its batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, return_loss, part, **rows):
        return ModelOutput(loss=part.mean(), loss_parts={"part": part.mean()}, **rows)


def test_retrieval_over_the_whole_evaluation_set(tmp_path):
    """Three images of two slots in batches of two, the last slot padding. Texts 0 and 3 are the same text."""
    angles = {"regions": [0, 40, 80, 120, 200, 0], "texts": [5, 130, 75, 5, 190, 0]}
    identities = torch.tensor([11, 12, 13, 11, 15, 0])

    def unit(degrees):
        radians = torch.tensor(degrees).deg2rad()
        return torch.stack([radians.cos(), radians.sin()], dim=-1)

    columns = {
        "region_embeds": unit(angles["regions"]),
        "region_text_embeds": unit(angles["texts"]),
        "region_text_ids": identities,
        "region_attention_mask": torch.tensor([1, 1, 1, 1, 1, 0]),
    }
    records = [{name: values[2 * i : 2 * i + 2] for name, values in columns.items()} for i in range(3)]

    def collate(batch):
        merged = {name: torch.stack([record[name] for record in batch]) for name in columns}
        part = torch.full((len(batch),), float(len(batch)))
        return {"pixel_values": torch.zeros(len(batch), 3), "part": part, "return_loss": True, **merged}

    settings = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = RegionTrainer(Canned(), settings, data_collator=collate, eval_dataset=records)
    metrics = trainer.evaluate()
    # Regions at 0, 40, 80, 120, 200 find the texts at 5, 5 or 75 (35 away both), 75, 130, 190: the second has its own
    # text at 130; the fourth finds 130, another text. Texts at 5, 130, 75, 5, 190 find 0, 120, 80, 0, 200: the second
    # finds a wrong region; the fourth, a repetition of the first, counts as right.
    assert metrics["eval_region_to_text_recall@1"] == pytest.approx(3 / 5)
    assert metrics["eval_text_to_region_recall@1"] == pytest.approx(4 / 5)
    assert metrics["eval_loss"] == metrics["eval_loss_part"] == pytest.approx((2 + 2 + 1) / 3)


def test_gradient_accumulation(tiny, scenes, tmp_path):
    """As in Trainer: the step follows the mean gradient of the micro-batches."""
    model, processor = tiny
    before = {name: value.clone() for name, value in model.named_parameters()}
    batches = []

    def keep(records):
        batches.append(collator(tiny)(records))
        return batches[-1]

    settings = arguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = RegionTrainer(model, settings, data_collator=keep, train_dataset=scenes)
    trainer.train()
    assert len(batches) == 3
    after = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(before[name])
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    (sum(losses) / 3).backward()
    assert steps_of(trainer)[0]["loss"] == pytest.approx(sum(loss.item() for loss in losses) / 3, abs=1e-3)
    moved = 0
    for name, value in model.named_parameters():
        step = 0 if value.grad is None else 0.1 * value.grad
        torch.testing.assert_close(after[name], before[name] - step, atol=1e-6, rtol=1e-5)
        moved += bool((after[name] != before[name]).any())
    assert moved > 50


def test_resumes_to_the_same_end(tiny, family, scenes, tmp_path):
    """Step 4 lies inside the second epoch of three: order, draws, optimizer and logs continue as if uninterrupted."""
    model, processor = tiny
    model.save_pretrained(tmp_path / "start")
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = train(tiny, scenes, tmp_path / "whole", **settings)
    fresh = AutoModel.from_pretrained(tmp_path / "start"), processor
    resumed = train(fresh, scenes, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"), **settings)
    assert resumed.train_dataset.epoch == whole.train_dataset.epoch == 2
    assert resumed.model is not whole.model
    start = AutoModel.from_pretrained(tmp_path / "start").state_dict()
    changed = 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
        changed += not torch.equal(start[name], value)
    assert changed > 50
    logs = [[{k: v for k, v in log.items() if k not in CLOCKS} for log in steps_of(run)] for run in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 8


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_loss_that_is_not_finite_names_its_records(chunks, tiny, scenes, tmp_path):
    model, _ = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = []

    def spoil(records):
        """What a broken image does: the pixels of record 5 are no numbers."""
        batch = collator(tiny)(records)
        keys = [record["sample_key"] for record in records]
        drawn.append(keys)
        if (0, 5) in keys:
            batch["pixel_values"][keys.index((0, 5))] = float("nan")
        return batch

    settings = arguments(tmp_path, max_steps=3, learning_rate=0.0)
    trainer = RegionTrainer(model, settings, data_collator=spoil, train_dataset=scenes, gradient_cache_chunks=chunks)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    keys = next(keys for keys in drawn if (0, 5) in keys)
    message = str(error.value)
    assert f"The loss of step {trainer.state.global_step + 1} is nan. " in message
    assert f"`train_dataset`: {keys}; embeddings that are not finite: [(0, 5)]; parts: " in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_processes_than_records(tiny, scenes, tmp_path, monkeypatch):
    trainer = RegionTrainer(tiny[0], arguments(tmp_path), data_collator=collator(tiny), train_dataset=scenes[:3])
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    with pytest.raises(ValueError, match="`train_dataset` has 3 records for 4 processes"):
        trainer.train()


def test_batches_of_one_image(tiny, scenes, tmp_path):
    """The regions of an image are negatives of each other; its caption has none."""
    trainer = train(tiny, scenes[:4], tmp_path, per_device_train_batch_size=1, max_steps=4)
    logs = steps_of(trainer)
    assert len(logs) == 4 and all(log["loss_image_text"] == 0 < log["loss"] for log in logs)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("chunks", [1, 2])
def test_batches_without_regions(chunks, tiny, family, scenes, tmp_path):
    """Images without any region train on their captions; no parameter is left out or spoilt."""
    bare = [{**scene, "regions": []} for scene in scenes[:4]]
    settings = arguments(tmp_path, max_steps=2)
    trainer = RegionTrainer(
        tiny[0], settings, data_collator=collator(tiny), train_dataset=bare, gradient_cache_chunks=chunks
    )
    trainer.train()
    logs = steps_of(trainer)
    assert all(log["loss"] == log["loss_image_text"] > 0 for log in logs) and len(logs) == 2
    assert all(log[f"loss_{part}"] == 0 for log in logs for part in PARTS[family] - {"image_text"})
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_checkpoint_is_a_model(tiny, scenes, tmp_path):
    trainer = train(tiny, scenes, tmp_path, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(tiny[1])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


def test_dataset_of_the_schema_and_workers(tiny, scenes, tmp_path):
    """A `datasets.Dataset`, read in two workers, trains as the list of its records."""
    model, _ = tiny
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = steps_of(train(tiny, scenes, tmp_path, max_steps=4))
    model.load_state_dict(state)
    records = scenes_dataset(len(scenes), size=32)
    found = train(tiny, records, tmp_path, max_steps=4, dataloader_num_workers=2)
    assert [log["loss"] for log in steps_of(found)] == [log["loss"] for log in expected]


def test_several_gpus_in_one_process_are_refused(tiny_cloc, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process drives 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        RegionTrainer(tiny_cloc[0], TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_batches_of_any_stream_have_keys(tiny_cloc):
    """Also records that no wrapper of this package has given one."""
    batch = KeyedCollator(RegionCollator(tiny_cloc[1]))(
        [make_scene(0, size=32), {**make_scene(1, size=32), "sample_key": (0, 7)}]
    )
    assert batch["sample_keys"] == [content_key(make_scene(0, size=32)), (0, 7)]
