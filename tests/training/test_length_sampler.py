"""Batches of one length: less padding, every record once, an order that follows from seed and epoch."""

import pytest
import torch
from transformers import TrainingArguments

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer
from pixclip_hf.training.length_sampler import EpochLengthSampler


def spread(order, lengths, size):
    """Share of padding, if each slice of `size` is padded to its longest."""
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    room = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / room


def test_groups_by_length():
    lengths = torch.randint(10, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = EpochLengthSampler(8, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(400)) and len(sampler) == 400
    assert spread(first, lengths, 8) < 0.1 < 0.3 < spread(range(400), lengths, 8)
    # Lengths do not decide the order of the batches, but for the longest, which comes first.
    assert lengths[first[0]] == max(lengths)


def test_order_follows_from_seed_and_epoch():
    lengths = list(range(100))

    def order(seed, epoch):
        sampler = EpochLengthSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global random state does not matter
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.fixture(scope="module")
def scenes():
    """160 records with one region each; texts of 2 to 41 words."""
    drawn = [make_scene(index, size=32) for index in range(8)]
    records = []
    for index in range(160):
        scene = drawn[index % 8]
        region = {**scene["regions"][0], "long_caption": "red " * (2 + 23 * index % 40)}
        records.append({**scene, "regions": [region]})
    return records


def build(tiny, scenes, folder, strategy="group_by_length", steps=6, **changes):
    model, processor = tiny
    processor.tokenizer.model_max_length = 512
    model.config.text_config.max_position_embeddings = 512
    settings = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, max_steps=steps, logging_steps=1, train_sampling_strategy=strategy, **changes,
    )  # fmt: skip
    collator = RegionCollator(processor, region_text="long_caption", image_captions=False)
    return RegionTrainer(model, settings, data_collator=collator, train_dataset=scenes, eval_dataset=scenes)


def padding(loader):
    masks = [batch["region_text_attention_mask"] for batch in loader]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_the_trainers_batches_hold_little_padding(tiny_cloc, scenes, tmp_path):
    shares = {}
    for strategy in ("random", "group_by_length"):
        trainer = build(tiny_cloc, scenes, tmp_path, strategy)
        shares[strategy] = padding(trainer.get_train_dataloader()), padding(trainer.get_eval_dataloader())
    assert max(shares["group_by_length"]) < 0.15 < 0.25 < min(shares["random"])
    loader = build(tiny_cloc, scenes, tmp_path).get_train_dataloader()
    assert sum(len(batch["pixel_values"]) for batch in loader) == len(scenes)


def test_resumes_inside_an_epoch(tiny_cloc, tmp_path):
    """Weights after an interruption equal those of a whole run, in the second epoch too."""
    scenes = [make_scene(index, size=32) for index in range(16)]
    model, processor = tiny_cloc
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run(folder, resume=None):
        model.load_state_dict(start)
        settings = TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4,
            max_steps=7, save_steps=6, train_sampling_strategy="group_by_length", learning_rate=1e-3,
        )  # fmt: skip
        trainer = RegionTrainer(
            model, settings, data_collator=RegionCollator(processor, image_captions=False), train_dataset=scenes
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert not torch.equal(whole["vision_model.embeddings.patch_embedding.weight"],
                           start["vision_model.embeddings.patch_embedding.weight"])  # fmt: skip
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
