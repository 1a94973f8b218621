"""What leaves the machine: own files without links, names without paths, texts without markup, nothing secret."""

import io
import json
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import TrainingArguments

from pixclip_hf import cards, hub, outgoing, save_records
from pixclip_hf.annotation.stages import add_step
from pixclip_hf.evaluation.report import Result, markdown_table, write_results
from pixclip_hf.scenes.dataset import make_scene
from pixclip_hf.training import RegionTrainer
from pixclip_hf.training import command as training

TOKEN = "hf_" + "aB3" * 11
SECRET_TEXTS = (
    TOKEN,
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----",
    "sk-proj-" + "a1" * 20,
    "ghp_" + "a1" * 18,
    "AKIA" + "A1" * 8,
    "AIza" + "a" * 35,
    "xoxb-12345678901",
    "https://me:word@host/x",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
)
ATTACK = 'x"<img src=x onerror=alert(1)> [a](http://evil.example) www.evil.example a@b.example | c\n\n---\nlicense: mit\n# `b`'  # fmt: skip  # noqa: E501


class Hub:
    """As much of `HfApi` as a push needs; `commits` keeps what was asked for."""

    def __init__(self, present=()):
        self.files, self.commits = dict(present), []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def list_repo_files(self, repo_id, **options):
        return list(self.files)

    def hf_hub_download(self, repo_id, name, local_dir, **options):
        if name not in self.files:
            raise EntryNotFoundError(name)
        Path(local_dir, name).write_bytes(self.files[name])
        return str(Path(local_dir, name))

    def create_commit(self, repo_id, operations, **options):
        self.commits.append(operations)
        for operation in operations:
            if isinstance(operation, hub.CommitOperationDelete):
                del self.files[operation.path_in_repo]
            else:
                content = operation.path_or_fileobj
                self.files[operation.path_in_repo] = (
                    content if isinstance(content, bytes) else Path(content).read_bytes()
                )
        return SimpleNamespace(commit_url="", oid="")


@pytest.fixture
def server(monkeypatch):
    found = Hub({".gitattributes": b"", "train.py": b"theirs", "other_config/x.parquet": b"theirs", "notes.txt": b""})
    monkeypatch.setattr(hub, "HfApi", found)
    return found


@pytest.fixture
def shards(tmp_path):
    save_records([make_scene(index, size=32) for index in range(4)], tmp_path / "shards", max_shard_rows=2)
    return tmp_path / "shards"


THEIRS = {".gitattributes", "train.py", "other_config/x.parquet", "notes.txt"}


def test_a_push_deletes_only_what_an_earlier_one_wrote(server, shards, tiny_cloc):
    hub.publish_dataset(shards, "org/x", "vesl")
    names = {"train-00000.parquet", "train-00001.parquet", "README.md", "samples.png", hub.PUSHED}
    assert server.files.keys() == THEIRS | names
    (shards / "train-00001.parquet").unlink()
    hub.publish_dataset(shards, "org/x", "vesl")
    assert server.files.keys() == THEIRS | names - {"train-00001.parquet"}
    assert set(json.loads(server.files[hub.PUSHED])["files"]) == names - {"train-00001.parquet"}
    assert server.files["train.py"] == b"theirs"


def test_shards_of_others_are_not_mixed_in_and_not_deleted(server, shards):
    server.files["train-00007.parquet"] = b"theirs"
    with pytest.raises(ValueError, match="'org/x' holds 'train-00007.parquet', which this package did not write"):
        hub.publish_dataset(shards, "org/x", "vesl")
    assert not server.commits


def test_a_model_over_a_push_of_an_earlier_version(server, tiny_cloc):
    """It left no list: weights and our own code are known by their names."""
    server.files |= dict.fromkeys(("adapter_model.safetensors", "adapter_config.json", "modeling_cloc.py"), b"")
    server.files |= dict.fromkeys(("mine.safetensors", "config.yaml", "sub/model.safetensors"), b"")
    hub.publish(*tiny_cloc, "org/x")
    assert {"mine.safetensors", "config.yaml", "sub/model.safetensors", "train.py"} < server.files.keys()
    assert not {"adapter_model.safetensors", "adapter_config.json"} & server.files.keys()
    assert server.files["modeling_cloc.py"]
    server.files["mine.py"] = b"since then"
    hub.publish(*tiny_cloc, "org/x")
    assert "mine.py" in server.files and "model.safetensors" in server.files


