"""Muon: its step against loops of plain arithmetic, what takes it, and that it goes on where a run stopped."""

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import pixclip_hf
from pixclip_hf.training import OptimizerArguments, RegionTrainer, add_lora, optimizer_for, parameter_groups
from pixclip_hf.training.command import main
from pixclip_hf.training.muon import MuonAdamW, orthogonalized

RATE, DECAY = 1e-3, 0.1
PARTS = ["vision", "text", "prompter"]
SHAPES = ((5, 5), (3, 8), (8, 3), (5, 5))


def build(family, vision="clip", text="clip"):
    """A tiny model of random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    towers = {
        "vision_config": {"model_type": f"{vision}_vision_model", "image_size": 32, "patch_size": 8, **sizes},
        "text_config": {"model_type": {"clip": "clip_text_model"}.get(text, text), "vocab_size": 64, **sizes},
    }
    config, model = (getattr(pixclip_hf, family + part) for part in ("Config", "Model"))
    return model(config(**towers, projection_dim=16))


def reference_step(matrix, gradients, rate, decay, momentum=0.95):
    """The weights after a step per gradient, one matrix at a time, in NumPy and float64."""
    matrix, velocity = matrix.astype(np.float64), np.zeros(matrix.shape)
    for gradient in gradients:
        velocity = momentum * velocity + (1 - momentum) * gradient
        direction = momentum * velocity + (1 - momentum) * gradient
        u, s, vt = np.linalg.svd(direction, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        matrix = matrix * (1 - rate * decay) - rate * 0.2 * np.sqrt(max(matrix.shape)) * (u @ np.diag(s) @ vt)
    return matrix


def test_steps_equal_the_reference():
    """The polynomial of a matrix is that of its singular values."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(3)]
    expected = [
        reference_step(matrix.detach().numpy(), [step[i].numpy() for step in gradients], 0.1, 0.3)
        for i, matrix in enumerate(matrices)
    ]
    optimizer = MuonAdamW([{"params": matrices, "lr": 0.1, "weight_decay": 0.3, "muon": True}])
    for step in gradients:
        for matrix, gradient in zip(matrices, step, strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
    for matrix, wanted in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(matrix.detach().numpy(), wanted, rtol=1e-10)


def test_directions_have_one_strength():
    """Whatever the gradient's own singular values, those of the step lie near 1, in its own directions."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(2, 24, 24)).Q for _ in range(2))
    given = u @ torch.diag(torch.logspace(0, -2, 24)) @ v.mT
    for matrices in (given, given[:, :9], given[:, :, :9]):
        strengths = torch.linalg.svdvals(orthogonalized(matrices))
        assert strengths.min() > 0.6 and strengths.max() < 1.3
    torch.testing.assert_close(orthogonalized(given.mT), orthogonalized(given).mT)
    along = u.mT @ orthogonalized(given) @ v
    torch.testing.assert_close(along, torch.diag_embed(along.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert not orthogonalized(torch.zeros(1, 4, 4)).any()


def test_it_is_the_muon_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(0)
    own = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (16, 48))]
    others = copy.deepcopy(own)
    optimizers = (
        MuonAdamW([{"params": own, "lr": 0.01, "weight_decay": 0.1, "muon": True}]),
        torch.optim.Muon(others, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    start = copy.deepcopy(own)
    for _ in range(4):
        for one, other in zip(own, others, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, begun in zip(own, others, start, strict=True):
        # Theirs computes in bfloat16.
        assert (one - other).norm() < 0.02 * (one - begun).norm()


def test_everything_else_steps_as_with_adamw():
    torch.manual_seed(0)
    models = [build("CLOC")]
    models.append(copy.deepcopy(models[0]))
    groups = [
        parameter_groups(model, RATE, DECAY, muon=parts) for model, parts in zip(models, ((), PARTS), strict=True)
    ]
    matrices = {id(p) for group in groups[1] if group.get("muon") for p in group["params"]}
    assert matrices
    optimizers = (torch.optim.AdamW(groups[0]), MuonAdamW(groups[1]))
    for _ in range(2):
        for plain, own in zip(*(model.parameters() for model in models), strict=True):
            plain.grad = torch.randn_like(plain)
            own.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, plain), own in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain, own) != (id(own) in matrices), name


@pytest.mark.parametrize("family", ("CLOC", "PixCLIP"))
def test_what_takes_it(family):
    model = build(family, "siglip", "llama")
    parts = PARTS if family == "CLOC" else PARTS[:2]
    names = {id(p): name for name, p in model.named_parameters()}
    for muon in (parts, parts[:1], parts[1:]):
        groups = parameter_groups(model, RATE, DECAY, vision_lr_scale=0.1, muon=muon)
        assert {names[id(p)] for group in groups for p in group["params"]} == set(names.values())
        marked = {names[id(p)]: group for group in groups if group.get("muon") for p in group["params"]}
        expected = {
            f"{prefix}.weight"
            for prefix, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and ((".layers." in prefix and prefix.split("_")[0] in muon) or prefix.split(".")[0] in muon)
        }
        assert marked.keys() == expected
        for name, group in marked.items():
            assert group["lr"] == pytest.approx(RATE * (0.1 if name.startswith("vision") else 1))
            assert group["weight_decay"] == DECAY


def test_a_part_without_matrices_to_train():
    with pytest.raises(ValueError, match=r"`muon` must name parts with matrices that train, got \['prompter'\]"):
        parameter_groups(build("PixCLIP"), RATE, muon=["vision", "prompter"])
    model = build("CLOC")
    model.text_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got \['text'\] among \['text', 'vision'\]"):
        parameter_groups(model, RATE, muon=["text", "vision"])


def test_adapters_do_not_take_it():
    model = add_lora(build("CLOC", "clip", "llama"), r=2)
    groups = parameter_groups(model, RATE, DECAY, muon=["vision", "prompter"])
    adapters = {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    assert adapters and not adapters & {id(p) for group in groups if group.get("muon") for p in group["params"]}
    with pytest.raises(ValueError, match=r"got \['text'\] among"):
        parameter_groups(model, RATE, muon=["text"])


def test_it_takes_adamw_beside_it(tmp_path):
    training = TrainingArguments(str(tmp_path), use_cpu=True, optim="adafactor")
    with pytest.raises(ValueError, match="`muon` takes AdamW beside it .*got 'adafactor'"):
        optimizer_for(build("CLOC"), training, OptimizerArguments(muon=["vision"]))
    training = TrainingArguments(str(tmp_path), use_cpu=True)
    assert optimizer_for(build("CLOC"), training, OptimizerArguments(muon=["vision"]))[0] is MuonAdamW


@pytest.mark.parametrize("sharding", ("is_fsdp_enabled", "is_deepspeed_enabled"))
def test_shards_of_matrices_are_refused(tmp_path, monkeypatch, sharding):
    create = Trainer.create_accelerator_and_postprocess

    def create_sharding(self):
        create(self)
        setattr(self, sharding, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_sharding)
    model, training = build("CLOC"), TrainingArguments(str(tmp_path), use_cpu=True)
    optimizer = optimizer_for(model, training, OptimizerArguments(muon=["vision"]))
    with pytest.raises(ValueError, match="`muon` must be empty with FSDP or DeepSpeed"):
        RegionTrainer(model, training, optimizer_cls_and_kwargs=optimizer)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """Momentum, counts and groups come back from a checkpoint: both runs end at the same weights."""
    options = ["--model_type", "cloc", "--muon", "vision", "prompter", "--scenes_train_images", "24"]
    options += ["--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "True"]
    options += ["--save_steps", "2", "--lr_scheduler_type", "constant", "--use_cpu"]
    whole = main([*options, "--output_dir", str(tmp_path / "whole"), "--max_steps", "4"])
    main([*options, "--output_dir", str(tmp_path / "parts"), "--max_steps", "2"])
    parts = main([*options, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4"])
    assert parts.resumed_step == 2
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other), name
