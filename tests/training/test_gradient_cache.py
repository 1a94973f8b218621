"""A batch passed in chunks: loss and gradients of the whole batch, dropout on."""

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG
from transformers import TrainingArguments

import pixclip_hf
from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.modeling.modeling_outputs import set_losses
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer, add_lora
from pixclip_hf.training.gradient_cache import cached_backward, split_batch

FAMILIES = ("cloc", "pixclip")
IMAGES = 5
PREFIXES = {"cloc": "CLOC", "pixclip": "PixCLIP"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def processor(family, request):
    return request.getfixturevalue(f"tiny_{family}")[1]


def build(family, dropout=0.0, **changes):
    config = getattr(pixclip_hf, f"{PREFIXES[family]}Config")(
        vision_config={**VISION_CONFIG, "attention_dropout": dropout},
        text_config={**TEXT_CONFIG, "attention_dropout": dropout},
        projection_dim=16,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(pixclip_hf, f"{PREFIXES[family]}Model")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def build_batch(processor, images=IMAGES, captions=True):
    """Ragged: one image has one region; the first scene twice, so that texts repeat between chunks."""
    scenes = [make_scene(index, size=32) for index in range(images)]
    scenes[1] = {**scenes[1], "regions": scenes[1]["regions"][:1]}
    if images > 4:
        scenes[4] = scenes[0]
    crops = processor.has_crops
    collate = RegionCollator(processor, regions_per_image=3, crops=crops, image_captions=captions)
    return collate(scenes)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(module, output, batch):
    regions = batch.get("region_boxes", batch.get("region_masks"))
    set_losses(output, module.compute_loss(output, regions, batch["region_attention_mask"]), module.loss_weights())
    return output.loss


class Unreduced:
    """Counts the chunks that are not reduced over ranks."""

    def __init__(self):
        self.entered = 0

    def __call__(self):
        return self

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *args):
        pass


def cached(model, batch, chunks, no_sync=None):
    no_sync = no_sync or Unreduced()
    loss, output = cached_backward(model, model, batch, chunks, loss_of, torch.Tensor.backward, no_sync)
    return loss, output, gradients(model)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
@pytest.mark.parametrize("captions", [True, False])
def test_equals_one_pass(family, processor, captions, chunks):
    """Every part of the loss and every gradient, temperatures included."""
    model, batch = build(family), build_batch(processor, captions=captions)
    output = model(**batch)
    output.loss.backward()
    wanted = gradients(model)
    no_sync = Unreduced()
    loss, joined, found = cached(model, batch, chunks, no_sync)
    torch.testing.assert_close(loss, output.loss.detach())
    assert joined.loss_parts.keys() == output.loss_parts.keys() and len(output.loss_parts) >= 3
    for name, part in output.loss_parts.items():
        torch.testing.assert_close(joined.loss_parts[name], part)
    scales = [name for name in wanted if name.endswith("log_scale")]
    assert len(scales) == (1 if family == "pixclip" or not captions else 2) and all(wanted[name] for name in scales)
    assert_same(found, wanted)
    assert no_sync.entered == {1: 0, 2: 1, 3: 2, 9: IMAGES - 1}[chunks]


def test_random_numbers_are_replayed(family, processor):
    """With dropout, equal to one graph over all chunks that were passed with the same random numbers; and the
    generator ends up where one pass of the chunks leaves it."""
    model, batch = build(family, dropout=0.3), build_batch(processor)
    torch.manual_seed(5)
    outputs = [model(**{**part, "return_loss": False}) for part in split_batch(batch, 3)]
    after = torch.get_rng_state()
    names = [name for name in outputs[0].representations() if outputs[0].get(name) is not None]
    joined = type(outputs[0])(**{name: torch.cat([output[name] for output in outputs]) for name in names})
    loss_of(model, joined, batch).backward()
    wanted = gradients(model)

    torch.manual_seed(5)
    loss, _, found = cached(model, batch, 3)
    torch.testing.assert_close(loss, joined.loss.detach())
    assert_same(found, wanted)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(6)
    assert (cached(model, batch, 3)[0] - loss).abs() > 1e-4


def test_what_the_loss_reads_is_cached(family, processor):
    """An output that the loss reads and that is declared as derived would be taken for absent: compare with all
    fields."""
    model, batch = build(family), build_batch(processor)
    output = model(**{**batch, "return_loss": False})
    others = {name for name in output if name not in output.representations()}
    logits = {"logits_per_region", "logits_per_image", "logits_per_text"}
    assert others == logits | {"vision_model_output", "text_model_output"}


def test_activations_of_one_chunk(family, processor):
    """What one chunk keeps for its backward pass is gone before the next one comes."""
    model, batch = build(family), build_batch(processor)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor
            self.size = 0 if tensor.untyped_storage().data_ptr() in weights else tensor.numel()
            alive += self.size
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.size

    def peak(run):
        nonlocal alive, most
        alive = most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            run()
        return most

    whole, parts = peak(lambda: model(**batch).loss.backward()), peak(lambda: cached(model, batch, IMAGES))
    assert 0.1 * whole < parts < 0.4 * whole


def test_frozen_tower_and_lora(family, processor, tmp_path):
    model = build(family)
    model.vision_model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    model = add_lora(model, r=2).train()
    batch = build_batch(processor)
    model(**batch).loss.backward()
    wanted = gradients(model)
    assert any("lora_" in name for name in wanted) and not any("vision_model" in name for name in wanted)
    assert_same(cached(model, batch, 2)[2], wanted)


def train(family, processor, folder, chunks, dropout=0.0, images=4, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "per_device_train_batch_size": images, "learning_rate": 0.05, "optim": "sgd", "logging_steps": 1,
        "save_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0,
    }  # fmt: skip
    crops = processor.has_crops
    trainer = RegionTrainer(
        build(family, dropout),
        TrainingArguments(**settings | changes),
        data_collator=RegionCollator(processor, regions_per_image=2, crops=crops),
        train_dataset=[make_scene(index, size=32) for index in range(8)],
        gradient_cache_chunks=chunks,
    )
    trainer.train()
    return trainer


def test_trainer(family, processor, tmp_path):
    """Weights and logs of a run in chunks, with the gradients of two batches added up."""
    for changes in ({}, {"gradient_accumulation_steps": 2, "max_steps": 2}):
        runs = [train(family, processor, tmp_path, chunks, **changes) for chunks in (1, 2)]
        assert_same(*(dict(run.model.named_parameters()) for run in runs))
        logs = [[log for log in run.state.log_history if "loss" in log] for run in runs]
        assert len(logs[0]) == changes.get("max_steps", 3)
        for one, other in zip(*logs, strict=True):
            names = [name for name in one if name.startswith("loss")]
            assert len(names) == 5 and [one[n] for n in names] == pytest.approx([other[n] for n in names], abs=2e-4)
    with pytest.raises(ValueError, match="`gradient_cache_chunks` must be at least 1, got 0"):
        train(family, processor, tmp_path, 0)


def test_half_precision(family, processor, tmp_path):
    start = dict(build(family, 0.0).named_parameters())
    losses, changes = [], []
    for chunks in (1, 2):
        run = train(family, processor, tmp_path, chunks, bf16=True, max_steps=1)
        losses.append(run.state.log_history[0]["loss"])
        changes.append(torch.cat([(p - start[name]).flatten() for name, p in run.model.named_parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    # One step of plain descent: the change of the weights is the gradient.
    plain, cached = (change.detach() for change in changes)
    assert plain.norm() > 0 and torch.cosine_similarity(plain, cached, dim=0) > 0.999
    assert cached.norm() / plain.norm() == pytest.approx(1, abs=0.02)


def test_accumulation_warns(family, processor, tmp_path, caplog):
    train(family, processor, tmp_path, 2, max_steps=1)
    assert "negatives" not in caplog.text
    train(family, processor, tmp_path, 1, max_steps=1, gradient_accumulation_steps=2)
    assert "`gradient_accumulation_steps=2` changes the contrastive losses" in caplog.text
    assert "its batches of 4 images has only its own negatives" in caplog.text
    assert "`gradient_cache_chunks`" in caplog.text and "no negatives for its caption" not in caplog.text
    train(family, processor, tmp_path, 1, max_steps=1, images=1)
    assert "A batch of one image has no negatives for its caption" in caplog.text