def evaluation(folder, pictures=()):
    folder.mkdir()
    write_results(folder, "org/x", [Result("referring", "refcoco", "boxes", {"accuracy": 0.5})], pictures)
    return folder


@pytest.mark.parametrize("name", ("../../x/.profile", "/etc/hostname", "a/../../b.png", "..", "", "C:\\x.png", 3))
def test_a_picture_elsewhere_is_refused(name, tiny_cloc, tmp_path):
    place = evaluation(tmp_path / "evaluation")
    content = json.loads((place / "results.json").read_text()) | {"pictures": [name]}
    (place / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"A picture of `results.json` must be the name of a file without a folder"):
        hub.write_folder(*tiny_cloc, tmp_path / "out", "org/x", evaluation_folder=place)
    assert not (tmp_path / "x").exists() and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "name", ("modeling_cloc.py", "config.json", "model.safetensors", "README.md", "a.html", "<b>.png")
)
def test_a_picture_takes_the_place_of_no_other_file(name, tiny_cloc, tmp_path):
    """Whatever a report calls one."""
    place = evaluation(tmp_path / "evaluation", [name])
    (place / name).write_text("print('run')")
    with pytest.raises(ValueError, match="A picture of `results.json` must have a name of letters"):
        hub.write_folder(*tiny_cloc, tmp_path / "out", "org/x", evaluation_folder=place)


@pytest.mark.parametrize("name", ("a-regions.png", "results.json", "results.md", "report.md"))
def test_a_link_is_not_followed(name, tiny_cloc, tmp_path):
    place = evaluation(tmp_path / "evaluation", ["a-regions.png"])
    Image.new("RGB", (4, 4)).save(place / "a-regions.png")
    (place / "report.md").write_text("text")
    (place / name).rename(tmp_path / "secret")
    (place / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="a link, which is not followed"):
        hub.write_folder(*tiny_cloc, tmp_path / "out", "org/x", evaluation_folder=place, run_folder=place)


@pytest.mark.parametrize("folder", (False, True))
def test_a_link_among_shards_is_not_followed(folder, server, shards, tmp_path):
    if folder:
        (shards / "data").symlink_to(tmp_path / "elsewhere")
        shards.rename(tmp_path / "moved")
        (tmp_path / "moved" / "train-00000.parquet").rename(tmp_path / "one.parquet")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "one.parquet").rename(tmp_path / "elsewhere" / "train-00000.parquet")
        shards = tmp_path / "moved"
    else:
        (shards / "train-00001.parquet").rename(tmp_path / "x")
        (shards / "train-00001.parquet").symlink_to(tmp_path / "x")
    with pytest.raises(ValueError, match="Links are not published"):
        hub.publish_dataset(shards, "org/x", "vesl")
    assert not server.commits


def photograph():
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0132] = "2026:11:01 10:00:00"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_no_photograph_says_where_it_was_taken(server, shards, tmp_path, tiny_cloc):
    """Records are stored as pixels alone; shards that others wrote, and pictures of a report, are looked at."""
    path = shards / "train-00000.parquet"
    rows = pq.read_table(path)
    records = rows.to_pylist()
    for record in records:
        record["image"]["bytes"] = photograph()
    pq.write_table(type(rows).from_pylist(records, rows.schema), path)
    with pytest.raises(ValueError, match="'train-00000.parquet' is not pushed: one of its images holds more than its"):
        hub.publish_dataset(shards, "org/x", "vesl")
    assert not server.commits
    (made,) = save_records(records, tmp_path / "again")
    stored = pq.read_table(made)["image"].to_pylist()
    assert all(not Image.open(io.BytesIO(cell["bytes"])).getexif() for cell in stored)
    place = evaluation(tmp_path / "evaluation", ["a.jpg"])
    (place / "a.jpg").write_bytes(photograph())
    folder = hub.write_folder(*tiny_cloc, tmp_path / "out", "org/x", evaluation_folder=place)
    assert not Image.open(folder / "a.jpg").getexif()


