"""A tiny SAM with random weights, for tests of what calls one."""

import torch
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor


def save_tiny_sam(folder):
    """Saves a SAM of 64 x 64 pixels and its processor; returns the folder as a string."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 64, "patch_size": 8, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1],
              "num_pos_feats": 4}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "iou_head_depth": 2, "iou_head_hidden_dim": 8, "attention_downsample_rate": 2}  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = SamModel(config)
    with torch.no_grad():
        # Masks and scores that differ from box to box.
        for parameter in model.mask_decoder.parameters():
            parameter.normal_(std=0.7)
    model.save_pretrained(folder)
    image_processor = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    SamProcessor(image_processor).save_pretrained(folder)
    return str(folder)
