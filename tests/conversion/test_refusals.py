"""What cannot be converted says why, runs no code, and leaves nothing behind."""

import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conversion_references import build_clip, eva_checkpoint, openai_state
from safetensors.torch import load_file, save_file

from pixclip_hf.conversion import convert as module
from pixclip_hf.conversion.checkpoint import _refuse_overlaps
from pixclip_hf.conversion.command import main
from pixclip_hf.conversion.convert import PLANS, convert

SUFFIXES = (".pt", ".safetensors")


@pytest.fixture(scope="module")
def states():
    """Source -> a state dict of that kind; `visual` is the visual half of an Alpha-CLIP."""
    clip = build_clip()
    alpha = openai_state(clip, mask=True)
    scalars = {"input_resolution": 18, "context_length": 13, "vocab_size": 60}
    return {
        "pixclip": eva_checkpoint(tables=32),
        "alpha-clip": alpha,
        "visual": {name.removeprefix("visual."): t for name, t in alpha.items() if name.startswith("visual.")},
        "clip": openai_state(clip) | {name: torch.tensor(value) for name, value in scalars.items()},
        "open-clip": openai_state(clip),
        "transformers": clip.state_dict(),
        "resnet": {"visual.layer1.0.conv1.weight": torch.zeros(4, 3, 1, 1), "visual.conv1.weight": torch.zeros(1)},
        "something else": {"weight": torch.zeros(3, 3)},
    }


