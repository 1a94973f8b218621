"""CLOC inside multimodal language models: the two examples, and what they hand over."""

import llava_vision_tower
import pytest
import region_tokens_llm
import torch
from transformers import AutoModel, AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration

import pixclip_hf
from pixclip_hf.scenes.dataset import make_scene


@pytest.fixture(scope="module")
def examples():
    return llava_vision_tower, region_tokens_llm


@pytest.fixture
def saved_cloc(tiny_cloc, tmp_path):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "cloc")
    return tmp_path / "cloc"


@torch.no_grad()
def test_llava(examples, capsys):
    llava, inputs, output = examples[0].main([])
    image_tokens = inputs["input_ids"] == llava.config.image_token_id
    assert image_tokens.sum() == 64 == len(output.image_hidden_states)
    assert "64 image tokens" in capsys.readouterr().out
    # What the language model sees is CLOC's tower: its last but one layer, patches only, through the projector.
    states = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(output.image_hidden_states, llava.model.multi_modal_projector(states)[0])
    other = llava(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)})
    assert (other.logits[:, -1] - output.logits[:, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_llava_from_a_saved_cloc(examples, saved_cloc, tiny_cloc, tmp_path):
    llava, inputs, output = examples[0].main(["--cloc", str(saved_cloc), "--output_dir", str(tmp_path / "llava")])
    tower = tiny_cloc[0].get_vision_tower()
    assert type(llava.model.vision_tower) is type(tower)
    for name, value in tower.state_dict().items():
        assert torch.equal(llava.model.vision_tower.state_dict()[name], value)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    assert torch.equal(again(**inputs).logits, output.logits)
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    image = make_scene(0, split="test")["image"]
    found = processor(images=image, text="<image> What is in the picture?", return_tensors="pt")
    for name, value in inputs.items():
        assert torch.equal(found[name], value)


@torch.no_grad()
def test_llm_of_a_folder(examples, saved_cloc, tmp_path):
    llm, tokenizer = examples[0].load_llm(None, [], torch.float32)
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    arguments = ["--cloc", str(saved_cloc), "--llm", str(tmp_path / "llm")]
    llava, inputs, output = examples[0].main(arguments)
    assert isinstance(llm, LlamaForCausalLM)
    old = llm.get_input_embeddings().weight
    assert torch.equal(llava.get_input_embeddings().weight[: len(old)], old)
    assert torch.equal(llava.lm_head.weight[: len(old)], llm.lm_head.weight)
    model, inputs, tokens = examples[1].main(arguments)
    assert torch.equal(model.llm.get_input_embeddings().weight[: len(old)], old)


@pytest.mark.parametrize("kind", ("clip", "siglip"))
@torch.no_grad()
def test_llava_takes_either_tower(kind, examples):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": f"{kind}_vision_model", "image_size": 32, "patch_size": 8, **sizes}
    cloc = pixclip_hf.CLOCModel(
        pixclip_hf.CLOCConfig(vision_config=vision, text_config={"model_type": "clip_text_model", **sizes})
    )
    llm, tokenizer = examples[0].load_llm(None, ["<image>"], torch.float32)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    llava = examples[0].build_llava(cloc.eval(), llm, image_token)
    ids = torch.tensor([[1, *[image_token] * 16, 5, 6]])
    output = llava(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    assert output.image_hidden_states.shape == (16, 64) and output.logits.isfinite().all()
    # Shared, not copied.
    assert llava.model.vision_tower is cloc.get_vision_tower()


def test_vision_tower_is_plain_transformers(tiny_cloc, tmp_path):
    tower = tiny_cloc[0].get_vision_tower()
    assert type(tower).__module__ == "transformers.models.clip.modeling_clip"
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_cloc[0].vision_model(pixels).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state, expected)


def test_region_tokens(examples, capsys):
    model, inputs, tokens = examples[1].main([])
    assert "2 regions in" in capsys.readouterr().out and tokens.shape[1] <= 8
    region = inputs["input_ids"] == model.region_token_id
    assert region.sum() == 2 and (inputs["input_ids"] == model.image_token_id).sum() == 64
    assert not torch.equal(*inputs["region_boxes"][0])
    # The two places hold the projected Prompter tokens, the text around them is the LLM's own.
    embeds = model.embed(inputs["input_ids"], inputs["pixel_values"], inputs["region_boxes"])
    found = model.cloc.get_region_tokens(inputs["pixel_values"], inputs["region_boxes"])
    assert found.pooler_output.shape == (1, 2, 128)
    torch.testing.assert_close(embeds[region], model.region_projector(found.pooler_output[0]))
    text = ~region & (inputs["input_ids"] != model.image_token_id)
    assert torch.equal(embeds[text], model.llm.get_input_embeddings()(inputs["input_ids"])[text])
    # The first patch token follows the class token.
    expected = model.image_projector(found.last_hidden_state[:, 1])
    torch.testing.assert_close(embeds[inputs["input_ids"] == model.image_token_id][:1], expected)
    # A region's box reaches the answer, and the loss the Prompter and both projectors.
    other = dict(inputs, region_boxes=inputs["region_boxes"] / 2)
    logits = model(**inputs).logits[:, -1]
    assert (model(**other).logits[:, -1] - logits).abs().max() > 1e-6
    layer = model.cloc.prompter.layer
    with torch.no_grad():
        for projection in layer.zeros:
            # What starts at zero lets no gradient through to what stands before it.
            projection.weight.normal_(std=0.02)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in (model.region_projector, model.image_projector, layer):
        for name, parameter in part.named_parameters():
            if parameter.ndim > 1 and not name.startswith("text_"):
                assert parameter.grad.abs().sum() > 0, name


def test_region_tokens_from_a_saved_cloc(examples, saved_cloc, tiny_cloc):
    model, inputs, _ = examples[1].main(["--cloc", str(saved_cloc)])
    with torch.no_grad():
        found = model.cloc.get_region_tokens(inputs["pixel_values"], inputs["region_boxes"]).pooler_output
        cloc = tiny_cloc[0]
        assert torch.equal(found, cloc.get_region_tokens(inputs["pixel_values"], inputs["region_boxes"]).pooler_output)
        # The region head continues from these tokens.
        features = cloc.get_region_features(inputs["pixel_values"], inputs["region_boxes"]).pooler_output
        torch.testing.assert_close(features, cloc.region_projection(cloc.region_norm(found)))


def test_prompts_with_the_wrong_number_of_regions(examples):
    model, inputs, _ = examples[1].main([])
    with pytest.raises(ValueError, match=r"must hold token \d+ 1 times, got \[2\]"):
        model(**dict(inputs, region_boxes=inputs["region_boxes"][:, :1]))


def test_boxes_reach_the_prompt(examples, tiny_cloc):
    scene = make_scene(0, split="test")
    _, tokenizer = examples[0].load_llm(None, ["<image>", "<region>"], torch.float32)
    inputs = examples[1].build_inputs(*tiny_cloc, tokenizer, scene["image"], [[4, 8, 32, 64]], "What is {}?")
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<image>") == 16 and "What is [4, 8, 32, 64]" in text and text.count("<region>") == 1
    assert torch.equal(inputs["region_boxes"], torch.tensor([[[0.0625, 0.125, 0.5, 1.0]]]))
