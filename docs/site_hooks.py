"""What `make docs` adds to MkDocs: pages that lie outside of docs/ or are not in the navigation, and links to the
reference."""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the repository that the site has too, under the same paths.
PAGES = ("CHANGELOG.md", "benchmarks/RESULTS.md")
OTHER_NAMES = "reference/others.md"
REFERENCE = re.compile(r"^::: pixclip_hf\.(\w+)$", flags=re.M)
# `[`Name`]`, as docstrings and guides of Hugging Face link to a name of the package.
NAME_LINK = re.compile(r"\[`([\w.]+)`\](?![\[(])")


def public_names() -> set[str]:
    tree = ast.parse((ROOT / "src/pixclip_hf/__init__.py").read_text(encoding="utf-8"))
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    return set(ast.literal_eval(next(values)))


class LinkPublicNames(griffe.Extension):
    """Turns `[`Name`]` in docstrings into a link where the name is public, and into code elsewhere."""

    def __init__(self) -> None:
        self.names = public_names()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = NAME_LINK.sub(self._link, obj.docstring.value)

    def _link(self, found: re.Match) -> str:
        name = found[1].split(".")[0]
        return f"[`{found[1]}`][pixclip_hf.{name}]" if name in self.names else f"`{found[1]}`"


def other_names() -> list[str]:
    """Public names that no page of the reference has."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = {name for page in pages for name in REFERENCE.findall(page.read_text(encoding="utf-8"))}
    return sorted(public_names() - named)


def on_config(config: Any) -> Any:
    """Puts pages that the navigation does not name at the end of the guides, and public names that no page of the
    reference has on one of their own: none is lost."""
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    (guides,) = (entry["Guides"] for entry in config.nav if isinstance(entry, dict) and "Guides" in entry)
    guides += [page for page in pages if page not in named]
    if other_names():
        (reference,) = (entry["Reference"] for entry in config.nav if isinstance(entry, dict) and "Reference" in entry)
        reference.append({"Others": OTHER_NAMES})
    return config


def on_files(files: Files, config: Any) -> Files:
    for path in PAGES:
        files.append(File.generated(config, path, content=(ROOT / path).read_text(encoding="utf-8")))
    if names := other_names():
        content = "# Others\n" + "".join(f"\n::: pixclip_hf.{name}\n" for name in names)
        files.append(File.generated(config, OTHER_NAMES, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    # Links that hold in the repository, between docs/ and what lies beside it.
    for path in PAGES:
        markdown = markdown.replace(f"](../{path}", f"]({path}")
    return markdown.replace("](../docs/", "](../").replace("](docs/", "](")
