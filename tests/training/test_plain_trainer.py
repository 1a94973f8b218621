"""A plain `Trainer` over batches that a processor made: nothing of this package but the model and its processor."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, set_seed

from pixclip_hf.scenes.dataset import make_scene

FAMILIES = ("cloc", "pixclip")
RANKS = 2


class Collate:
    """What a user writes: images, boxes and texts of the records to the processor, ragged as they are."""

    def __init__(self, processor, captions=True):
        self.processor, self.captions = processor, captions

    def __call__(self, records):
        # One to three regions per image, so that batches differ in their slots.
        regions = [record["regions"][: 1 + len(record["captions"][0]) % 3] for record in records]
        return self.processor(
            images=[record["image"] for record in records],
            text=[record["captions"][0] for record in records] if self.captions else None,
            boxes=[[region["box"] for region in rows] for rows in regions],
            region_text=[[region["caption"] for region in rows] for rows in regions],
        )


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, size=32) for index in range(7)]


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def build_trainer(model, processor, scenes, folder, captions=True, compute_metrics=None, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    return Trainer(
        model,
        TrainingArguments(**settings | changes),
        data_collator=Collate(processor, captions),
        train_dataset=scenes,
        eval_dataset=scenes,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize("captions", [True, False])
def test_evaluation_and_the_best_model(captions, tiny, scenes, tmp_path):
    model, processor = tiny
    batches = [Collate(processor, captions)(scenes[start : start + 4]) for start in (0, 4)]
    assert len({batch["region_attention_mask"].shape for batch in batches}) > 1
    trainer = build_trainer(
        model, processor, scenes, tmp_path, captions, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(min(losses), abs=1e-5)
    with torch.no_grad():
        found = [model.eval()(**batch).loss.item() for batch in batches]
    # Trainer counts a batch as often as it has images.
    assert loss == pytest.approx((4 * found[0] + 3 * found[1]) / 7, abs=1e-4)


def test_predictions_of_a_smaller_last_batch_with_ragged_regions(tiny, scenes, tmp_path):
    model, processor = tiny
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"width": prediction.predictions[-1].shape[-1]}

    trainer = build_trainer(model, processor, scenes, tmp_path, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_width"} <= metrics.keys() and len(seen) == 1
    result = trainer.predict(scenes)
    assert "test_loss" in result.metrics
    with torch.no_grad():
        outputs = [model.eval()(**Collate(processor)(scenes[start : start + 4])) for start in (0, 4)]
    names = [name for name in outputs[0] if name not in ("loss", *model.config.keys_to_ignore_at_inference)]
    assert len(names) == len(result.predictions)
    assert {"region_embeds", "image_embeds", "text_embeds", "region_text_embeds", "logits_per_image"} <= set(names)
    for name, rows in zip(names, result.predictions, strict=True):
        start = 0
        for output in outputs:
            part = torch.from_numpy(rows[start : start + len(output[name])])
            start += len(output[name])
            if part.ndim > 1:
                # Behind a batch's own columns lies the padding of Trainer.
                assert (part[:, output[name].shape[1] :] == -100).all()
                part = part[:, : output[name].shape[1]]
            torch.testing.assert_close(part, output[name], atol=1e-5, rtol=1e-4)
        assert start == len(rows)


def test_batches_without_texts_are_predicted_where_they_ask_for_no_loss(tiny, scenes, tmp_path):
    model, processor = tiny

    def collate(records):
        return {**processor(images=[record["image"] for record in records]), "return_loss": False}

    trainer = build_trainer(model, processor, scenes, tmp_path)
    trainer.data_collator = collate
    assert trainer.predict(scenes).predictions.shape == (len(scenes), 16)


def build_bert_model(model, **changes):
    """The model with a BERT as text tower, whose pooler nothing uses."""
    text_config = {
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 259, "max_position_embeddings": 128, "pad_token_id": 0,
        "eos_token_id": 258, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = type(model.config)(
        vision_config=model.config.vision_config.to_dict(),
        text_config=text_config,
        text_pooling="mean",
        projection_dim=16,
    )
    set_seed(0)
    built = type(model)(config)
    assert built.text_model.pooler.dense.weight.requires_grad
    return built


def train(folder, scenes, captions, world_size, **changes):
    """Weights after two steps of four images each."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    trainer = build_trainer(
        model, processor, scenes, folder / "run", captions,
        per_device_train_batch_size=4 // world_size,
        ddp_backend="gloo" if world_size > 1 else None,
        gradient_checkpointing=world_size > 1,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0,
    )  # fmt: skip
    trainer.train()
    return {name: value.clone() for name, value in model.state_dict().items()}


def work(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "GLOO_SOCKET_IFNAME": "lo",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    scenes = [make_scene(index, size=32) for index in range(8)]
    found = {
        (family, captions): train(folder / family, scenes, captions, RANKS)
        for family in FAMILIES
        for captions in (True, False)
    }
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_data_parallelism_with_recomputed_activations(tmp_path, tiny_cloc, tiny_pixclip):
    """Two ranks train, with and without captions, towers whose pooler is never used, and agree on the weights."""
    for family, (model, processor) in zip(FAMILIES, (tiny_cloc, tiny_pixclip), strict=True):
        build_bert_model(model).save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)
    mp.spawn(work, args=(tmp_path,), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"found{rank}.pt") for rank in range(RANKS))
    for (family, captions), weights in first.items():
        start = AutoModel.from_pretrained(tmp_path / family).state_dict()
        moved = {name for name, value in weights.items() if not torch.equal(value, start[name])}
        assert len(moved) > 50
        assert not any(name.startswith("text_model.pooler") for name in moved)
        # Only CLOC has a head for whole images alone.
        assert ("visual_projection.weight" in moved) == (captions or family == "pixclip")
        for name, value in weights.items():
            assert torch.equal(second[family, captions][name], value), name
