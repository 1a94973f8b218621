"""A tiny object detector with random weights, for tests of what calls one."""

import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil


def save_tiny_detector(folder):
    """Saves a YOLOS of 32 x 40 pixels and its processor, whose six boxes are all a "thing" or a "part"; returns the
    folder as a string."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[32, 40],
        patch_size=8, num_detection_tokens=6, id2label={0: "thing", 1: "part"}, label2id={"thing": 0, "part": 1},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        # Boxes and scores that differ.
        model.vit.embeddings.detection_tokens.normal_()
        for head in (model.class_labels_classifier, model.bbox_predictor):
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([1.0, 1.0, -4.0]))
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 40}).save_pretrained(folder)
    return str(folder)
