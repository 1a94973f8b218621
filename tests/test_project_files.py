"""The files that describe the project agree with each other and with the package."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import pixclip_hf
from pixclip_hf import versions

ROOT = Path(__file__).parents[1]
PAPERS = {"2511.04601": "PixCLIP", "2410.02746": "Contrastive Localized"}

if not (ROOT / "setup.py").is_file():
    pytest.skip("the tests are not run from the repository", allow_module_level=True)


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def pinned(name):
    return re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)[1]


def test_editors_know_every_public_name():
    """The imports under TYPE_CHECKING, the table of lazy names and `__all__` say the same."""
    tree = ast.parse(Path(pixclip_hf.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: "." * node.level + node.module for node in block.body for alias in node.names}
    assert seen == pixclip_hf._MODULE_OF_LAZY_NAME
    eager = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "versions"
        for alias in node.names
    }
    assert eager - {"SavesPipelines"} <= set(pixclip_hf.__all__)
    assert set(pixclip_hf.__all__) == {*seen, *(eager - {"SavesPipelines"})}
    assert len(pixclip_hf.__all__) == len(set(pixclip_hf.__all__))


def test_ci_lints_before_it_tests():
    assert re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), flags=re.M) == ["check", "test"]


def test_the_workflow_tests_the_range_that_setup_asks_for():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    python = {entry["versions"]: entry["python"] for entry in jobs["test"]["strategy"]["matrix"]["include"]}
    assert set(python) == {"pinned", "oldest", "newest"}
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={python["oldest"]}"' in setup
    classifiers = re.findall(r"Python :: (3\.\d+)", setup)
    assert {python["oldest"], python["newest"]} == {classifiers[0], classifiers[-1]}
    assert versions.oldest().items() == {"transformers": "5.23", "torch": "2.6", "peft": "0.20"}.items()
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make check", "make dist"} <= set(commands)
    assert any("python src/pixclip_hf/versions.py > versions.txt" in command for command in commands)


def test_commits_are_linted_with_the_pinned_ruff():
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {" ".join(hook["entry"].split()[:2]) for hook in hooks} == {"ruff check", "ruff format"}
    assert all(hook["additional_dependencies"] == [f"ruff=={pinned('ruff')}"] for hook in hooks)


def released_version():
    return re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1]


def test_the_citation_names_version_and_papers():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == released_version() and citation["license"] == "Apache-2.0"
    references = {entry["url"].rpartition("/")[2]: entry for entry in citation["references"]}
    assert set(references) == set(PAPERS)
    for number, title in PAPERS.items():
        assert title in references[number]["title"] and len(references[number]["authors"]) >= 8


def test_the_changelog_has_the_version():
    """The released one, or of a development version the one before it."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    own = Version(pixclip_hf.__version__)
    assert headings[0] == "Unreleased"
    assert Version(headings[1]) < own if own.is_devrelease else headings[1] == pixclip_hf.__version__


def test_the_guide_for_contributors_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M)) <= set(targets)
    places = [ROOT, ROOT / "src" / "pixclip_hf"]
    for path in re.findall(r"`([\w./]*(?:/|\.py))`", text):
        assert any((place / path).exists() for place in places), path
    assert set(re.findall(r"^### … an? (\w+ ?\w*)", text, flags=re.M)) >= {"vision tower", "loss", "evaluation task"}


def test_text_files_are_utf_8_whatever_the_locale():
    """Every call that opens text says so; `open` in a binary mode and methods of other kinds of file do not."""
    names = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}
    lacking = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            plain = node.func.id if isinstance(node.func, ast.Name) else None
            name = plain or getattr(node.func, "attr", "")
            if name not in names or (name == "open" and plain is None):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            mode = given.get("mode", " ".join(map(ast.unparse, node.args[1:2])))
            if name.endswith("TemporaryFile") and not mode:
                mode = "w+b"
            if "encoding" not in given and not ("b" in mode and "text" not in name):
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not lacking
