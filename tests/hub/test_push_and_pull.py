"""Publishing to a Hub on loopback and loading from it, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from hub_server import running_hub
from PIL import Image
from transformers import AutoModel

import pixclip_hf
from pixclip_hf.data.scenes import scenes_dataset
from pixclip_hf.training import add_lora

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = ("CLOC", "PixCLIP")
BLOCKED = "import sys\nsys.modules['pixclip_hf'] = None\n"
LOAD = """
from transformers import AutoModel, AutoProcessor, pipeline
import torch
torch.set_num_threads(1)
def outputs(name, **options):
    model = AutoModel.from_pretrained(name, **options).eval()
    processor = AutoProcessor.from_pretrained(name, **options)
    with torch.no_grad():
        inputs = processor(images="image.png", boxes=[[2, 3, 20, 18]], text=["dark"], return_tensors="pt")
        found = model(**inputs)
    return torch.cat([found.region_embeds[0], found.text_embeds])
"""


def build(family):
    return build_tiny(*(getattr(pixclip_hf, family + part) for part in ("Config", "Model", "Processor")))


class World:
    """A Hub, a folder with models and an image, and processes that know the Hub."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder

    def run(self, code, token=None, fails=False, **environment):
        """Runs `code` beside the models; returns its standard output, or its standard error if it must fail."""
        variables = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        variables |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.folder / "home"),
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_OFFLINE": "0",
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=self.folder
        )
        assert (process.returncode != 0) == fails, process.stderr
        return process.stderr if fails else process.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(folder / "image.png")
    for family in FAMILIES:
        for part in build(family):
            part.save_pretrained(folder / family)
    torch.manual_seed(1)
    adapted = add_lora(AutoModel.from_pretrained(folder / "CLOC"), r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder / "lora")
    build("CLOC")[1].save_pretrained(folder / "lora")
    records = scenes_dataset(6, size=32)
    for index in range(2):
        records.shard(2, index, contiguous=True).to_parquet(folder / f"vesl/train-0000{index}-of-00002.parquet")
    with running_hub() as hub:
        yield World(hub, folder)


@pytest.fixture(scope="module")
def published(world):
    """The world after one process has pushed both models, adapters as such and merged, and a dataset."""
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from publish import main
import pixclip_hf
from pixclip_hf.hub import publish_dataset
from transformers import AutoModel, AutoProcessor
for family in ("CLOC", "PixCLIP"):
    parts = AutoModel.from_pretrained(family), AutoProcessor.from_pretrained(family)
    print(pixclip_hf.publish(*parts, f"org/{{family}}", private=family == "PixCLIP", license="apache-2.0").oid)
main(["--model", "lora", "--repo_id", "org/lora", "--base_model", "org/CLOC"])
main(["--model", "lora", "--repo_id", "org/merged", "--merge"])
publish_dataset("vesl", "org/vesl", "vesl", license="mit", language="en")
"""
    world.commits = world.run(code, token="hf_right").split()[:2]
    return world


def test_a_stranger_with_a_token_loads_everything(published):
    code = (
        BLOCKED
        + LOAD
        + """
result = {name: outputs(f"org/{name}", trust_remote_code=True) for name in ("CLOC", "PixCLIP", "lora", "merged")}
for name in ("CLOC", "PixCLIP", "lora"):
    extract = pipeline("region-feature-extraction", model=f"org/{name}", trust_remote_code=True, device="cpu")
    result[f"pipe {name}"] = extract("image.png", boxes=[[2, 3, 20, 18]], return_tensors=True)
AutoModel.from_pretrained("org/CLOC", trust_remote_code=True).save_pretrained("again")
torch.save(result, "stranger.pt")
"""
    )
    published.run(code, token="hf_right")
    found = torch.load(published.folder / "stranger.pt")
    here = {}
    exec(LOAD, here)
    directory = os.getcwd()
    os.chdir(published.folder)
    try:
        expected = {name: here["outputs"](name) for name in ("CLOC", "PixCLIP", "lora")}
    finally:
        os.chdir(directory)
    for name in FAMILIES:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(found[f"pipe {name}"], expected[name][:1])
    for name in ("lora", "merged"):
        torch.testing.assert_close(found[name], expected["lora"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pipe lora"], expected["lora"][:1], atol=1e-5, rtol=1e-5)
    assert (expected["lora"] - expected["CLOC"]).abs().max() > 1e-3
    # Saved again, the model still has its pipelines, fetched from where it came from.
    assert (published.folder / "again" / "region_feature_extraction.py").is_file()


def test_with_the_package_nobody_has_to_trust_code(published):
    code = """
import pixclip_hf
from transformers import pipeline
for task in ("region-feature-extraction", "zero-shot-region-classification"):
    for name in ("CLOC", "PixCLIP"):
        pipe = pipeline(task, model=f"org/{name}", device="cpu")
        print(type(pipe).__module__, type(pipe.model).__module__, type(pipe.processor).__module__)
"""
    lines = published.run(code, token="hf_right").splitlines()
    assert len(lines) == 4 and all(part.startswith("pixclip_hf.") for line in lines for part in line.split())


def test_what_lies_in_the_repositories(published):
    repositories = published.hub.repositories
    assert repositories["model", "org/PixCLIP"].private and not repositories["model", "org/CLOC"].private
    _, files = repositories["model", "org/CLOC"].find("main")
    assert files.keys() >= {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert b"license: apache-2.0" in files["README.md"]
    _, files = repositories["model", "org/lora"].find("main")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/CLOC"
    assert "model.safetensors" not in files and b"base_model: org/CLOC" in files["README.md"]
    _, files = repositories["model", "org/merged"].find("main")
    assert "adapter_config.json" not in files and b"lora" not in files["README.md"].split(b"---")[1]


def test_dataset_of_two_shards(published):
    code = """
