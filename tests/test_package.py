"""The package as a whole: what importing it does and costs, and that its travelling files travel."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

import pixclip_hf

PACKAGE = Path(pixclip_hf.__file__).parent
TRAVELLING = sorted(p for f in ("modeling", "processing", "pipelines") for p in (PACKAGE / f).glob("*.py"))
ALLOWED = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", *sys.stdlib_module_names}
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
    added = run_python(
        "import json, sys, transformers.pipelines\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "before = set(sys.modules)\n"
        "import pixclip_hf\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert "pixclip_hf.modeling.modeling_cloc" in added
    heavy = {"accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "tensorboard"}
    assert not heavy & {name.split(".")[0] for name in added}
    assert not [
        name for name in added if re.match(r"pixclip_hf\.(annotation|conversion|data|evaluation|training)", name)
    ]


def test_travelling_files_have_unique_names():
    names = [path.name for path in TRAVELLING if path.name != "__init__.py"]
    assert len(names) >= 8
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_travelling_files_import_only_siblings_and_the_core(path):
    source = path.read_text()
    siblings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module and "." not in node.module
            assert (path.parent / f"{node.module}.py").is_file()
            siblings.add(node.module)
    # transformers finds the files to copy by these patterns, in docstrings too.
    found = re.findall(r"^\s*import\s+\.(\S+)\s*$", source, re.M) + re.findall(
        r"^\s*from\s+\.(\S+)\s+import", source, re.M
    )
    assert set(found) == siblings


@pytest.mark.parametrize(("model_type", "prefix"), FAMILIES)
def test_a_saved_pipeline_loads_without_the_package(model_type, prefix, request, tmp_path):
    model, processor = request.getfixturevalue(f"tiny_{model_type}")
    task = "zero-shot-region-classification"
    pipe = pipeline(task, model=model, processor=processor, device="cpu")
    image = Image.linear_gradient("L").resize((32, 24))
    image.save(tmp_path / "image.png")
    options = {"boxes": [[2, 3, 20, 18], [0, 0, 9, 9]], "candidate_labels": ["dark", "bright"]}
    pipe.save_pretrained(tmp_path / "model")
    code = (
        "import json, sys\n"
        "sys.modules['pixclip_hf'] = None\n"
        "from transformers import AutoModel, AutoProcessor, pipeline\n"
        "folder, image, task, options = sys.argv[1:]\n"
        "pipe = pipeline(task, model=folder, trust_remote_code=True, device='cpu')\n"
        "names = [type(part).__name__ for part in (pipe.model, pipe.processor, pipe)]\n"
        "print(json.dumps([names, pipe(image, **json.loads(options))]))"
    )
    names, outputs = run_python(code, tmp_path / "model", tmp_path / "image.png", task, json.dumps(options))
    assert names == [f"{prefix}Model", f"{prefix}Processor", "ZeroShotRegionClassificationPipeline"]
    for output, expected in zip(outputs, pipe(str(tmp_path / "image.png"), **options), strict=True):
        assert output["box"] == expected["box"] and output["labels"] == expected["labels"]
        torch.testing.assert_close(output["scores"], expected["scores"], atol=1e-5, rtol=1e-5)


def test_constraints_pin_what_setup_asks_for():
    root = PACKAGE.parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("the package is not run from its repository")
    pinned = {line.split("==")[0].lower() for line in (root / "constraints.txt").read_text().split()}
    tree = ast.parse((root / "setup.py").read_text())
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    strings = {value.split(">=")[0] for value in constants if isinstance(value, str)}
    for name in ("accelerate", "datasets", "evaluate", "matplotlib", "numpy", "peft", "pillow", "pytest", "torch"):
        assert name in strings and name in pinned
