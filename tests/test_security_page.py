"""docs/security.md: each promise names a test that there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()


def promises():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("promise", "---")]


def test_each_promise_names_its_test():
    rows = promises()
    assert len(rows) > 40 and all(len(row) == 2 for row in rows)
    for promise, named in rows:
        file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", named).groups()
        source = (ROOT / file).read_text()
        assert re.search(rf"^def {name}\(", source, flags=re.M), f"{promise!r} names {named}, which is not there"


def test_the_page_is_found():
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/security.md" in (ROOT / name).read_text()
