"""Tiny models and inputs in the form that transformers' common model tests ask for."""

import builders
import torch

import pixclip_hf

IMAGES, SLOTS, LENGTH, LAYERS, WIDTH, HEADS = 3, 2, 9, 2, 32, 4
PATCHES = 16


def sizes():
    """What both towers have: the common tests know one number of layers, of heads and one width per model."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }


def region_inputs(family):
    """Regions of a batch, the last slot of the last image padded."""
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(IMAGES, SLOTS, dtype=torch.long)
    attention_mask[-1, -1] = 0
    if family == "cloc":
        corners = torch.rand(IMAGES, SLOTS, 2, 2, generator=generator)
        regions = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    else:
        regions = (torch.rand(IMAGES, SLOTS, 32, 32, generator=generator) > 0.5).to(torch.uint8)
    return {builders.region_key(family): regions, "region_attention_mask": attention_mask}


class Tester:
    """What every tester says of itself."""

    batch_size, num_hidden_layers, hidden_size, num_attention_heads = IMAGES, LAYERS, WIDTH, HEADS
    image_size, patch_size = 32, 8
    # Fields of the configuration that a test sets.
    changes = {}

    def __init__(self, family, vision="clip", text="clip_text"):
        self.family, self.vision, self.text = family, vision, text

    @property
    def vision_tokens(self):
        return PATCHES + (self.vision != "siglip")


class ModelTester(Tester):
    """A whole model. Training adds a text per region."""

    seq_length, is_training = LENGTH, True

    def get_config(self):
        return builders.build_config(
            self.family,
            vision_config=builders.vision_config(self.vision, **sizes()),
            text_config=builders.text_config(self.text, **sizes()),
            text_pooling=builders.POOLINGS[self.text],
            text_hidden_size=None,
            **self.changes,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        input_ids, attention_mask = builders.build_texts(IMAGES, length=LENGTH)
        inputs = {
            "pixel_values": torch.randn(IMAGES, 3, 32, 32, generator=generator),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **region_inputs(self.family),
        }
        return self.get_config(), inputs

    def region_texts(self):
        """The texts that the loss needs, and for PixCLIP the crops."""
        ids, mask = builders.build_texts(IMAGES, SLOTS, length=LENGTH, seed=2)
        inputs = {"region_input_ids": ids, "region_text_attention_mask": mask}
        if self.family == "pixclip":
            generator = torch.Generator().manual_seed(3)
            inputs["crop_pixel_values"] = torch.randn(IMAGES, SLOTS, 3, 32, 32, generator=generator)
            inputs["crop_masks"] = torch.rand(IMAGES, SLOTS, 32, 32, generator=generator) > 0.4
        return inputs


class VisionTester(Tester):
    """The image side of a model."""

    is_training = False

    @property
    def seq_length(self):
        return self.vision_tokens

    def get_config(self):
        return builders.build_config(
            self.family,
            vision_config=builders.vision_config(self.vision, **sizes()),
            text=None,
            **self.changes,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        return self.get_config(), {"pixel_values": pixel_values, **region_inputs(self.family)}


class TowerTester(Tester):
    """The EVA02 tower by itself."""

    is_training = False
    seq_length = PATCHES + 1

    def __init__(self):
        super().__init__(None, "eva02", None)

    def get_config(self):
        config = builders.vision_config("eva02", **sizes())
        config.pop("model_type")
        return pixclip_hf.Eva02VisionConfig(**config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.randn(IMAGES, 3, 32, 32)}


class CLIPTester(Tester):
    """CLIP itself, whole or its vision model with projection, for comparison."""

    def __init__(self, whole):
        super().__init__(None)
        self.whole = whole

    @property
    def is_training(self):
        return self.whole

    @property
    def seq_length(self):
        return LENGTH if self.whole else self.vision_tokens

    def get_config(self):
        from transformers import CLIPConfig, CLIPVisionConfig

        vision, text = builders.vision_config("clip", **sizes()), builders.text_config("clip_text", **sizes())
        if not self.whole:
            return CLIPVisionConfig(**vision, projection_dim=16)
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)

    def prepare_config_and_inputs_for_common(self):
        input_ids, attention_mask = builders.build_texts(IMAGES, length=LENGTH)
        inputs = {"pixel_values": torch.randn(IMAGES, 3, 32, 32)}
        if self.whole:
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.get_config(), inputs

    def region_texts(self):
        """What asks CLIP for its loss."""
        return {"return_loss": True}
