"""What `make dist` builds is complete, is accepted by an index, and works where nothing else of the project is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from test_readme import SNIPPETS

ROOT = Path(__file__).parents[1]
IGNORED = (".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs")
# Runs in a folder that holds `runs/demo/cloc`, as a reader of the README does it, and writes a card.
PROGRAM = """
import sys
from pathlib import Path

{snippet}
from pixclip_hf.cards import write_card

assert Path(pixclip_hf.__file__).is_relative_to(sys.prefix), pixclip_hf.__file__
assert len(regions) == 2 and tensor.shape[0] == 1
assert 'model="org/cloc"' in write_card("runs/demo/cloc", "org/cloc").read_text()
"""

if not (ROOT / "setup.py").is_file():
    pytest.skip("the tests are not run from the repository", allow_module_level=True)


def run(*command, **options):
    """Output of a command that does not see this checkout through PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel) of a copy of the repository, made as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*IGNORED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "copy")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture
def place(tiny_cloc, tmp_path):
    """An empty folder with the program, the demo's model where the README says it is, and a place for a `venv`."""
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "runs" / "demo" / "cloc")
    (snippet,) = (snippet for snippet in SNIPPETS if 'model="runs/demo/cloc")\nregions =' in snippet)
    (tmp_path / "program.py").write_text(PROGRAM.format(snippet=snippet))
    return tmp_path


def files_below(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts and "egg-info" not in path.parts[0]}


def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    names = [name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name]
    cards = {f"pixclip_hf/hub_cards/{name}" for name in files_below(ROOT / "hub_cards")}
    assert set(names) == files_below(ROOT / "src") | cards
    assert len(cards) >= 4 and "pixclip_hf/py.typed" in names
    assert any("/prompts/" in name for name in names) and any("/metrics/" in name for name in names)


def test_the_sdist_holds_what_a_contributor_needs(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"}
    assert documents | {"constraints.txt", "pyproject.toml", "setup.py"} <= names
    for folder in ("examples", "hub_cards", "tests"):
        assert {f"{folder}/{name}" for name in files_below(ROOT / folder)} <= names


def test_an_index_takes_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_works_without_the_repository(built, place):
    folder = place / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1])
    # Only now, so that pip sees no pixclip_hf there. The line adds a path: an editable install in it stays unseen.
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site_packages, "environment.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-I", "program.py", cwd=place)
    assert "annotate" in run(folder / "bin" / "pixclip-hf", "--help", cwd=place)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_works_in_a_fresh_environment(built, place):
    """With what the wheel itself asks for, and no extra."""
    folder = place / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    pins = (ROOT / "constraints.txt").read_text().split()
    run(*install, next(pin for pin in pins if pin.startswith("torch==")))  # alone, as in the Makefile
    run(*install, built[1])
    assert "datasets" not in run(python, "-m", "pip", "list")
    run(python, "-I", "program.py", cwd=place)
