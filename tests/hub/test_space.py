"""A Space that shows a published model, pushed to a Hub on loopback."""

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from hub_server import running_hub
from processes import Failed, running_process

import pixclip_hf
from pixclip_hf import space

PACKAGE = Path(pixclip_hf.__file__).parent


@pytest.fixture
def gradio(monkeypatch):
    """Gradio's version, also where it is not installed."""
    monkeypatch.setattr(space, "version", lambda name: "6.31.0" if name == "gradio" else version(name))


def test_what_a_space_consists_of(gradio):
    files = space.space_files("org/cloc", "team/demo", "v1")
    _, card, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(card)
    assert data["sdk"] == "gradio" and data["sdk_version"] == "6.31.0" and data["models"] == ["org/cloc"]
    assert data["title"] == "demo" and data["app_file"] == "app.py" and "# demo\n" in text
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = dict(line.split("==") for line in files["requirements.txt"].decode().splitlines())
    assert set(pins) == set(space.PINNED) and pins["transformers"] == version("transformers")
    assert not [pin for pin in pins.values() if "+" in pin]
    call = ast.parse(files["app.py"].decode()).body[-1].value
    assert ast.unparse(call) == "launch('org/cloc', revision='v1')"
    code = {name for name in files if name.endswith(".py") and name != "app.py"}
    assert code == {f"pixclip_hf/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    assert not [name for name in files if "__pycache__" in name or "hub_cards" in name]


def test_names_and_versions_are_checked(gradio, monkeypatch):
    for names, word in ((("runs/demo/x/y", "team/demo"), "model"), (("org/cloc", "demo"), "space")):
        with pytest.raises(ValueError, match=f"`{word}` must be a Hub id"):
            space.space_files(*names)
    monkeypatch.setattr(space, "version", lambda name: version("no-such-library"))
    with pytest.raises(ValueError, match=r"gradio is not: pip install \"pixclip-hf\[app\]\""):
        space.space_files("org/cloc", "team/demo")


def test_model_and_space_in_one_commit_each(tiny_cloc, tmp_path):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    pretend = (
        "from importlib.metadata import version\nfrom pixclip_hf import hub, space\n"
        "space.version = lambda name: '6.31.0' if name == 'gradio' else version(name)\n"
    )
    with running_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
        with running_process(tmp_path, **settings) as author:
            with pytest.raises(Failed, match="RepositoryNotFoundError"):
                author.run(pretend + "hub.main(['--repo_id', 'team/cloc', '--space', 'team/demo'])")
            assert ("space", "team/demo") not in hub.repositories
            listed = author.run("hub.main(['--repo_id', 'team/cloc', '--space', 'team/demo', '--dry_run'])")
            assert "app.py" in listed and "pixclip_hf/app/interface.py" in listed and not hub.repositories
            printed = author.run(
                "hub.main(['--model', 'model', '--repo_id', 'team/cloc', '--space', 'team/demo', '--private'])"
            )
            assert re.findall(r"published: \S+:\d+/(\S+)/commit", printed) == [
                "team/cloc", "spaces/team/demo",
            ]  # fmt: skip
            pushed = hub.repositories["space", "team/demo"]
            assert pushed.private and len(pushed.commits) == 2  # the Hub's own, and one
            first = pushed.find("main")[1]
            assert first["app.py"].decode().endswith('launch("team/cloc", revision="main")\n')
            # A file that a later version no longer has goes; one that somebody added stays.
            first["pixclip_hf/gone.py"] = b""
            first["notes.md"] = b"ours"
            names = first["pixclip_hf_files.json"].decode().replace('"app.py"', '"app.py", "pixclip_hf/gone.py"')
            first["pixclip_hf_files.json"] = names.encode()
            author.run("hub.publish_space('team/cloc', 'team/demo', model_revision='main')")
            second = pushed.find("main")[1]
            assert "pixclip_hf/gone.py" not in second and second["notes.md"] == b"ours"
            hub.repositories["model", "team/cloc"].find("main")[1]["adapter_config.json"] = b"{}"
            with pytest.raises(Failed, match="A Space shows a whole model, got adapters"):
                author.run("hub.publish_space('team/cloc', 'team/demo')")
    # The program finds the package beside it.
    for name, content in second.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    with running_process(tmp_path / "space", PYTHONPATH=str(tmp_path / "space")) as visitor:
        printed = visitor.run("import pixclip_hf.app.demo, pixclip_hf.app.session\nprint(pixclip_hf.__file__)")
    assert str(tmp_path / "space") in printed
