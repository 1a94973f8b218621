"""Tests of transformers that CLIP's classes pass and ours may fail: name and reason, for all our classes at once."""

LOADED = "A loaded processor knows the `auto_map` of its folder; one that was never saved has none."
EXCEPTIONS = {
    "test_new_models_require_torchvision_backend": (
        "The image processor runs on PIL alone: with a second backend one folder would give two kinds of pixels."
    ),
    "test_call_numpy_4_channels": "Images of every form become RGB; CLIP converts PIL images and leaves arrays alone.",
    "test_call_arguments_default_none": (
        "The arguments that say how boxes and masks are written have defaults with a meaning of their own."
    ),
    "test_model_input_names": "The names include those of regions, which a call without regions does not return.",
    "test_processor_from_and_save_pretrained": LOADED,
    "test_processor_from_and_save_pretrained_as_nested_dict": LOADED,
}
