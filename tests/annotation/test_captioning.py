"""Captions: what the source has, tiny random models of transformers from disk, and a server."""

import pickle
from pathlib import Path

import pytest
import torch
from chat_server import serving
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tokenizer
from tiny_chats import save_llava
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from pixclip_hf.annotation.chat import LocalChat
from pixclip_hf.annotation.chat.local import _load as load_local
from pixclip_hf.annotation.sources import ReadRecords
from pixclip_hf.annotation.stages import pipeline_features
from pixclip_hf.annotation.vesl import VeslArguments, vesl_models, vesl_stages
from pixclip_hf.annotation.vesl.captioning import CaptionColumn, ImageCaptions
from pixclip_hf.images import open_image


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Folder of a tiny random decoder that reads chats with an image."""
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """Folder of a tiny random model that captions images without being asked."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    text = {
        **TEXT_CONFIG,
        "encoder_hidden_size": 32,
        "sep_token_id": 258,
        "is_decoder": True,
        "initializer_range": 0.5,
    }
    vision = {key: value for key, value in VISION_CONFIG.items() if key != "model_type"}
    BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), build_tokenizer()).save_pretrained(folder)
    return str(folder)


def prepared(stage, number=4):
    features = pipeline_features([ReadRecords("scenes:1"), stage])
    return ReadRecords(f"scenes:{number}")(
        {name: [None] * number for name in features} | {"position": list(range(number))}
    )


def test_column():
    batch = prepared(CaptionColumn(), 3)
    batch["captions"][1] = []
    done = CaptionColumn()(batch)
    assert done["vesl_caption"] == [batch["captions"][0][0], None, batch["captions"][2][0]]
    assert done["rejected_reason"][1] == "the source has nothing in its column captions"
    assert CaptionColumn("alt_text")(batch)["vesl_caption"] == batch["alt_text"]
    with pytest.raises(ValueError, match="`column` must be one of captions, alt_text, got 'text'"):
        CaptionColumn("text")


@pytest.mark.parametrize(("name", "prompt"), [("llava", "What is it?"), ("blip", ""), ("blip", "a picture")])
def test_models_caption_and_do_not_depend_on_batch_mates(name, prompt, request):
    stage = ImageCaptions(LocalChat(request.getfixturevalue(name), 12), prompt, min_words=0)
    batch = prepared(stage)
    batch["rejected_stage"][2] = "source"
    done = stage(batch)
    texts = done["vesl_caption"]
    assert texts[2] is None and all(isinstance(texts[row], str) for row in (0, 1, 3))
    assert len(set(texts)) > 1, texts
    assert not any(prompt and prompt in text for text in texts if text)
    for row in (0, 1, 3):
        alone = stage({key: values[row : row + 1] for key, values in batch.items()})
        assert alone["vesl_caption"] == [texts[row]]
    assert done["steps"][0][0]["model"] == Path(stage.chat.model).name


def test_llava_equals_the_library(llava):
    stage = ImageCaptions(LocalChat(llava, 8), "What is it?", min_words=0)
    batch = prepared(stage, 2)
    assert load_local(llava)[1].tokenizer.padding_side == "left"  # chats may differ in their number of image tokens
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), LlavaProcessor.from_pretrained(llava)
    for row, text in enumerate(stage(batch)["vesl_caption"]):
        inputs = processor(images=open_image(batch["image"][row]), text="user: <image>What is it? answer:",
                           return_tensors="pt")  # fmt: skip
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert text == " ".join(expected.split())


def test_short_answers_are_rejected_with_the_answer(blip):
    stage = ImageCaptions(LocalChat(blip, 6), "", min_words=50)
    done = stage(prepared(stage, 1))
    assert done["rejected_reason"] == ["fewer than 50 words"] and done["vesl_caption"] == [None]
    assert isinstance(done["raw_answer"][0], str)


def stages_over(server, **options):
    return vesl_stages(VeslArguments(captioner=f"org/vlm@{server.url}", retries=0, **options))


def test_a_server_captions_as_a_model_on_this_machine_does():
    captions = ["A red  star\nlies on a green table.", "describe THIS image: a blue ring."]
    with serving(lambda question: captions[question["key"] % 2]) as server:
        stage, *_ = stages_over(server, prompt="Describe this image:", max_tokens=70)
        assert pickle.loads(pickle.dumps(stage)) == stage and server.url not in repr(stage)
        done = stage(prepared(stage, 12))
        assert {question["prompt"] for question in server.questions} == {"Describe this image:"}
        assert all(len(question["images"]) == 1 for question in server.questions)
        bodies = [question["body"] for question in server.questions]
        # A caption is plain text: no schema goes along.
        assert not any("response_format" in body for body in bodies)
        assert {body["max_tokens"] for body in bodies} == {70}
    assert set(done["vesl_caption"]) == {"A red star lies on a green table.", "a blue ring."}
    assert {steps[0]["model"] for steps in done["steps"]} == {"org/vlm"}
    assert vesl_models(VeslArguments(captioner=f"org/vlm@{server.url}"))["caption"] == "org/vlm"


def test_captions_may_be_cut_and_thoughts_are_no_caption():
    texts = ["<think>A star?</think>A red star on a table.", "  \n"]
    with serving(lambda question: "A red star on a table.", lambda question, number: "at the limit") as server:
        (stage, *_) = stages_over(server, attempts=1)
        assert stage(prepared(stage, 1))["vesl_caption"] == ["A red star"]
    with serving(lambda question: "<think>A star, or what?") as server:
        (stage, *_) = stages_over(server, attempts=1)
        assert stage(prepared(stage, 1))["rejected_reason"] == ["empty answer"]
    with serving(lambda question: texts[question["body"]["seed"] == 0]) as server:
        (stage, *_) = stages_over(server, attempts=2)
        assert stage(prepared(stage, 1))["vesl_caption"] == ["A red star on a table."]
        assert "Answer with the text alone." in server.questions[1]["body"]["messages"][0]["content"][1]["text"]
    with serving(lambda question: texts[1]) as server:
        (stage, *_) = stages_over(server, attempts=2)
        done = stage(prepared(stage, 1))
        assert done["rejected_reason"] == ["empty answer"] and done["raw_answer"] == [texts[1]]
