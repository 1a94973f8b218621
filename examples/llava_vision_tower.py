"""Builds a LLaVA on the vision tower of a CLOC, and lets it look at a scene.

    python examples/llava_vision_tower.py --cloc runs/demo/cloc --llm any/llm

Without arguments both are tiny and random, made on the spot. The projector between them is new: what is generated
means something once the LLaVA has been trained.
"""

import argparse

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from pixclip_hf import make_scene, scenes_tokenizer
from pixclip_hf.scenes.small_models import small_model


def load_cloc(path: str | None):
    """(model, processor) of a saved CLOC, or of a small random one."""
    if path is None:
        model, processor = small_model("cloc", scenes_tokenizer())
        return model.eval(), processor
    return AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)


def load_llm(path: str | None, tokens: list[str], dtype: torch.dtype):
    """(model, tokenizer) of an LLM, or of a tiny random one, that knows some special tokens more."""
    if path is None:
        tokenizer = scenes_tokenizer()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).to(dtype).eval()
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
        llm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    llm.resize_token_embeddings(max(len(tokenizer), llm.config.vocab_size), mean_resizing=False)
    return llm, tokenizer


def build_llava(cloc, llm, image_token_id: int) -> LlavaForConditionalGeneration:
    """A LLaVA whose vision tower is CLOC's and whose language model is `llm`, neither of them copied."""
    tower = cloc.get_vision_tower()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=image_token_id,
        # LLaVA leaves CLIP's class token out; SigLIP has none.
        vision_feature_select_strategy="default" if tower.config.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    llava = LlavaForConditionalGeneration(config).to(tower.dtype).eval()
    llava.model.vision_tower = tower
    llava.model.language_model = llm.base_model
    llava.set_output_embeddings(llm.get_output_embeddings())
    return llava


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cloc", help="folder or Hub id of a CLOC")
    parser.add_argument("--llm", help="folder or Hub id of a decoder LLM with its tokenizer")
    parser.add_argument("--output_dir", help="folder to save the LLaVA to, for further training")
    arguments = parser.parse_args(argv)

    # 1. CLOC, an LLM, and the LLaVA made of both.
    torch.manual_seed(0)
    cloc, cloc_processor = load_cloc(arguments.cloc)
    llm, tokenizer = load_llm(arguments.llm, ["<image>"], cloc.dtype)
    llava = build_llava(cloc, llm, tokenizer.convert_tokens_to_ids("<image>"))

    # 2. Its processor: CLOC's images, the LLM's tokens.
    processor = LlavaProcessor(
        image_processor=cloc_processor.image_processor,
        tokenizer=tokenizer,
        patch_size=llava.config.vision_config.patch_size,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        num_additional_image_tokens=int(llava.config.vision_feature_select_strategy == "default"),
    )

    # 3. A forward pass and a few words.
    image = make_scene(0, split="test")["image"]
    inputs = processor(images=image, text="<image> What is in the picture?", return_tensors="pt")
    # Some tokenizers bring inputs that LLaVA does not know.
    inputs = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    inputs["pixel_values"] = inputs["pixel_values"].to(llava.dtype)
    with torch.no_grad():
        output = llava(**inputs)
        tokens = llava.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{len(output.image_hidden_states)} image tokens, logits {tuple(output.logits.shape)}: {answer!r}")

    if arguments.output_dir is not None:
        llava.save_pretrained(arguments.output_dir)
        processor.save_pretrained(arguments.output_dir)
    return llava, inputs, output


if __name__ == "__main__":
    main()
