"""The site of docs/: its navigation, its reference, its snippets and messages; and, slow, that it builds."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pixclip_hf

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What `make docs` adds to docs/, see docs/site_hooks.py.
ADDED = {"CHANGELOG.md", "benchmarks/RESULTS.md"}
# Pages whose Python snippets run elsewhere: test_docs.py, test_readme.py, and the tests of what they are about.
PAGES_WITH_TESTS = {
    "data", "evaluation", "faq", "finetune", "inference", "install", "models", "publish", "quickstart", "regions",
    "search",
}  # fmt: skip


def pages_of(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_the_navigation_names_pages_once():
    """Pages that it does not name come behind the guides, by docs/site_hooks.py."""
    named = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named)) and set(named) <= there | ADDED and ADDED <= set(named)


def test_the_reference_has_public_names_once():
    """docs/site_hooks.py gives those that no page has a page of their own."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: pixclip_hf\.(\w+)$", text, flags=re.M)
    assert len(named) == len(set(named)) > 30 and set(named) - {"visualization"} <= set(pixclip_hf.__all__)


def test_pages_say_which_extra_they_need():
    """Every guide with a snippet or a command."""
    extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.M))
    for path in DOCS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        # The page that lists them says how to install each.
        if path.stem == "install" or not re.search(r"^```(?:python|bash)", text, flags=re.M):
            continue
        said = re.findall(r"(?:extras?|pixclip-hf\[)[ `\"]*(\w+)|(no extra|install\.md)", text)
        assert any(word in extras or none for word, none in said), path.name


def test_every_page_with_snippets_is_tested():
    with_snippets = {path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8")}
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert with_snippets >= PAGES_WITH_TESTS
    for name in with_snippets - PAGES_WITH_TESTS:
        assert f"{name}.md" in tests or f'"{name}"' in tests, name


def test_messages_of_the_troubleshooting_page_exist():
    """What stands in a heading is what the code says: each part between its ellipses, in one message."""
    messages = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                messages.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    messages = [message.replace("`", "") for message in messages]
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, flags=re.M)
    assert len(headings) > 20
    for heading in headings:
        parts = [part.strip() for part in heading.split("…") if part.strip()]
        assert any(all(part in message for part in parts) for message in messages), heading


def test_diagrams_show_the_models(monkeypatch):
    """Every text of the diagrams is what the script draws of the models as they are now."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    import draw_methods

    for family, (boxes, arrows) in draw_methods.DIAGRAMS.items():
        picture = (DOCS / f"{family}.svg").read_text(encoding="utf-8")
        shown = set(re.findall(r">([^<>\n]+)</t(?:ext|span)>", picture))
        shapes = draw_methods.record_shapes(family)
        for box in boxes.values():
            assert set(draw_methods.label(box, shapes).split("\n")) <= shown, box.title
        assert {name for arrow in arrows for name in arrow} == set(boxes)


@pytest.mark.slow
def test_the_site_builds_strictly_and_offline(tmp_path):
    """In a process that may not connect; no page asks a browser for a script, a style or a font from elsewhere."""
    pytest.importorskip("material")
    program = (
        "import socket, sys\n"
        "def refuse(*args): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--site-dir', {str(tmp_path / 'site')!r}])\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>|@import")
    for page in pages:
        found = [tag for tag in fetched.findall(page.read_text(encoding="utf-8")) if 'rel="canonical"' not in tag]
        assert not found, (page, found)
    reference = (tmp_path / "site" / "reference" / "models.html").read_text(encoding="utf-8")
    assert 'id="pixclip_hf.CLOCModel.ground"' in reference