def with_column(path, **columns):
    """A shard with further columns, and notes in its schema."""
    table = pq.read_table(path)
    notes = columns.pop("notes", None)
    for name, values in columns.items():
        table = table.append_column(name, values if len(values) == len(table) else pa.array([values] * len(table)))
    pq.write_table(table if notes is None else table.replace_schema_metadata(notes), path)


PLACES = {
    "a category": {"by": pa.array([TOKEN, "a"]).dictionary_encode()},
    "a large text": {"by": pa.array([TOKEN, "a"], pa.large_string())},
    "a pair": {"by": pa.array([[TOKEN, "b"]] * 2, pa.list_(pa.string(), 2))},
    "a map": {"by": pa.array([[("a", TOKEN)]] * 2, pa.map_(pa.string(), pa.string()))},
    "a list of categories": {"by": pa.array([[{"counts": TOKEN}]] * 2)},
    "JSON": {"by": pa.array([f'"{TOKEN}"', "1"], pa.json_())},
    "the name of a column": {TOKEN: pa.array([1, 2])},
    "a note of the schema": {"notes": {"made by": TOKEN}},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_found_anywhere_in_a_shard(place, shards, server):
    with_column(shards / "train-00000.parquet", **PLACES[place])
    with pytest.raises(ValueError, match="'train-00000.parquet' is not pushed: its .* holds a token of Hugging Face"):
        hub.publish_dataset(shards, "org/x", "vesl")
    assert not server.commits


IMAGES = {
    "bytes": [photograph()] * 2,
    "a list": [[photograph()]] * 2,
    "large": pa.array([photograph()] * 2, pa.large_binary()),
    "a second image": [{"bytes": photograph(), "path": "a.jpg"}] * 2,
    "several": [[{"bytes": photograph(), "path": None}]] * 2,
    "none": [b"heic, which nobody here can read"] * 2,
}


@pytest.mark.parametrize("form", IMAGES)
def test_a_photograph_is_found_anywhere_in_a_shard(form, shards, server):
    with_column(shards / "train-00000.parquet", more=pa.array(IMAGES[form]))
    with pytest.raises(ValueError, match="'train-00000.parquet' is not pushed: (one of its images|it holds bytes)"):
        hub.publish_dataset(shards, "org/x", "vesl")
    assert not server.commits


@pytest.mark.parametrize("start", ("sk-", "eyJ-", "eyJaaaaaaaa.", "a.", "a-", "x://a:", "-----BEGIN ", "ghp_", "/a"))
def test_texts_are_looked_through_in_proportion_to_their_length(start):
    began = time.process_time()
    assert outgoing.find_secret(start * (100_000 // len(start))) is None
    outgoing.public_text(start * (100_000 // len(start)))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("secret", SECRET_TEXTS)
def test_secrets_are_found(secret):
    assert outgoing.find_secret(f"a text with {secret}, and more") is not None
    for harmless in ("a mask of a disk-shaped lid", "https://huggingface.co/a/b", "hf_hub_download", "eyJ", "a@b.c"):
        assert outgoing.find_secret(harmless) is None


def test_a_secret_is_not_pushed(server, shards, tiny_cloc, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.md").write_text(f"made with {TOKEN}")
    with pytest.raises(ValueError, match="'report.md' is not pushed: it holds a token of Hugging Face") as error:
        hub.publish(*tiny_cloc, "org/x", run_folder=run)
    assert TOKEN not in str(error.value)
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    (run / "report.md").write_text("correct horse battery staple")
    with pytest.raises(ValueError, match="the value of SOME_API_KEY"):
        hub.publish(*tiny_cloc, "org/x", run_folder=run)
    scene = make_scene(0, size=32)
    scene["regions"][0]["caption"] = f"a note that says {TOKEN}"
    save_records([scene], tmp_path / "secret")
    with pytest.raises(ValueError, match="'train-00000.parquet' is not pushed: its column 'regions' holds a token"):
        hub.publish_dataset(tmp_path / "secret", "org/x", "vesl")
    assert not server.commits


def test_the_name_of_this_machine_and_of_its_user_are_not_pushed(server, tiny_cloc, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "workstation-17")
    run = tmp_path / "run"
    run.mkdir()
    for text, what in (("on workstation-17.", "the name of this machine"), (f"in {Path.home()}", "the home folder")):
        (run / "report.md").write_text(text)
        with pytest.raises(ValueError, match=what):
            hub.publish(*tiny_cloc, "org/x", run_folder=run)
    (run / "report.md").write_text(f"written to {Path.home()}/runs/x and /data/other/y.json")
    hub.publish(*tiny_cloc, "org/x", run_folder=run)
    assert server.files["report.md"] == b"written to x and y.json"


def texts(folder):
    return {
        path.name: path.read_text()
        for path in Path(folder).rglob("*")
        if path.suffix in (".json", ".md") and path.name != "tokenizer.json"
    }


def test_no_path_of_this_machine_is_in_what_is_written(tiny_cloc, tmp_path):
    model, processor = tiny_cloc
    model.config.text_model_name = str(tmp_path / "llm")
    place = tmp_path / "evaluation"
    place.mkdir()
    results = [Result("referring", f"coco annotations={tmp_path}/a.json", f"boxes of {tmp_path}/b", {"accuracy": 0.5})]
    write_results(place, str(tmp_path / "run"), results, settings={"view": str(tmp_path / "c")})
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"dataset": str(tmp_path / "d"), "recall": 0.5}))
    folder = hub.write_folder(model, processor, tmp_path / "out", "org/x", run_folder=run, evaluation_folder=place)
    found = texts(folder)
    assert {"config.json", "README.md", "results.json", "results.md", "metrics.json", hub.PUSHED} <= found.keys()
    assert not [name for name, text in found.items() if str(tmp_path) in text or tmp_path.name in text]
    assert json.loads(found["config.json"])["text_model_name"] == "llm"
    assert json.loads(found["results.json"])["model"] == "run"


def test_a_model_of_no_numbers_is_not_published(tiny_cloc, tmp_path):
    with torch.no_grad():
        next(tiny_cloc[0].parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="`model` must have finite weights, got NaN or infinite values in"):
        hub.write_folder(*tiny_cloc, tmp_path / "out", "org/x")
    assert not (tmp_path / "out").exists()


def test_run_arguments_name_no_folder(tmp_path):
    parser = training.build_parser()
    given = parser.parse_args_into_dataclasses([
        "--output_dir", str(tmp_path / "run"), "--source", "coco", f"annotations={tmp_path}/a.json", "--use_cpu",
        "--vision_model_name_or_path", str(tmp_path / "clip"), "--text_model_name_or_path", "org/llm",
        "--hub_token", TOKEN,
    ])  # fmt: skip
    (tmp_path / "run").mkdir()
    training.save_run_arguments(*given)
    text = (tmp_path / "run" / "run_arguments.json").read_text()
    assert str(tmp_path) not in text and TOKEN not in text
    content = json.loads(text)
    assert content["model"]["vision_model_name_or_path"] == "./clip"
    assert content["model"]["text_model_name_or_path"] == "org/llm"
    assert content["data"]["source"] == ["coco", "annotations=a.json"]


def test_run_arguments_tell_a_folder_from_a_hub_id(tmp_path, monkeypatch):
    """A folder of two parts would read as a Hub id where it does not lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    parser = training.build_parser()
    for given, recorded in (
        ("runs/first", "./first"),
        ("org/first", "org/first"),
        ("runs", "./runs"),
        ("gpt2", "gpt2"),
    ):
        options = ["--output_dir", "runs/first", "--model_name_or_path", given, "--source", given, "--use_cpu"]
        training.save_run_arguments(*parser.parse_args_into_dataclasses(options))
        content = json.loads((tmp_path / "runs" / "first" / "run_arguments.json").read_text())
        assert content["model"]["model_name_or_path"] == recorded
        assert content["data"]["source"] == content["data"]["dataset_name"].split() or "/" not in given
        assert content["data"]["dataset_name"] == (recorded if "/" in given else given)


def test_records_name_no_folder(tmp_path):
    batch = {"steps": [None]}
    add_step(batch, 0, "caption", str(tmp_path / "models" / "vlm"))
    add_step(batch, 0, "detection", "org/detector")
    assert [step["model"] for step in batch["steps"][0]] == ["vlm", "org/detector"]


def test_a_trainer_does_not_push_its_folder(tiny_cloc, tmp_path):
    with pytest.raises(ValueError, match="`push_to_hub` would upload the output folder as it is"):
        RegionTrainer(tiny_cloc[0], TrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True))


def assert_inert(text):
    """No HTML, link or table cell of the attack's is left outside of code."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<img", text) and not re.search(r"(?<!\\)\]\(http://evil", text)
    assert not re.search(r"(?<!\\)://evil", text) and not re.search(r"www\.evil", text)
    assert not re.search(r"(?m)^license: mit|^# `b`|^---\s*$", text)


@pytest.mark.parametrize("kind", cards.DATASET_CARDS)
def test_dataset_cards_show_foreign_text_as_text(kind, shards):
    (shards / "embeddings.json").write_text(json.dumps({"model": ATTACK, "source": ATTACK, "width": ATTACK}))
    card = cards.write_dataset_card(shards, "org/x", kind, sources=[ATTACK], models={ATTACK: ATTACK}).read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, flags=re.S).groups()
    assert_inert(body)
    data = cards.DatasetCard(card).data
    assert data.license is None and not data.source_datasets


def test_model_cards_show_foreign_text_as_text(tiny_cloc, tmp_path):
    model, processor = tiny_cloc
    model.config.text_model_name = ATTACK
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"dataset": ATTACK, ATTACK: 0.5, "split": ATTACK}))
    arguments = {
        "data": {"dataset_name": "scenes", "source": None, "region_text": [ATTACK]},
        "training": {"seed": ATTACK},
    }
    (run / "run_arguments.json").write_text(json.dumps(arguments))
    folder = hub.write_folder(model, processor, tmp_path / "out", f"org/{ATTACK}", run_folder=run)
    card = (folder / "README.md").read_text()
    assert "onerror" in card
    assert_inert(card.split("\n---\n", 1)[1])
    assert cards.ModelCard(card).data.license is None
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.S)[1]
    compile(snippet, "README.md", "exec")


