"""The penalty on forgetting: value and gradients against loops, over ranks and chunks, and what it keeps."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer
from pixclip_hf.training import RegionTrainer, add_lora
from pixclip_hf.training.command import main
from pixclip_hf.training.distillation import distillation_loss, frozen_copy

FAMILIES, IMAGES = ("cloc", "pixclip"), 5


def pair(family):
    """A model, a teacher with other weights, and a batch in which one image has no caption."""
    torch.manual_seed(0)
    model, processor = small_model(family, scenes_tokenizer(), 32)
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    scenes = [make_scene(i, size=32) for i in range(IMAGES)]
    scenes[2] = {**scenes[2], "captions": []}
    collator = RegionCollator(processor, image_captions=True, crops=family == "pixclip", regions_per_image=2)
    return model, teacher, collator, scenes


def embedded(model, batch):
    return model(**{**batch, "return_loss": False})


def by_loops(model, teacher, batch):
    """Image by image, caption by caption."""
    masks = batch["attention_mask"].bool()
    total = 0.0
    for features in ("image", "text"):
        distances = []
        for i in range(IMAGES):
            if features == "text" and not masks[i].any():
                continue
            pixels, tokens = batch["pixel_values"][i : i + 1], batch["input_ids"][i : i + 1][:, masks[i]]
            one, other = (
                (
                    each.get_image_features(pixels) if features == "image" else each.get_text_features(tokens)
                ).pooler_output[0]
                for each in (model, teacher)
            )
            distances.append(1 - torch.dot(one, other.detach()) / (one.norm() * other.detach().norm()))
        assert len(distances) == IMAGES - (features == "text")
        total = total + sum(distances) / len(distances)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients(family):
    model, teacher, collator, scenes = pair(family)
    batch = collator(scenes)
    output = embedded(model, batch)
    loss = distillation_loss(teacher, output, batch)
    expected = by_loops(model, teacher, batch)
    torch.testing.assert_close(loss, expected)
    assert loss > 0.01 and not any(parameter.grad is not None for parameter in teacher.parameters())
    parameters = [parameter for name, parameter in model.named_parameters() if "model." in name]
    found, wanted = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    assert sum(gradient is not None for gradient in found) > 20
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("captioned", (1, 3, IMAGES))
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_average_to_the_whole(family, captioned):
    """Two ranks with unequal numbers of images and captions: their mean is the mean over all rows."""
    model, teacher, collator, scenes = pair(family)
    scenes[captioned:] = [{**scene, "captions": []} for scene in scenes[captioned:]]
    batch = collator(scenes)
    whole = distillation_loss(teacher, embedded(model, batch), batch)
    shares = [
        {name: value[rows] for name, value in batch.items() if name != "return_loss"}
        for rows in (slice(0, 1), slice(1, None))
    ]
    outputs = [embedded(model, share) for share in shares]
    real = {
        "image": torch.ones(IMAGES, dtype=torch.bool),
        "text": torch.cat([output.text_ids != 0 for output in outputs]),
    }
    means = []
    for share, output in zip(shares, outputs, strict=True):
        asked = iter(real.values())
        means.append(distillation_loss(teacher, output, share, lambda rows, asked=asked: (next(asked), 0), 2))
    torch.testing.assert_close(sum(means) / 2, whole)


@pytest.mark.parametrize("chunks", (1, 3))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_adds_it(family, chunks, tmp_path):
    """Its weight times what the loops give joins the other parts, in the gradients too, and no evaluation has it."""
    model, teacher, collator, scenes = pair(family)
    batch = collator(scenes)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    options = {"data_collator": collator, "train_dataset": scenes, "gradient_cache_chunks": chunks}
    trainer = RegionTrainer(model, arguments, distillation_weight=3.0, **options)
    trainer._teacher = teacher
    reference = copy.deepcopy(model)
    (reference(**{**batch, "return_loss": True}).loss + 3 * by_loops(reference, teacher, batch)).backward()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    trainer.training_step(model, dict(batch))
    assert any(parameter.grad is not None for parameter in model.parameters())
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            found, expected, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert "eval_loss_distillation" not in trainer.evaluate(scenes)


def test_the_copy_shares_what_does_not_train():
    model = small_model("pixclip", scenes_tokenizer(), 32)[0]
    adapted = add_lora(model, r=2)
    copied = frozen_copy(adapted)
    assert not copied.training and not any(parameter.requires_grad for parameter in copied.parameters())
    shared = 0
    for (name, own), other in zip(adapted.named_parameters(), copied.named_parameters(), strict=True):
        assert torch.equal(own, other[1]) and other[0] == name
        assert (own is other[1]) == (not own.requires_grad), name
        shared += own is other[1]
    assert 0 < shared < len(list(copied.parameters()))


def test_a_training_stays_near_its_start(tmp_path):
    """Embeddings of whole images move less, the start is that of a resumed run too, and the part is in the log."""
    model, processor = small_model("pixclip", scenes_tokenizer(), 32)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    options = ["--model_name_or_path", str(tmp_path / "start"), "--scenes_train_images", "24", "--max_steps", "6"]
    options += ["--per_device_train_batch_size", "6", "--image_captions", "True", "--learning_rate", "1e-3"]
    options += ["--report_to", "none", "--disable_tqdm", "True", "--use_cpu"]
    options += ["--logging_steps", "1", "--save_steps", "3"]
    pixels = processor.image_processor([make_scene(i, size=32)["image"] for i in range(4)], return_tensors="pt")
    moved = {}
    for weight in ("0", "10"):
        trainer = main([*options, "--distillation_weight", weight, "--output_dir", str(tmp_path / weight)])
        embeds = [
            torch.nn.functional.normalize(each.eval().get_image_features(pixels["pixel_values"]).pooler_output, dim=-1)
            for each in (model, trainer.model)
        ]
        moved[weight] = (1 - (embeds[0] * embeds[1]).sum(-1)).mean()
        logged = [log for log in trainer.state.log_history if "loss" in log]
        assert all(("loss_distillation" in log) == (weight != "0") for log in logged)
    assert moved["10"] < 0.5 * moved["0"]
    assert logged[0]["loss_distillation"] == pytest.approx(0, abs=1e-5) and logged[-1]["loss_distillation"] > 1e-4
    (tmp_path / "10" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    for name in ("trained_files.json", "model.safetensors"):
        (tmp_path / "10" / name).unlink()
    again = main([*options, "--distillation_weight", "10", "--output_dir", str(tmp_path / "10")])
    assert again.resumed_step == 3
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("weight", (-1.0, float("nan")))
def test_weights_that_reward_forgetting(weight, tmp_path):
    model, processor = small_model("cloc", scenes_tokenizer(), 32)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`distillation_weight` must not be negative, got"):
        RegionTrainer(model, arguments, data_collator=RegionCollator(processor), distillation_weight=weight)


def test_random_weights_have_nothing_to_keep(tmp_path):
    with pytest.raises(ValueError, match="`--distillation_weight` needs trained weights to stay near, got 2.0"):
        main(["--distillation_weight", "2", "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"])
