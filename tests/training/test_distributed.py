"""Two processes that hold uneven parts of a batch: together they compute the loss of the whole batch.

Everything runs in one pair of processes, over gloo on the loopback interface.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import AutoModel, AutoProcessor, TrainingArguments
from transformers.utils import logging

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import add_lora
from pixclip_hf.training.gradient_cache import cached_backward
from pixclip_hf.training.sharding import scalars_to_vectors
from pixclip_hf.training.trainer import RegionTrainer, gather_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FAMILIES = ("cloc", "pixclip")
CAPTIONS = (True, False)
RANKS = 2
# What a run over two ranks may add; one process without caching and checkpointing is what it must equal.
VARIANTS = {
    "lora": {"lora": True},
    "checkpointing": {"gradient_checkpointing": True},
    "cached": {"gradient_cache_chunks": 2},
    "all": {"lora": True, "gradient_checkpointing": True, "gradient_cache_chunks": 2},
}
IMAGES = ((0, 1, 2), (3,))  # of the batch, on each rank


def region_key(batch):
    return "region_boxes" if "region_boxes" in batch else "region_masks"


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, batch, gather=None, ranks=1):
    """The weighted parts, through `compute_loss`; with gradients in the model."""
    model.zero_grad()
    output = model(**batch, return_loss=False)
    parts = model.compute_loss(output, batch[region_key(batch)], batch["region_attention_mask"], gather, ranks)
    loss = sum(model.loss_weights()[name] * part for name, part in parts.items())
    loss.backward()
    return loss.detach(), {name: part.detach() for name, part in parts.items()}


def mean_over_ranks(value):
    total = value.clone()
    dist.all_reduce(total)
    return total / RANKS


def load(folder, lora=False):
    model = AutoModel.from_pretrained(folder)
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, r=4)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.02)
    return model


def without(scene, captions=True, texts=True):
    """A scene that lacks captions, or the texts of its regions, or both."""
    regions = scene["regions"] if texts else [{**region, "caption": None} for region in scene["regions"]]
    return {**scene, "captions": scene["captions"] if captions else [], "regions": regions}


def build_trainer(
    folder, processor, captions, world_size, lora=False, lacking=False, gradient_cache_chunks=1, **changes
):
    """For four steps over eight scenes, two epochs, four images per step; with four more scenes to evaluate on."""
    scenes = [make_scene(index, size=32) for index in range(12)]
    if lacking:
        # Half of them have nothing at all: some ranks have nothing in some steps.
        for index in (0, 2, 3, 5, 8):
            scenes[index] = without(scenes[index], captions=False, texts=False)
        for index in (1, 9):
            scenes[index] = without(scenes[index], captions=False)
        for index in (4, 10):
            scenes[index] = without(scenes[index], texts=False)
    settings = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "ddp_backend": "gloo" if world_size > 1 else None,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4 // world_size,
        "per_device_eval_batch_size": 4 // world_size,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
    }
    crops = processor.has_crops
    return RegionTrainer(
        load(folder, lora),
        TrainingArguments(**settings | changes),
        data_collator=RegionCollator(processor, regions_per_image=4, crops=crops, image_captions=captions),
        train_dataset=scenes[:8],
        eval_dataset=scenes[8:],
        gradient_cache_chunks=gradient_cache_chunks,
    )


def train(*args, resume=None, **options):
    trainer = build_trainer(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # Five scenes, which two ranks cannot share evenly.
    odd = trainer.evaluate([*trainer.eval_dataset, make_scene(12, size=32)], metric_key_prefix="odd")
    metrics |= {name: value for name, value in odd.items() if "recall" in name}
    keep = [name for name in metrics if "loss" in name or "recall" in name]
    weights = {name: value for name, value in trainer.model.state_dict().items() if "original_module" not in name}
    return {"weights": weights, "logs": logs, "metrics": {name: metrics[name] for name in keep}}


def sharded(rank, folder, processor, batch):
    """Loss and gradients of models that FSDP shards, through the trainer: plain, and in two cached chunks."""
    found = {}
    for name in ("fsdp", "fsdp_cached"):
        trainer = build_trainer(folder, processor, True, RANKS)
        scalars_to_vectors(trainer.model)
        # accelerate has no FSDP on CPUs in its `Accelerator`; what it does to a model it does here too.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu")
        )
        model = fsdp2_prepare_model(accelerator, trainer.model.train())
        if name == "fsdp":
            part = {key: value[list(IMAGES[rank])] for key, value in batch.items()}
            loss = trainer.compute_loss(model, part)
            loss.backward()
        else:
            # Every forward pass gathers parameters: ranks must have as many chunks.
            part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
            loss, _ = cached_backward(model, model, part, 2, trainer._set_loss, torch.Tensor.backward, nullcontext)
        found[name] = {
            "loss": mean_over_ranks(loss.detach()),
            "gradients": {key: value.full_tensor() for key, value in gradients(model).items()},
            "shards": sum(value.to_local().numel() for value in model.parameters()),
        }
    return found


def gathers(rank):
    """What `gather_rows` gives for three rows here and one there, forwards and backwards."""
    count = (3, 1)[rank]
    rows = (torch.arange(count * 2.0).reshape(count, 2) + 10 * rank).requires_grad_()
    gathered, offset = gather_rows(rows)
    weights = torch.arange(8.0).reshape(4, 2)
    ((rank + 1) * gathered * weights).sum().backward()
    flags = gather_rows(torch.tensor([True, False, True])[:count])[0]
    numbers = gather_rows(torch.full((count,), 2**40 + rank))[0]
    empty = gather_rows(torch.ones(rank, 2))
    return {
        "rows": gathered.detach(), "offset": offset, "grad": rows.grad, "flags": flags, "numbers": numbers,
        "empty": empty,
    }  # fmt: skip


def work(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "GLOO_SOCKET_IFNAME": "lo",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found = {"gathers": gathers(rank)}
    for family in FAMILIES:
        model, processor = AutoModel.from_pretrained(folder / family), AutoProcessor.from_pretrained(folder / family)
        batch = torch.load(folder / f"{family}.pt")
        part = {name: value[list(IMAGES[rank])] for name, value in batch.items()}
        loss, parts = loss_of(model, part, gather_rows, RANKS)
        found[family] = {
            "loss": mean_over_ranks(loss),
            "parts": {name: mean_over_ranks(value) for name, value in parts.items()},
            "gradients": {name: mean_over_ranks(value) for name, value in gradients(model).items()},
        }
        found[family] |= sharded(rank, folder / family, processor, batch)
        for captions in CAPTIONS:
            found[family, captions] = train(folder / family, processor, captions, RANKS)
        # Half of the vision tower's head has no gradient without captions.
        found[family, "no captions"] = train(folder / family, processor, False, RANKS, gradient_checkpointing=True)
        for name, options in VARIANTS.items():
            found[family, name] = train(folder / family, processor, True, RANKS, **options)
        for chunks in (1, 2):
            options = {"lacking": True, "gradient_cache_chunks": chunks}
            found[family, "lacking", chunks] = train(folder / family, processor, True, RANKS, **options)
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(folder / "saved")}
    train(folder / "cloc", AutoProcessor.from_pretrained(folder / "cloc"), True, RANKS, **saving)
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, batches, and what both ranks found."""
    from conftest import build_tiny

    import pixclip_hf

    folder = tmp_path_factory.mktemp("distributed")
    for family, prefix in zip(FAMILIES, ("CLOC", "PixCLIP"), strict=True):
        classes = (getattr(pixclip_hf, prefix + name) for name in ("Config", "Model", "Processor"))
        model, processor = build_tiny(*classes)
        model.save_pretrained(folder / family)
        processor.save_pretrained(folder / family)
        scenes = [make_scene(index, size=32) for index in range(3)]
        # The first scene twice: its texts are on both ranks, and no negatives of each other.
        scenes.append(scenes[0])
        scenes[1] = {**scenes[1], "regions": scenes[1]["regions"][:1]}
        batch = RegionCollator(processor, regions_per_image=4, crops=family == "pixclip")(scenes)
        del batch["return_loss"]
        torch.save(batch, folder / f"{family}.pt")
    mp.spawn(work, args=(folder,), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_gather_rows(found):
    rows = torch.tensor([[0.0, 1], [2, 3], [4, 5], [10, 11]])
    weights = torch.arange(8.0).reshape(4, 2)
    for rank, start, end in ((0, 0, 3), (1, 3, 4)):
        gathered = found[rank]["gathers"]
        assert torch.equal(gathered["rows"], rows) and gathered["offset"] == start
        # Both ranks' losses, the second twice as heavy, reach the rank that the row came from.
        assert torch.equal(gathered["grad"], 3 * weights[start:end])
        assert gathered["flags"].tolist() == [True, False, True, True] and gathered["flags"].dtype == torch.bool
        assert gathered["numbers"].tolist() == [2**40] * 3 + [2**40 + 1]
        assert gathered["empty"][0].tolist() == [[1, 1]] and gathered["empty"][1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_whole_batch(family, folder, found):
    model = AutoModel.from_pretrained(folder / family)
    batch = torch.load(folder / f"{family}.pt")
    assert batch["region_attention_mask"].sum(-1).tolist()[1] == 1  # ragged
    loss, parts = loss_of(model, batch)
    assert torch.allclose(loss, model(**batch).loss, atol=1e-6)
    expected = gradients(model)
    assert any(value.abs().max() > 1e-2 for value in expected.values())
    for rank in range(RANKS):
        result = found[rank][family]
        torch.testing.assert_close(result["loss"], loss, atol=1e-5, rtol=1e-5)
        assert result["parts"].keys() == parts.keys()
        for name, part in parts.items():
            torch.testing.assert_close(result["parts"][name], part, atol=1e-5, rtol=1e-5)
        assert result["gradients"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result["gradients"][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_parameters(family, name, folder, found):
    """FSDP2 over two ranks: loss and gradients of the whole batch, with and without caching."""
    model = AutoModel.from_pretrained(folder / family)
    loss, _ = loss_of(model, torch.load(folder / f"{family}.pt"))
    expected = gradients(model)
    for rank in range(RANKS):
        result = found[rank][family][name]
        torch.testing.assert_close(result["loss"], loss, atol=1e-5, rtol=1e-5)
        assert result["gradients"].keys() == expected.keys()
        for parameter, value in expected.items():
            gradient = result["gradients"][parameter].reshape(value.shape)
            torch.testing.assert_close(gradient, value, atol=1e-5, rtol=1e-4, msg=parameter)
        assert result["shards"] < 0.6 * model.num_parameters()


def assert_same_training(result, expected):
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(
            result["weights"][name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for log, same in zip(expected["logs"], result["logs"], strict=True):
        for name in (name for name in log if name.startswith("loss")):
            assert same[name] == pytest.approx(log[name], abs=2e-4), name
    assert result["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_one_process(family, captions, folder, found):
    """`RegionTrainer` under DistributedDataParallel: same weights, logs and metrics as one process with the whole
    batch, over two epochs of other draws."""
    expected = train(folder / family, AutoProcessor.from_pretrained(folder / family), captions, 1)
    for rank in range(RANKS):
        assert_same_training(found[rank][family, captions], expected)
        if not captions:
            assert_same_training(found[rank][family, "no captions"], expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_variants_equal_one_process(family, lora, folder, found):
    """LoRA, checkpointing and caching over two ranks, alone and together: as one process without the latter two."""
    expected = train(folder / family, AutoProcessor.from_pretrained(folder / family), True, 1, lora=lora)
    for name, options in VARIANTS.items():
        if options.get("lora", False) == lora:
            for rank in range(RANKS):
                assert_same_training(found[rank][family, name], expected)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_records_that_lack_something_equal_one_process(family, chunks, folder, found):
    """Captions, texts of regions, or both are missing, on one rank or on all of them in a step."""
    processor = AutoProcessor.from_pretrained(folder / family)
    expected = train(folder / family, processor, True, 1, lacking=True)
    assert sum(log.get("images_without_text", 0) for log in expected["logs"]) == 8  # of four records, two epochs
    for rank in range(RANKS):
        assert_same_training(found[rank][family, "lacking", chunks], expected)


def test_resumes_over_another_number_of_processes(folder, found):
    """As many images per step: one process continues where two stopped. Another number: refused."""
    arguments = folder / "cloc", AutoProcessor.from_pretrained(folder / "cloc"), True
    checkpoint = str(folder / "saved" / "checkpoint-2")
    assert_same_training(train(*arguments, 1, resume=checkpoint), train(*arguments, 1))
    with pytest.raises(ValueError, match="The checkpoint's steps took 4 images, the steps of this run take 2 "):
        train(*arguments, 1, resume=checkpoint, per_device_train_batch_size=2)
