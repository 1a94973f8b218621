"""Auto classes and tasks of transformers on the folders that both models save, and classes that users derive."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, pipeline

import pixclip_hf

both = pytest.mark.parametrize("family", ["cloc", "pixclip"])
NAMES = {"cloc": "CLOC", "pixclip": "PixCLIP"}


@pytest.fixture
def saved(family, request, tmp_path):
    """(model, processor, the folder that both are saved to)."""
    model, processor = request.getfixturevalue(f"tiny_{family}")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    return model, processor, tmp_path / "saved"


def classes(family):
    return tuple(getattr(pixclip_hf, f"{NAMES[family]}{name}") for name in ("Model", "VisionModel"))


@both
def test_a_folder_gives_the_model_that_it_holds(saved, family, tmp_path):
    model, _, folder = saved
    whole, vision = classes(family)
    assert type(AutoModel.from_pretrained(folder)) is whole
    assert type(AutoModel.from_config(model.config)) is type(AutoModel.from_config(type(model.config)())) is whole
    vision.from_pretrained(folder).save_pretrained(tmp_path / "vision")
    loaded, info = AutoModel.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert type(loaded) is vision and not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 32, 32)
    expected = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(loaded.get_image_features(pixels).pooler_output, expected)


@both
def test_the_code_in_a_folder_is_named_for_its_auto_classes(saved, family, tmp_path):
    _, _, folder = saved
    whole, vision = classes(family)
    vision.from_pretrained(folder).save_pretrained(tmp_path / "vision")
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    assert named.keys() == {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification"}
    assert (
        named["AutoModel"] == named["AutoModelForZeroShotImageClassification"] == f"modeling_{family}.{whole.__name__}"
    )
    assert f"\nclass {whole.__name__}(" in (folder / f"modeling_{family}.py").read_text()
    named = json.loads((tmp_path / "vision" / "config.json").read_text())["auto_map"]
    assert named["AutoModel"] == f"modeling_{family}.{vision.__name__}"
    assert (tmp_path / "vision" / f"modeling_{family}.py").exists()


@both
def test_zero_shot_image_classification(saved, family):
    model, processor, folder = saved
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(folder)) is type(model)
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    image, labels = Image.linear_gradient("L").convert("RGB"), ["a bright picture", "dark"]
    found = classify(image, candidate_labels=labels, hypothesis_template="{}")
    logits = model(**processor(images=image, text=labels)).logits_per_image[0]
    expected = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
    assert abs(found[0]["score"] - found[1]["score"]) > 1e-4


@both
def test_image_feature_extraction(saved, family, tmp_path):
    model, processor, folder = saved
    classes(family)[1].from_pretrained(folder).save_pretrained(tmp_path / "vision")
    processor.image_processor.save_pretrained(tmp_path / "vision")
    image = Image.linear_gradient("L").convert("RGB")
    features = model.get_image_features(processor(images=image)["pixel_values"]).pooler_output
    expected = torch.nn.functional.normalize(features, dim=-1)
    for place in (folder, tmp_path / "vision"):
        extract = pipeline("image-feature-extraction", model=str(place))
        torch.testing.assert_close(torch.tensor(extract(image)), expected, atol=1e-6, rtol=1e-5)


# What a user's own module may import: itself by parts, and what transformers would refuse to copy.
OWN_MODULE = """
import module_that_only_i_have
from module_that_only_i_have import BIAS
import pixclip_hf

class {name}Config(pixclip_hf.{name}Config):
    own: int = 3

class Own{name}(pixclip_hf.{name}Model):
    config_class = pixclip_hf.{name}Config
    def get_image_features(self, *args, **kwargs):
        outputs = super().get_image_features(*args, **kwargs)
        outputs.pooler_output = outputs.pooler_output + BIAS
        return outputs

class Own{name}Processor(pixclip_hf.{name}Processor):
    pass
"""


@both
def test_classes_derived_elsewhere(saved, family, tmp_path, monkeypatch):
    model, processor, folder = saved
    own, again = tmp_path / "own", tmp_path / "again"
    own.mkdir()
    (own / "module_that_only_i_have.py").write_text("BIAS = 1.0\n")
    (own / f"own_{family}.py").write_text(OWN_MODULE.format(name=NAMES[family]))
    monkeypatch.syspath_prepend(str(own))
    module = __import__(f"own_{family}")
    derived = getattr(module, f"Own{NAMES[family]}")
    (own / "module_that_only_i_have.py").unlink()
    try:
        own_processor = getattr(module, f"Own{NAMES[family]}Processor")
        parts = (processor.image_processor, processor.tokenizer)
        for part in (derived.from_pretrained(folder), own_processor(*parts)):
            part.save_pretrained(again)
        assert not [path.name for path in again.iterdir() if path.name.startswith(("own_", "module_"))]
        pixels = torch.randn(1, 3, 32, 32)
        expected = model.get_image_features(pixels).pooler_output
        found = derived.from_pretrained(again).get_image_features(pixels).pooler_output
        torch.testing.assert_close(found, expected + 1)
        # The package's own model reads the folder too.
        found = AutoModel.from_pretrained(again).get_image_features(pixels).pooler_output
        torch.testing.assert_close(found, expected)
        assert type(AutoConfig.from_pretrained(again)) is type(model.config)
        assert type(own_processor.from_pretrained(again)) is own_processor
        derived_config = getattr(module, f"{NAMES[family]}Config")(**model.config.to_dict())
        derived_config.save_pretrained(tmp_path / "config")
        assert type(derived_config).from_pretrained(tmp_path / "config").own == 3
    finally:
        for name in (f"own_{family}", "module_that_only_i_have"):
            sys.modules.pop(name, None)


@both
def test_a_derived_class_may_be_registered(family):
    whole, _ = classes(family)
    derived = type("Derived", (whole,), {"__module__": "somewhere"})
    assert not derived.is_remote_code() and whole.is_remote_code()
    # A sharded model's class is made by torch, and saves as the one it is made of.
    assert type("FSDPModel", (whole,), {"__module__": "torch.distributed.fsdp"}).is_remote_code()
