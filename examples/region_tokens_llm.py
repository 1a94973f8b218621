"""Hands regions to an LLM: CLOC's Prompter in the place of Ferret's visual sampler.

    python examples/region_tokens_llm.py --cloc runs/demo/cloc --llm any/llm

Ferret (arXiv 2310.07704) names a region in a prompt by its coordinates and by one token that carries its visual
feature. Here that feature is what the Prompter gives for the region's box (CLOC, arXiv 2410.02746): one pass of the
vision tower serves the image tokens and any number of regions. Without arguments CLOC and LLM are tiny and random,
made on the spot. The projectors are new: what is generated means something once they have been trained.
"""

import argparse

import torch
from llava_vision_tower import load_cloc, load_llm
from torch import Tensor, nn

from pixclip_hf import make_scene

IMAGE, REGION = "<image>", "<region>"


class RegionLLM(nn.Module):
    """CLOC, an LLM, and two projectors (as LLaVA's) from one to the other: of image tokens and of region tokens."""

    def __init__(self, cloc: nn.Module, llm: nn.Module, image_token_id: int, region_token_id: int):
        super().__init__()
        self.cloc, self.llm = cloc, llm
        self.image_token_id, self.region_token_id = image_token_id, region_token_id
        widths = cloc.config.vision_config.hidden_size, llm.get_input_embeddings().embedding_dim
        self.image_projector = nn.Sequential(nn.Linear(*widths), nn.GELU(), nn.Linear(widths[1], widths[1]))
        self.region_projector = nn.Sequential(nn.Linear(*widths), nn.GELU(), nn.Linear(widths[1], widths[1]))
        self.to(llm.dtype)

    def embed(self, input_ids: Tensor, pixel_values: Tensor, region_boxes: Tensor) -> Tensor:
        """Prompt embeddings with visual tokens at their places.

        Args:
            input_ids (`(B, L)`): with an image token for each patch and a region token for each box, in their order.
            pixel_values (`(B, 3, H, W)`), region_boxes (`(B, R, 4)`): as CLOC takes them.

        Returns:
            `(B, L, width of the LLM)`.

        Raises:
            ValueError: the number of special tokens is not that of patches or boxes.
        """
        outputs = self.cloc.get_region_tokens(pixel_values, region_boxes)
        config = self.cloc.config.vision_config
        patches = outputs.last_hidden_state[:, -((config.image_size // config.patch_size) ** 2) :]
        embeds = self.llm.get_input_embeddings()(input_ids)
        for token, features in (
            (self.image_token_id, self.image_projector(patches)),
            (self.region_token_id, self.region_projector(outputs.pooler_output)),
        ):
            places = input_ids == token
            if not (places.sum(1) == features.shape[1]).all():
                raise ValueError(
                    f"`input_ids` must hold token {token} {features.shape[1]} times, got {places.sum(1).tolist()}."
                )
            embeds = embeds.masked_scatter(places[..., None], features.to(embeds.dtype))
        return embeds

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, region_boxes: Tensor, **kwargs):
        """The LLM's output; `labels` among `kwargs` gives the loss to train the projectors with."""
        embeds = self.embed(input_ids, pixel_values, region_boxes)
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, region_boxes: Tensor, **kwargs
    ) -> Tensor:
        """New tokens `(B, L')` after the prompt."""
        embeds = self.embed(input_ids, pixel_values, region_boxes)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def build_inputs(cloc, cloc_processor, tokenizer, image, boxes: list, question: str) -> dict[str, Tensor]:
    """One image, its boxes (pixels, xyxy) and a question about them, in which each `{}` becomes a region."""
    config = cloc.config.vision_config
    regions = [f"{[round(side) for side in box]} {REGION}" for box in boxes]
    prompt = IMAGE * (config.image_size // config.patch_size) ** 2 + " " + question.format(*regions)
    images = cloc_processor(images=image, boxes=boxes)
    text = tokenizer(prompt, return_tensors="pt")
    return {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "pixel_values": images["pixel_values"].to(cloc.dtype),
        "region_boxes": images["region_boxes"],
    }


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cloc", help="folder or Hub id of a CLOC")
    parser.add_argument("--llm", help="folder or Hub id of a decoder LLM with its tokenizer")
    arguments = parser.parse_args(argv)

    # 1. CLOC, an LLM that knows the two special tokens, and the projectors between them.
    torch.manual_seed(0)
    cloc, cloc_processor = load_cloc(arguments.cloc)
    llm, tokenizer = load_llm(arguments.llm, [IMAGE, REGION], cloc.dtype)
    model = RegionLLM(cloc, llm, *tokenizer.convert_tokens_to_ids([IMAGE, REGION])).eval()

    # 2. A question about two regions of a scene.
    scene = make_scene(0, split="test")
    boxes = [scene["regions"][index]["box"] for index in (0, -1)]
    inputs = build_inputs(cloc, cloc_processor, tokenizer, scene["image"], boxes, "How does {} differ from {}?")

    # 3. A few words.
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"{len(boxes)} regions in {inputs['input_ids'].shape[1]} prompt tokens: {answer!r}")
    return model, inputs, tokens


if __name__ == "__main__":
    main()