def save(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def refused(source, path, tmp_path, match, error=ValueError, **options):
    """`convert` raises and leaves the folder as it was."""
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        convert(source, path, tmp_path / "out", **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_the_states_themselves_convert(states, tmp_path):
    for source in PLANS:
        report = convert(source, save(states[source], tmp_path / f"{source}.pt"), tmp_path / source)
        assert report["source"] == source and (tmp_path / source / "model.safetensors").is_file()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_files(share, suffix, states, tmp_path):
    path = save(states["clip"], tmp_path / f"model{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused("clip", path, tmp_path, "damaged|neither")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_files_of_the_old_format(share, states, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(states["clip"], path, _use_new_zipfile_serialization=False)
    convert("clip", path, tmp_path / "whole")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused("clip", path, tmp_path, "damaged")


class Attack:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["torch.save", "old torch.save", "pickle"])
def test_code_in_a_pickle_does_not_run(form, states, tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    content = states["clip"] | {"attack": Attack(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["attack"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch.save")
    refused("clip", path, tmp_path, "holds more than tensors, and is not read")
    assert not trace.exists()
    # The attack is one: it works on a reader that lets it.
    if form == "pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)["attack"].close()
    assert trace.exists()


def test_a_torchscript_archive_is_not_run(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    refused("clip", path, tmp_path, "TorchScript.*torch.jit.load")


@pytest.mark.parametrize("source", PLANS)
@pytest.mark.parametrize(
    "given", ["pixclip", "alpha-clip", "visual", "clip", "transformers", "resnet", "something else"]
)
def test_files_of_another_kind(source, given, states, tmp_path):
    if source == given or (source, given) == ("alpha-clip", "visual"):
        return
    path = save(states[given], tmp_path / "model.pt")
    kinds = {"visual": "alpha-clip"}.get(given, given)
    match = f"is no '{source}' checkpoint.*" + (f"convert it as '{kinds}'" if kinds in PLANS else "")
    refused(source, path, tmp_path, match)


CHANGES = {
    "a missing tensor": (lambda state, name: state.pop(name), "missing: .*(from {})"),
    "a tensor left over": (lambda state, name: state.update(extra=torch.zeros(2)), "left over .*: extra"),
    "another shape": (lambda state, name: state.update({name: state[name][1:].clone()}), "of another shape .*{}"),
    "no numbers": (lambda state, name: state[name].view(-1)[0].fill_(float("nan")), "'{}' .* not finite"),
    "integers": (lambda state, name: state.update({name: state[name].int()}), "or type: {} .* int32"),
}
# A tensor of the second block, from which no size is read.
INNER = {
    "pixclip": "visual.blocks.1.attn.proj.weight",
    "alpha-clip": "visual.transformer.resblocks.1.mlp.c_proj.weight",
    "clip": "visual.transformer.resblocks.1.attn.in_proj_weight",
    "open-clip": "transformer.resblocks.0.ln_2.bias",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("source", PLANS)
def test_states_that_do_not_fit(source, change, states, tmp_path):
    state = {name: tensor.clone() for name, tensor in states[source].items()}
    edit, message = CHANGES[change]
    edit(state, INNER[source])
    path = save(state, tmp_path / "model.safetensors")
    refused(source, path, tmp_path, message.replace("(", r"\(").replace(")", r"\)").format(INNER[source]))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pixclip", "visual.pos_embed"),
        ("pixclip", "visual.blocks.0.mlp.w1.weight"),
        ("pixclip", "text.text_adaptor.5.weight"),
        ("clip", "visual.positional_embedding"),
        ("clip", "token_embedding.weight"),
        ("clip", "visual.proj"),
        ("alpha-clip", "positional_embedding"),
        ("open-clip", "transformer.resblocks.0.mlp.c_fc.weight"),
    ],
)
def test_tensors_that_sizes_are_read_from(source, name, states, tmp_path):
    state = dict(states[source])
    tensor = state.pop(name)
    path = save(state, tmp_path / "missing.pt")
    refused(source, path, tmp_path, f"lacks '{name}'")
    state[name] = tensor[None]
    refused(source, save(state, path), tmp_path, f"'{name}' must have {tensor.ndim} dimensions")


def test_sizes_that_contradict_each_other(states, tmp_path):
    path = tmp_path / "model.pt"
    state = dict(states["clip"])
    position = state["visual.positional_embedding"]
    state["visual.positional_embedding"] = position[:-2].clone()
    refused("clip", save(state, path), tmp_path, "square grid, got 8")
    state["visual.positional_embedding"] = position[:5].clone()
    refused("clip", save(state, path), tmp_path, "'input_resolution' of the checkpoint says 18, its weights say 12")
    gap = {name.replace("resblocks.1.", "resblocks.7."): tensor for name, tensor in states["clip"].items()}
    refused("clip", save(gap, path), tmp_path, r"blocks 0, 1, 2, …, got \[0, 2, 7\]")
    save(states["clip"], path)
    refused("clip", path, tmp_path, "`head_width` must divide the tower's width 128, got 48", head_width=48)
    refused("clip", path, tmp_path, "`text_head_width`.*got 0", text_head_width=0)
    patches = dict(states["pixclip"])
    patches["visual.patch_embed.proj.weight"] = torch.zeros(128, 4, 4, 4)
    refused("pixclip", save(patches, path), tmp_path, r"must be \(width, 3, side, side\)")


def test_rotary_tables_of_another_kind(states, tmp_path):
    path = tmp_path / "model.pt"
    refused(
        "pixclip", save(eva_checkpoint(tables=32, rope_grid=14), path), tmp_path, "not the rotary positions of a 3 x 3"
    )
    state = dict(states["pixclip"])
    state["visual.rope.freqs_sin"] = state["visual.rope.freqs_sin"][:-1].clone()
    refused("pixclip", save(state, path), tmp_path, r"freqs_sin' \(8, 32\)")
    save(states["pixclip"], path)
    refused("pixclip", path, tmp_path, "`head_width` must be .* rotary tables, 32, got 64", head_width=64)
    save(eva_checkpoint(), path)
    for wrong in (0, 48):
        refused("pixclip", path, tmp_path, f"`head_width` must divide .* 128, got {wrong}", head_width=wrong)


def test_allowed_names(states, tmp_path):
    state = dict(states["clip"])
    state["extra.one"] = state["extra.two"] = torch.zeros(2)
    weight = state.pop("visual.proj")
    path = save(state | {"visual.proj": weight}, tmp_path / "model.pt")
    refused("clip", path, tmp_path, "left over in the checkpoint: extra.two", allow=["*.one"])
    refused("clip", path, tmp_path, r"`allow` must be a list of patterns, got the text 'e\*'", TypeError, allow="e*")
    report = convert("clip", path, tmp_path / "one", allow=(pattern for pattern in ["extra.*"]))
    assert report["sources"]["extra.one"]["how"] == "left over, allowed" and report["allow"] == ["extra.*"]
    state = dict(states["pixclip"])
    del state["visual.blocks.0.norm1.bias"]
    save(state, path)
    missing = "vision_model.encoder.layers.0.layer_norm1.bias"
    refused("pixclip", path, tmp_path, missing, allow=["visual.*"])
    report = convert("pixclip", path, tmp_path / "two", allow=[missing])
    assert report["targets"][missing]["how"].startswith("missing, allowed")
    assert load_file(tmp_path / "two" / "model.safetensors")[missing].eq(0).all()


def test_files_that_hold_no_state_dict(tmp_path):
    path = tmp_path / "model.pt"
    for content, message in (
        ([torch.zeros(2)], "must hold a state dict"),
        ({}, "must hold a state dict"),
        ({"weight": torch.zeros(2), "name": "x"}, "tensors by name, got 'name': str"),
        ({"weight": torch.zeros(2, dtype=torch.int64)}, "no weights in floating-point numbers"),
    ):
        torch.save(content, path)
        refused("clip", path, tmp_path, message)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    refused("clip", path, tmp_path, "neither a safetensors file nor")
    refused("clip", tmp_path / "absent.pt", tmp_path, "must be a file", FileNotFoundError)
    refused("clip", tmp_path, tmp_path, "must be a file", FileNotFoundError)


def test_arguments(states, tmp_path):
    path = save(states["clip"], tmp_path / "model.pt")
    refused("clips", path, tmp_path, "`source` must be one of")
    refused("clip", path, tmp_path, "`dtype` must be one of", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for output in (tmp_path / "full", path):
        with pytest.raises(ValueError, match="new or empty folder"):
            convert("clip", path, output)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert("clip", path, tmp_path / "empty")
    convert("clip", path, tmp_path / "new" / "deep")
    assert (tmp_path / "empty" / "config.json").is_file() and (tmp_path / "new" / "deep" / "config.json").is_file()


def test_a_failure_while_writing_leaves_nothing(states, tmp_path, monkeypatch):
    path = save(states["clip"], tmp_path / "model.pt")

    def full_disk(*args, **options):
        raise OSError("No space left on device")

    save_pretrained = module.PixCLIPModel.save_pretrained
    monkeypatch.setattr(module.PixCLIPProcessor, "save_pretrained", full_disk)
    refused("clip", path, tmp_path, "No space left", OSError)
    monkeypatch.undo()

    def reads_back_differently(model, folder, **options):
        save_pretrained(model, folder, **options)
        with torch.no_grad():
            model.visual_projection.weight[0, 0] += 1

    monkeypatch.setattr(module.PixCLIPModel, "save_pretrained", reads_back_differently)
    refused("clip", path, tmp_path, "reads back differently: visual_projection.weight", RuntimeError)


def test_the_command_says_what_is_wrong(states, tmp_path, capsys, monkeypatch):
    path = save(states["alpha-clip"], tmp_path / "model.pt")
    assert main(["clip", str(path), "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "convert it as 'alpha-clip'" in err and "Traceback" not in err and not out
    monkeypatch.setattr(sys, "argv", ["pixclip_hf.conversion", "clip", str(path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("pixclip_hf.conversion", run_name="__main__")
    assert end.value.code == 1 and "convert it as 'alpha-clip'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found_by_the_archives_checksums(states, tmp_path):
    """torch.load takes it."""
    path = save(states["clip"], tmp_path / "model.pt")
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    middle = bytes(content).index(zipfile.ZipFile(path).read(largest)) + largest.file_size // 2
    content[middle] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True).keys() == states["clip"].keys()
    refused("clip", path, tmp_path, f"damaged or truncated.*{largest.filename}.* is not what its checksum says")


def test_a_compressed_archive_is_refused(states, tmp_path):
    """Its entries could be of any size."""
    save(states["clip"], tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry), zipfile.ZIP_DEFLATED)
    refused("clip", tmp_path / "packed.pt", tmp_path, "is compressed")


def overlapping(name, state):
    """Two tensors that share a part of their storage."""
    rows = state[name].shape[0]
    both = torch.cat([state[name], state[name][:1]])
    return {name: both[:rows], "other": both[1 : rows + 1]}


KINDS_OF_TENSORS = {
    "a sparse tensor": lambda tensor: tensor.to_sparse(),
    "a sparse tensor ": lambda tensor: tensor.to_sparse_csr(),
    "a meta tensor": lambda tensor: tensor.to("meta"),
    "a nested tensor": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "the type float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "the type complex64": lambda tensor: tensor.to(torch.complex64),
    "a tensor whose elements overlap": lambda tensor: tensor[:1].expand(tensor.shape),
    "the type qint8": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", KINDS_OF_TENSORS)
def test_tensors_that_are_no_weights(kind, states, tmp_path):
    name = "text_projection"
    given = states["clip"] | {name: KINDS_OF_TENSORS[kind](states["clip"][name])}
    path = save(given, tmp_path / "model.pt")
    refused("clip", path, tmp_path, rf"'{name}' of .*{kind.strip()}")


def test_tensors_that_overlap(states, tmp_path):
    path = save(states["clip"] | overlapping("text_projection", states["clip"]), tmp_path / "model.pt")
    refused("clip", path, tmp_path, "'text_projection' and 'other' of .* overlap in memory")
    # Tied weights share all of their memory.
    tied = states["clip"] | {"visual.extra": states["clip"]["text_projection"]}
    convert("clip", save(tied, tmp_path / "tied.pt"), tmp_path / "tied", allow=["visual.extra"])


def test_storages_that_overlap():
    """As those of a mapped file may, whose directory says where each of them lies."""
    content = bytearray(64)
    first, second = (torch.frombuffer(content, dtype=torch.float32, offset=at, count=8) for at in (0, 16))
    with pytest.raises(ValueError, match="'a' and 'b' of 'model.pt' overlap in memory"):
        _refuse_overlaps({"a": first, "b": second}, Path("model.pt"))
    _refuse_overlaps({"a": first[:4], "b": second, "tied": second}, Path("model.pt"))


def test_float8_in_safetensors(states, tmp_path):
    given = states["clip"] | {"text_projection": states["clip"]["text_projection"].to(torch.float8_e4m3fn)}
    refused("clip", save(given, tmp_path / "model.safetensors"), tmp_path, "'text_projection' of .*float8_e4m3fn")
