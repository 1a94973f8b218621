"""The command `pixclip-hf`: what it lists, what each part says of itself, and how it fails."""

import io
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

import pixclip_hf
from pixclip_hf import cli

SOURCE = Path(pixclip_hf.__file__).parents[1]
ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "hub_cards").glob("*.md")]
# Runs the command as the installed script does, then says what it imported.
SCRIPT = """
import sys
from pixclip_hf_command import main
try:
    main()
finally:
    print({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "pixclip_hf"})
"""


def test_help_is_cheap_and_lists_what_is_there():
    shown = subprocess.run([sys.executable, "-c", SCRIPT, "--help"], capture_output=True, text=True, cwd=SOURCE)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith("set()\n")
    listed = re.findall(r"^  (\w+)  +\w", shown.stdout.split("\ncommands:\n")[1], flags=re.M)
    commands = ["train", "evaluate", "annotate", "embed", "search", "convert", "publish", "app"]
    assert listed == commands == list(cli.COMMANDS)


def test_the_package_installs_it(monkeypatch):
    root = SOURCE.parent
    if not (root / "setup.py").is_file():
        pytest.skip("the package is not run from its repository")
    asked = {}
    setuptools = SimpleNamespace(setup=asked.update, find_packages=lambda *folders: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.chdir(root)
    run_path("setup.py")
    assert asked["entry_points"] == {"console_scripts": ["pixclip-hf = pixclip_hf_command:main"]}
    assert asked["py_modules"] == ["pixclip_hf_command"] and (SOURCE / "pixclip_hf_command.py").is_file()


@pytest.mark.parametrize(
    "command",
    ("train", "evaluate", "annotate vesl", "annotate longgrit", "annotate report", "embed", "search", "convert clip",
     "convert pixclip", "convert alpha-clip", "convert open-clip", "publish", "app"),
)  # fmt: skip
def test_each_command_explains_itself(command, capsys, monkeypatch):
    """Its own name, a text for every argument, and no argument in its examples and in the guides that it does not
    take."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: pixclip-hf {command} ")
    description, _, arguments = shown.partition("\noptions:\n")
    lines = arguments.splitlines()
    known = set()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):
            name, *text = re.split(r"  +", line.strip())
            known.add(name.split()[0])
            assert text or following.startswith(" " * 10), line
    texts = "\n".join([description, *(path.read_text() for path in GUIDES)]).replace("\\\n", "")
    examples = re.findall(rf"^ *pixclip-hf {command} .*", texts, flags=re.M)
    named = {name for example in examples for name in re.findall(r"(?<![\w-])--[a-z]\w+", example.split(" # ")[0])}
    assert named <= known | {"--help"}, named - known


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["search", "runs/photos", "a dog"]) == 1
    assert capsys.readouterr().err == 'error: pixclip-hf search needs matplotlib: pip install "pixclip-hf[search]"\n'

    def broken(name):
        raise ModuleNotFoundError("No module named 'pixclip_hf.nothing'", name="pixclip_hf.nothing")

    monkeypatch.setattr(cli, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="pixclip_hf.nothing"):
        cli.main(["search", "runs/photos", "a dog"])


def test_arguments_and_status_go_through(monkeypatch, capsys):
    given = []

    def fail(arguments):
        raise ValueError("`x` must be 1, got 2.")

    def use(function):
        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=function))

    use(given.append)
    assert cli.main(["evaluate", "--model", "m"]) == 0 and given == [["--model", "m"]]
    use(lambda arguments: 3)
    assert cli.main(["convert", "clip"]) == 3
    use(fail)
    assert cli.main(["publish"]) == 1
    assert capsys.readouterr().err == "error: `x` must be 1, got 2.\n"
    # A run of hours shows where it failed.
    with pytest.raises(ValueError):
        cli.main(["train"])
    with pytest.raises(SystemExit):
        cli.main(["dance"])
    assert "invalid choice: 'dance'" in capsys.readouterr().err


def test_names_that_the_terminal_lacks_end_no_run(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(pixclip_hf, "says", lambda arguments: print("wrote 写真"), raising=False)
    monkeypatch.setitem(cli.COMMANDS, "say", cli.Command("pixclip_hf", "says something", "says"))
    assert cli.main(["say"]) == 0
    stream.flush()
    assert stream.buffer.getvalue().rstrip() == b"wrote \\u5199\\u771f"
