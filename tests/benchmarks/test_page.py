"""The page of the benchmarks names every script, and what each prints."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_script_has_its_line():
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| [")]
    linked = [re.match(r"\| \[(.+?)\]\((.+?)\)", row).groups() for row in rows]
    assert all(name == target for name, target in linked)
    assert sorted(name for name, _ in linked) == sorted(path.name for path in FOLDER.glob("*.py"))
