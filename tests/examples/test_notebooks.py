"""The notebooks: what they import and link to exists, and, slow, they run from a fresh checkout on fewer steps."""

import ast
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# Numbers of the notebooks and what the test runs in their place.
FEWER = {
    "STEPS = 300": "STEPS = 2", "range(60)": "range(6)", "(1000, setting": "(40, setting",
    "(200, setting": "(8, setting", "images 4000": "images 70", "size 32": "size 8", "range(200)": "range(30)",
}  # fmt: skip


def cells(path, kind):
    content = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["embed_and_search", "finetune_with_lora", "points_to_names"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_parse_and_what_they_import_exists(path):
    tree = ast.parse("\n".join(cells(path, "code")))
    imported = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("pixclip_hf", "transformers"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
                imported += 1
    assert imported > 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_clean_and_linked(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    text = "\n".join(cells(path, "markdown"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((path.parent / link).is_file() for link in links)
    assert f"examples/notebooks/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path, tmp_path, monkeypatch):
    """In a kernel of their own, which finds neither a demo nor the network."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    shutil.copy(path, folder)
    text = path.read_text(encoding="utf-8")
    found = [number for number in FEWER if number in text]
    assert "STEPS = 300" in found
    for number in found:
        text = text.replace(number, FEWER[number])
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    expected = {
        "embed_and_search": "a striped blue star ['",
        "finetune_with_lora": "| lora_r | 8 |",
        "points_to_names": "| is ",
    }
    assert expected[path.stem] in shown
