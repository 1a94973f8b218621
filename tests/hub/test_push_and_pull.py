"""Publishing to a Hub on loopback and loading from it, in processes of their own."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny
from hub_server import running_hub
from PIL import Image
from processes import Failed, running_process
from transformers import AutoModel

import pixclip_hf
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.training import add_lora

ROOT = Path(__file__).parents[2]
FAMILIES = {"cloc": "CLOC", "pixclip": "PixCLIP"}
LOAD = """
import torch
from transformers import AutoModel, AutoProcessor, pipeline
torch.set_num_threads(1)

def outputs(name, **options):
    model, processor = (auto.from_pretrained(name, **options) for auto in (AutoModel, AutoProcessor))
    inputs = processor(images="image.jpg", boxes=[[2, 3, 20, 18]], text=["dark"], return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**inputs)
    return torch.cat([found.region_embeds[0], found.text_embeds])

def embed(name, **options):
    extract = pipeline("region-feature-extraction", model=name, device="cpu", **options)
    return extract("image.jpg", boxes=[[2, 3, 20, 18]], return_tensors=True), type(extract).__module__

def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(type(error).__name__ + ": " + " ".join(str(error).split()))
            error = error.__cause__ or error.__context__
        return " <- ".join(causes)
"""
PUBLISH = """
import json
import pixclip_hf
from pixclip_hf.hub import main, publish_dataset

commits = {}
parts = {
    name: [auto.from_pretrained(f"runs/demo/{name}") for auto in (AutoModel, AutoProcessor)]
    for name in ("cloc", "pixclip")
}
commits["cloc"] = pixclip_hf.publish(*parts["cloc"], "team/cloc", license="apache-2.0").oid
pixclip_hf.publish(*parts["pixclip"], "team/pixclip", private=True, run_folder="runs/demo/pixclip")
for part in parts["pixclip"]:
    part.push_to_hub("team/plain")

# Adapters, and a whole model where adapters were.
main(["--model", "lora", "--repo_id", "team/lora", "--base_model", "team/cloc"])
main(["--model", "lora", "--repo_id", "team/merged", "--base_model", "team/cloc"])
main(["--model", "lora", "--repo_id", "team/merged", "--merge", "--max_shard_size", "20KB"])

# What moves on, and what stands on a branch of its own.
model, processor = parts["cloc"]
commits["old"] = pixclip_hf.publish(model, processor, "team/moving").oid
disturb(model)
commits["next"] = pixclip_hf.publish(model, processor, "team/moving", revision="next").oid
disturb(model)
commits["main"] = pixclip_hf.publish(model, processor, "team/moving").oid