from pixclip_hf.data.readers import load_records
records = load_records("org/vesl", "train")
print(len(records))
for record in records:
    print([region["caption"] for region in record["regions"]])
"""
    lines = published.run(code).splitlines()
    _, files = published.hub.repositories["dataset", "org/vesl"].find("main")
    assert sorted(path for path in files if path.endswith("parquet")) == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    ]  # fmt: skip
    records = scenes_dataset(6, size=32)
    assert lines[0] == "6"
    assert lines[1:] == [str([region["caption"] for region in record["regions"]]) for record in records]


def test_revision_cache_dir_and_offline(published):
    code = (
        LOAD
        + """
import pixclip_hf, os, sys
model, processor = AutoModel.from_pretrained("org/CLOC"), AutoProcessor.from_pretrained("org/CLOC")
first = outputs("org/CLOC", cache_dir="cache")
assert os.path.isdir("cache/models--org--CLOC")
with torch.no_grad():
    model.visual_projection.weight.mul_(-1)
commit = pixclip_hf.publish(model, processor, "org/CLOC", revision="next", token="hf_right")
assert torch.equal(outputs("org/CLOC"), first)
changed = outputs("org/CLOC", revision="next")
assert not torch.equal(changed, first) and torch.equal(outputs("org/CLOC", revision=commit.oid), changed)
assert torch.equal(outputs("org/CLOC", revision=sys.argv[1] if len(sys.argv) > 1 else OID), first)
torch.save([first, changed], "revisions.pt")
"""
    ).replace("sys.argv[1] if len(sys.argv) > 1 else OID", repr(published.commits[0]))
    published.run(code, token="hf_right")
    requests = len(published.hub.requests)
    code = (
        LOAD
        + """
import pixclip_hf
first, changed = torch.load("revisions.pt")
assert torch.equal(outputs("org/CLOC"), first) and torch.equal(outputs("org/CLOC", revision="next"), changed)
assert torch.equal(outputs("org/CLOC", cache_dir="cache"), first)
pipeline("region-feature-extraction", model="org/CLOC", device="cpu")
"""
    )
    published.run(code, HF_HUB_OFFLINE="1")
    assert len(published.hub.requests) == requests


def test_the_hubs_own_errors(published):
    published.hub.repositories["model", "org/CLOC"].gated = True
    code = """
import pixclip_hf, huggingface_hub.errors as errors
from transformers import AutoModel, AutoProcessor
parts = AutoModel.from_pretrained("CLOC"), AutoProcessor.from_pretrained("CLOC")
def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(type(error).__name__ + ": " + " ".join(str(error).split()))
            error = error.__cause__ or error.__context__
        print(" <- ".join(causes))
    else:
        print("no error")
options = {"cache_dir": "fresh"}
error_of(pixclip_hf.publish, *parts, "org/CLOC", token="hf_wrong")
error_of(pixclip_hf.publish, *parts, "org/new")
error_of(AutoModel.from_pretrained, "org/absent", token="hf_right", **options)
error_of(AutoModel.from_pretrained, "org/CLOC", **options)
error_of(AutoModel.from_pretrained, "org/PixCLIP", **options)
error_of(AutoModel.from_pretrained, "org/PixCLIP", token="hf_right", revision="absent", **options)
"""
    try:
        wrong, none, absent, gated, private, revision = published.run(code).splitlines()
    finally:
        published.hub.repositories["model", "org/CLOC"].gated = False
    assert wrong.startswith("HfHubHTTPError") and "Invalid credentials" in wrong and "401" in wrong
    assert "401" in none and "no error" not in none
    assert "org/absent is not a local folder and is not a valid model identifier" in absent
    assert "RepositoryNotFoundError" in absent
    assert "gated repo" in gated and "GatedRepoError" in gated
    assert "RepositoryNotFoundError" in private and "private" in private
    assert "RevisionNotFoundError" in revision and "'absent'" in revision or "absent" in revision


@pytest.mark.parametrize("broken", ["/commit/", "/blob/"])
def test_an_interrupted_push_leaves_the_earlier_revision(published, broken):
    repository = published.hub.repositories["model", "org/merged"]
    before = dict(repository.branches)
    published.hub.broken = broken
    try:
        published.run(
            "import pixclip_hf, torch\n"
            "from transformers import AutoModel, AutoProcessor\n"
            "model, processor = AutoModel.from_pretrained('CLOC'), AutoProcessor.from_pretrained('CLOC')\n"
            "with torch.no_grad(): model.visual_projection.weight.normal_()\n"
            "pixclip_hf.publish(model, processor, 'org/merged', token='hf_right')",
            fails=True,
        )
    finally:
        published.hub.broken = None
    assert repository.branches == before
    published.run(
        "import pixclip_hf\nfrom transformers import pipeline\n"
        "pipe = pipeline('region-feature-extraction', model='org/merged', device='cpu')\n"
        "assert len(pipe('image.png', boxes=[[0, 0, 9, 9]])) == 1"
    )
