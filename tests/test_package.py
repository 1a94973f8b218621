"""The package as a whole: what importing it does and costs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

import pixclip_hf

PACKAGE = Path(pixclip_hf.__file__).parent
FAMILIES = [("cloc", "CLOC"), ("pixclip", "PixCLIP")]


def run_python(code, *args):
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("model_type", "prefix"), FAMILIES)
def test_auto_classes_know_both_models(model_type, prefix, request, tmp_path):
    model, processor = request.getfixturevalue(f"tiny_{model_type}")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is getattr(pixclip_hf, f"{prefix}Config")
    assert type(AutoModel.from_pretrained(tmp_path)) is getattr(pixclip_hf, f"{prefix}Model")
    assert type(AutoProcessor.from_pretrained(tmp_path)) is getattr(pixclip_hf, f"{prefix}Processor")
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is pixclip_hf.RegionImageProcessor


def test_public_names_exist():
    for name in [*pixclip_hf.__all__, *pixclip_hf._MODULE_OF_LAZY_NAME]:
        assert name in dir(pixclip_hf)
        assert getattr(pixclip_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        pixclip_hf.no_such_name  # noqa: B018


def test_import_leaves_the_extras_alone():
    """And drawing scenes and writing cards needs neither `datasets` nor Arrow."""
    added, regions = run_python(
        "import json, sys, transformers.pipelines\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "before = set(sys.modules)\n"
        "import pixclip_hf\n"
        "added = sorted(set(sys.modules) - before)\n"
        "sys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        "import pixclip_hf.cards\n"
        "from pixclip_hf.scenes.dataset import make_scene\n"
        "print(json.dumps([added, len(make_scene(0)['regions'])]))"
    )
    assert regions >= 3
    assert "pixclip_hf.modeling.modeling_cloc" in added
    heavy = {"accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "tensorboard"}
    assert not heavy & {name.split(".")[0] for name in added}
    assert not [
        name for name in added if re.match(r"pixclip_hf\.(annotation|conversion|data|evaluation|training)", name)
    ]


def test_constraints_pin_what_setup_asks_for(monkeypatch):
    root = PACKAGE.parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("the package is not run from its repository")
    asked = {}
    setuptools = SimpleNamespace(setup=asked.update, find_packages=lambda *folders: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.chdir(root)
    run_path("setup.py")
    lines = (root / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = asked["extras_require"]
    for requirement in map(Requirement, [*asked["install_requires"], *extras["all"]]):
        assert pinned.get(canonicalize_name(requirement.name)) in requirement.specifier, requirement
    assert {"annotate", "train", "dev"} < set(extras) and len(extras["all"]) > 20
