"""Folders of tiny chat models with random weights: one that reads images and text, one that reads text."""

import torch
from conftest import VISION_CONFIG, build_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIZES = {
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %} answer:"
)


def tokenizer_of(template=None):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_max_length = SIZES["max_position_embeddings"]
    tokenizer.chat_template = template
    return tokenizer


def save_llava(folder):
    """Saves a model of chats with images and returns the folder's name."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "initializer_range": 0.5, **SIZES}
    config = LlavaConfig(
        vision_config=dict(VISION_CONFIG),
        text_config=text,
        image_token_index=259,
        vision_feature_layer=-1,
        pad_token_id=0,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_resize=True
    )
    LlavaProcessor(
        image_processor,
        tokenizer_of(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def save_llama(folder, answers=None, template=TEMPLATE):
    """Saves a model of chats in text and returns the folder's name. `answers`, prompt -> answer, are learned by heart;
    without them the weights are random."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(template)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1 if answers else 0.5))
    if answers:
        texts = [f"user: {prompt} answer:{answer}<eos>" for prompt, answer in answers.items()]
        tokenizer.padding_side = "right"
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        starts = [
            len(tokenizer(text.partition(" answer:")[0], add_special_tokens=False)["input_ids"]) for text in texts
        ]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, start in zip(labels, starts, strict=True):
            row[: start + len(" answer:")] = -100
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(300):
            loss = model(**batch, labels=labels).loss
            if loss < 0.01:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            raise AssertionError(f"the answers were not learned: loss {loss:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