publish_dataset("vesl", "team/vesl", "vesl", license="mit", language="en")
json.dump(commits, open("commits.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an image, both models, adapters, and a dataset of two shards."""
    folder = tmp_path_factory.mktemp("world")
    Image.linear_gradient("L").resize((256, 200)).convert("RGB").save(folder / "image.jpg")
    processors = {}
    for name, prefix in FAMILIES.items():
        classes = (getattr(pixclip_hf, prefix + kind) for kind in ("Config", "Model", "Processor"))
        model, processors[name] = build_tiny(*classes)
        for part in (model, processors[name]):
            part.save_pretrained(folder / "runs/demo" / name)
    results = {"dataset": "scenes", "split": "test", "same_box_by_mask": 0.875}
    (folder / "runs/demo/pixclip/metrics.json").write_text(json.dumps(results))
    torch.manual_seed(1)
    adapted = add_lora(AutoModel.from_pretrained(folder / "runs/demo/cloc"), r=2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    adapted.save_pretrained(folder / "lora")
    processors["cloc"].save_pretrained(folder / "lora")
    records = scenes_dataset(6, size=32)
    for index in range(2):
        records.shard(2, index, contiguous=True).to_parquet(folder / f"vesl/train-0000{index}-of-00002.parquet")
    return folder


@pytest.fixture(scope="module")
def world(folder):
    """A Hub to which `author`, a process with the package and a token, has pushed; `stranger` has neither."""
    with ExitStack() as stack:
        hub = stack.enter_context(running_hub())
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_DATASETS_OFFLINE": "0"}
        author = stack.enter_context(running_process(folder, HF_TOKEN=hub.token, **settings))
        strangers = {"package": False, "HF_HOME": str(folder / "stranger"), **settings}
        stranger = stack.enter_context(running_process(folder, **strangers))
        author.run(LOAD + PUBLISH)
        stranger.run(LOAD)
        commits = json.loads((folder / "commits.json").read_text())
        yield SimpleNamespace(
            hub=hub, folder=folder, author=author, stranger=stranger, commits=commits, settings=strangers
        )


@pytest.fixture(scope="module")
def here(folder):
    """What the folders that were published give in this process."""
    names = {}
    exec(LOAD, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        places = {**{name: f"runs/demo/{name}" for name in FAMILIES}, "lora": "lora"}
        found = {name: names["outputs"](place) for name, place in places.items()}
        found |= {f"pipe {name}": names["embed"](place)[0] for name, place in places.items()}
    # The adapters change the region's embedding and the text's.
    assert ((found["lora"] - found["cloc"]).abs().amax(dim=1) > 1e-3).all()
    return found


def test_what_lies_in_the_repositories(world):
    def files(name, kind="model"):
        return world.hub.repositories[kind, f"team/{name}"].find("main")[1]

    assert [name for (_, name), repository in world.hub.repositories.items() if repository.private] == ["team/pixclip"]
    cloc = files("cloc")
    assert cloc.keys() >= {"README.md", "config.json", "processor_config.json", "tokenizer.json"}
    assert cloc.keys() >= {"region_feature_extraction.py", "zero_shot_region_classification.py"}
    assert "model.safetensors" in cloc and b"license: apache-2.0" in cloc["README.md"]
    assert b"value: 0.875" in files("pixclip")["README.md"] and "metrics.json" in files("pixclip")
    lora = files("lora")
    assert json.loads(lora["adapter_config.json"])["base_model_name_or_path"] == "team/cloc"
    assert "model.safetensors" not in lora and b"base_model: team/cloc" in lora["README.md"]
    merged = files("merged")
    assert not [name for name in merged if name.startswith("adapter_")] and "model.safetensors.index.json" in merged
    assert sum(name.endswith(".safetensors") for name in merged) > 2
    assert b"lora" not in merged["README.md"].split(b"---")[1]
    # One commit a push, after the one that made the repository: readers never see a part.
    assert len(world.hub.repositories["model", "team/cloc"].commits) == 2


def test_a_stranger_loads_everything(world, here):
    world.stranger.run("""
found = {name: outputs(f"team/{name}", trust_remote_code=True) for name in ("cloc", "lora", "merged", "plain")}
found["pixclip"] = outputs("team/pixclip", trust_remote_code=True, token="hf_right")
for name in ("cloc", "pixclip", "lora", "plain"):
    token = "hf_right" if name == "pixclip" else None
    found[f"pipe {name}"], module = embed(f"team/{name}", trust_remote_code=True, token=token)
    assert module.startswith("transformers_modules.")
torch.save(found, "stranger.pt")
""")
    found = torch.load(world.folder / "stranger.pt")
    for name in FAMILIES:
        assert torch.equal(found[name], here[name]) and torch.equal(found[f"pipe {name}"], here[f"pipe {name}"])
    assert torch.equal(found["plain"], here["pixclip"]) and torch.equal(found["pipe plain"], here["pipe pixclip"])
    for name in ("lora", "merged"):
        torch.testing.assert_close(found[name], here["lora"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pipe lora"], here["pipe lora"], atol=1e-5, rtol=1e-5)


def test_the_snippets_of_the_cards_run_as_published(world):
    for name in ("cloc", "lora"):
        card = world.hub.repositories["model", f"team/{name}"].find("main")[1]["README.md"].decode()
        snippets = re.findall(r"```python\n(.*?)```", card, flags=re.S)
        assert len(snippets) == 3
        world.stranger.run("\n".join([*snippets, "assert len(regions) == 2 and features.shape == (1, 1, 16)"]))
    card = world.hub.repositories["dataset", "team/vesl"].find("main")[1]["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert world.stranger.run(f"{snippet}\nprint(len(records))").splitlines()[-1] == "6"


def test_with_the_package_nobody_has_to_trust_code(world):
    printed = world.author.run("""
for task in ("region-feature-extraction", "zero-shot-region-classification"):
    for name in ("cloc", "pixclip"):
        pipe = pipeline(task, model=f"team/{name}", device="cpu")
        print("parts", *(type(part).__module__ for part in (pipe, pipe.model, pipe.processor)))
""")
    parts = [line.split()[1:] for line in printed.splitlines() if line.startswith("parts ")]
    assert len(parts) == 4 and all(part.startswith("pixclip_hf.") for line in parts for part in line)


def test_dataset_of_two_shards(world):
    files = world.hub.repositories["dataset", "team/vesl"].find("main")[1]
    assert sorted(name for name in files if name.endswith("parquet")) == [
        f"train-0000{index}-of-00002.parquet" for index in range(2)
    ]
    world.author.run("""
from pixclip_hf.data.sources import load_records
records = load_records("team/vesl", "train")
json.dump([[region["caption"] for region in record["regions"]] for record in records], open("captions.json", "w"))
""")
    expected = [[region["caption"] for region in record["regions"]] for record in scenes_dataset(6, size=32)]
    assert json.loads((world.folder / "captions.json").read_text()) == expected


def test_revisions_cache_and_offline(world, here):
    pinned = ["main", "next", world.commits["old"], world.commits["next"]]
    world.stranger.run(f"""
found = {{name: outputs("team/moving", revision=name, trust_remote_code=True) for name in {pinned}}}
found["cache"] = outputs("team/moving", revision={world.commits["old"]!r}, trust_remote_code=True, cache_dir="cache")
torch.save(found, "revisions.pt")
""")
    found = torch.load(world.folder / "revisions.pt")
    assert (world.folder / "cache" / "models--team--moving" / "snapshots" / world.commits["old"]).is_dir()
    old, following = found[world.commits["old"]], found["next"]
    assert torch.equal(old, here["cloc"]) and torch.equal(found["cache"], old)
    assert torch.equal(following, found[world.commits["next"]])
    different = (old, following, found["main"])
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])

    requests = len(world.hub.requests)
    with running_process(world.folder, **world.settings, HF_HUB_OFFLINE="1") as offline:
        offline.run(
            LOAD
            + f"""
found = {{name: outputs("team/moving", revision=name, trust_remote_code=True) for name in {pinned}}}
found["cache"] = outputs("team/moving", revision={world.commits["old"]!r}, trust_remote_code=True, cache_dir="cache")
torch.save(found, "offline.pt")
classify = pipeline("zero-shot-region-classification", model="team/cloc", trust_remote_code=True, device="cpu")
assert len(classify("image.jpg", boxes=[[0, 0, 9, 9]], candidate_labels=["dark", "bright"])) == 1
"""
        )
    again = torch.load(world.folder / "offline.pt")
    assert all(torch.equal(again[name], value) for name, value in found.items())
    assert len(world.hub.requests) == requests


def test_the_hubs_own_errors(world):
    world.hub.repositories["model", "team/merged"].gated = True
    try:
        pulls = world.stranger.run("""
options = {"trust_remote_code": True, "cache_dir": "fresh"}
print("error", error_of(AutoModel.from_pretrained, "team/absent", token="hf_right", **options))
print("error", error_of(AutoModel.from_pretrained, "team/merged", **options))
print("error", error_of(AutoModel.from_pretrained, "team/pixclip", **options))
print("error", error_of(AutoModel.from_pretrained, "team/cloc", token="hf_wrong", **options))
print("error", error_of(AutoModel.from_pretrained, "team/cloc", revision="absent", **options))
""")
    finally:
        world.hub.repositories["model", "team/merged"].gated = False
    absent, gated, private, wrong, revision = re.findall("^error (.*)", pulls, flags=re.M)
    assert "team/absent is not a local folder" in absent and "RepositoryNotFoundError: 404" in absent
    assert "gated repo" in gated and "GatedRepoError: 401" in gated
    assert "private" in private and "RepositoryNotFoundError: 401" in private
    assert "HfHubHTTPError: Client error '401 Unauthorized'" in wrong and "team/cloc" in wrong
    assert "'absent'" in revision or "absent is not a valid git identifier" in revision
    pushes = world.author.run("""
print("error", error_of(pixclip_hf.publish, model, processor, "team/cloc", token="hf_wrong"))
print("error", error_of(pixclip_hf.publish, model, processor, "team/new", token=False))
print("error", error_of(pixclip_hf.publish, model, processor, "team/new", license="no license"))
""")
    wrong, nobody, license = re.findall("^error (.*)", pushes, flags=re.M)
    assert wrong.startswith("HfHubHTTPError") and "401" in wrong and "Invalid credentials" in wrong
    assert "401" in nobody and '"license" must be one of' in license
    assert list(world.hub.repositories["model", "team/new"].find("main")[1]) == [".gitattributes"]


@pytest.mark.parametrize("broken", ["/blob/", "/commit/"])
def test_an_interrupted_push_leaves_the_earlier_revision(broken, world, here):
    repository = world.hub.repositories["model", "team/merged"]
    before, blobs = dict(repository.branches), len(world.hub.blobs)
    world.hub.broken = broken
    try:
        with pytest.raises(Failed, match="the connection broke"):
            world.author.run("disturb(model)\npixclip_hf.publish(model, processor, 'team/merged')")
    finally:
        world.hub.broken = None
    assert repository.branches == before
    # The weights of the second one had arrived.
    assert (len(world.hub.blobs) > blobs) == (broken == "/commit/")
    place = f"cache{broken.replace('/', '-')}"
    world.stranger.run(
        f"torch.save(outputs('team/merged', trust_remote_code=True, cache_dir={place!r}), 'interrupted.pt')"
    )
    found = torch.load(world.folder / "interrupted.pt")
    torch.testing.assert_close(found, here["lora"], atol=1e-5, rtol=1e-5)


def test_a_dry_run_writes_the_folder_only(world):
    requests = len(world.hub.requests)
    arguments = ["--model", "runs/demo/pixclip", "--repo_id", "team/dry", "--dry_run", "--license", "mit"]
    world.author.run(f"main({arguments})")
    written = world.folder / "runs/publish/team/dry"
    pushed = world.hub.repositories["model", "team/pixclip"].find("main")[1].keys() - {".gitattributes"}
    assert {path.name for path in written.iterdir()} == pushed
    assert "license: mit" in (written / "README.md").read_text()
    assert len(world.hub.requests) == requests
    arguments += ["--output_dir", "runs/other", "--evaluation_folder", "runs/none"]
    with pytest.raises(Failed, match="`evaluation_folder` must hold results.json, got 'runs/none'"):
        world.author.run(f"main({arguments})")


def test_the_snippets_of_the_readme_and_the_guide(world):
    """Those on publishing; tests/test_readme.py runs the others."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Publish and load\n.*?^## ", readme, flags=re.S | re.M)[0]
    guide = (ROOT / "docs" / "publish.md").read_text()
    world.author.run("pixclip_hf.save_records(pixclip_hf.scenes_dataset(4, size=32), 'my-regions')")
    for text, count in ((section, 1), (guide, 3)):
        snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
        assert len(snippets) == count
        world.author.run("\n".join(snippets))
        assert world.hub.repositories["model", "org/cloc"].private
    pushed = world.hub.repositories["dataset", "org/my-regions"].find("main")[1]
    assert {"README.md", "samples.png"} <= pushed.keys() and any(name.endswith(".parquet") for name in pushed)
    # tests/hub/test_space.py runs those that make a Space.
    commands = re.findall(r"^pixclip-hf publish (?!.*--space)(.*)", guide, flags=re.M)
    assert len(commands) == 3
    for command in commands:
        arguments = command.split("#")[0].split()
        folder = arguments[arguments.index("--model") + 1]
        arguments[arguments.index("--model") + 1] = {"runs/lora": "lora"}.get(folder, folder)
        world.author.run(f"main({arguments})")
    assert "adapter_config.json" in world.hub.repositories["model", "org/cloc-lora"].find("main")[1]
    assert "handler.py" in world.hub.repositories["model", "org/cloc"].find("main")[1]