def test_reports_show_foreign_text_as_text(tmp_path):
    result = Result(
        ATTACK, ATTACK, ATTACK, {ATTACK: 0.5}, split=ATTACK, left_out={ATTACK: 1}, notes=[ATTACK], chance={ATTACK: 0.1}
    )
    write_results(tmp_path, ATTACK, [result], settings={"view": ATTACK})
    assert_inert((tmp_path / "results.md").read_text())
    table = markdown_table(["a|b"], [[ATTACK]])
    assert len(table.splitlines()) == 3 and all(
        re.sub(r"\\\|", "", line).count("|") == 2 for line in table.splitlines()
    )
    assert outgoing.plain_markdown("recall@1 of 3 < 5") == "recall@1 of 3 \\< 5"


def test_a_dry_run_lists_what_would_be_pushed(tiny_cloc, tmp_path, capsys):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--repo_id", "org/x", "--dry_run", "--output_dir"]
    hub.main([*arguments, str(tmp_path / "out")])
    printed = capsys.readouterr().out
    listed = set(re.findall(r"^ *[\d,]+  (\S+)$", printed, flags=re.M))
    assert (
        listed == {path.name for path in (tmp_path / "out").iterdir()} and {"model.safetensors", "README.md"} < listed
    )
    (tmp_path / "model" / "report.md").write_text(TOKEN)
    with pytest.raises(ValueError, match="'report.md' is not pushed"):
        hub.main([*arguments, str(tmp_path / "again")])


def test_what_a_dataset_would_push_is_listed(shards, server):
    """Behind `--dry_run` of `annotate` and `embed`."""
    files = hub.dataset_files(shards, "org/x", "vesl")
    assert set(files) == {"train-00000.parquet", "train-00001.parquet", "README.md", "samples.png", hub.PUSHED}
    size = (shards / "train-00000.parquet").stat().st_size
    assert f"{size:>15,}  train-00000.parquet" in outgoing.listing(files).splitlines()
    assert not server.commits
