"""transformers' common model tests over every model of ours, and over CLIP for comparison."""

import copy
import unittest
import unittest.mock

import builders
import testers
from suite import load
from transformers import CLIPModel, CLIPVisionModelWithProjection

import pixclip_hf

ModelTesterMixin = load("test_modeling_common").ModelTesterMixin
ConfigTester = load("test_configuration_common").ConfigTester


class VisionTests(ModelTesterMixin):
    """What a model without token embeddings is asked."""

    test_resize_embeddings = False
    # Otherwise asked only of models younger than 2023, by the copyright line of their file.
    test_can_init_all_missing_weights_before_2023 = True

    def test_model_get_set_embeddings(self):
        self.skipTest("The input embeddings are a convolution, as in CLIP's vision models.")

    def test_inputs_embeds(self):
        self.skipTest("There are no token embeddings, as in CLIP's vision models.")

    def test_config(self):
        config_class = type(self.model_tester.get_config())
        given = {"hidden_size": 96} if hasattr(config_class, "hidden_size") else {"projection_dim": 24}
        ConfigTester(self, config_class=config_class, has_text_modality=False, **given).run_common_tests()

    def test_init_weights_can_init_buffers(self):
        # The Fourier frequencies are random, as those that this test asks to be zero by a field named `scale`.
        changes = {"position_scale": 0} if self.model_tester.family == "cloc" else {}
        with unittest.mock.patch.object(self.model_tester, "changes", changes):
            super().test_init_weights_can_init_buffers()


class RegionModelTests(VisionTests):
    """What a whole model is asked. Its towers' states are in its towers' outputs, as in CLIP."""

    has_attentions = False
    _is_composite = True
    additional_model_inputs = ["input_ids", "region_boxes", "region_masks", "region_attention_mask"]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | copy.deepcopy(self.model_tester.region_texts()) if return_labels else inputs

    def test_hidden_states_output(self):
        self.skipTest("Tested on the vision models; the whole model has the towers' outputs.")

    def test_retain_grad_hidden_states_attentions(self):
        self.skipTest("Tested on the vision models; the whole model has the towers' outputs.")


def add_tests(mixin, tester, model_class, towers=""):
    """Puts a test class of a model into this module."""

    def setUp(self):
        self.model_tester = tester

    name = f"Test{model_class.__name__}{towers.title().replace('_', '')}"
    body = {"setUp": setUp, "all_model_classes": (model_class,), "__module__": __name__}
    globals()[name] = type(name, (mixin, unittest.TestCase), body)


for family in builders.FAMILIES:
    for vision, text in (("clip", "clip_text"), ("siglip", "bert"), ("eva02", "llama")):
        whole, image_side = testers.ModelTester(family, vision, text), testers.VisionTester(family, vision)
        add_tests(RegionModelTests, whole, builders.MODELS[family], f"{vision}_{text}")
        add_tests(VisionTests, image_side, builders.VISION_MODELS[family], vision)
add_tests(VisionTests, testers.TowerTester(), pixclip_hf.Eva02VisionModel)


class CLIPTests:
    """CLIP is older than the rule that missing weights start as new ones, which its logit scale does not follow."""

    test_can_init_all_missing_weights_before_2023 = False


add_tests(type("WholeCLIPTests", (CLIPTests, RegionModelTests), {}), testers.CLIPTester(whole=True), CLIPModel)
add_tests(
    type("CLIPVisionTests", (CLIPTests, VisionTests), {}),
    testers.CLIPTester(whole=False),
    CLIPVisionModelWithProjection,
)
