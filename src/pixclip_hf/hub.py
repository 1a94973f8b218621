"""Publishing to the Hugging Face Hub: a model or a dataset with its card, in one commit."""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import AutoModel, AutoProcessor

from .card_facts import SAMPLES
from .cards import (
    EMBEDDING_SETTINGS,
    PAGE,
    copy_picture,
    dataset_shards,
    public_settings,
    write_card,
    write_dataset_card,
)
from .command_help import HelpFormatter
from .embedding.folder import check_shard
from .finite import check_finite_weights
from .outgoing import check_no_links, check_outgoing, check_outgoing_shard, clean_folder, is_hub_id, listing, own_file
from .space import handler_files, space_files

DESCRIPTION = """\
Publishes a trained model: weights, configuration, processor, tokenizer, code, and a card filled from its run.

  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --dry_run
  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --license apache-2.0 --private

The output of a LoRA run is published as adapters, whose base is on the Hub, or as a whole model:

  pixclip-hf publish --model runs/lora --repo_id org/cloc-lora --base_model org/cloc
  pixclip-hf publish --model runs/lora --repo_id org/cloc-tuned --merge

A Space with the demo of a model, of this push or of an earlier one:

  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --space org/cloc-demo
  pixclip-hf publish --repo_id org/cloc --space org/cloc-demo

With a handler for Inference Endpoints:

  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --handler

The token is that of `hf auth login`, or HF_TOKEN.
"""
# What of a run's folder goes along to the Hub.
RUN_RECORDS, RUN_PICTURES = ("metrics.json", "report.md"), ("regions.png", PAGE)
PUSHED = "pixclip_hf_files.json"
"""Lists the files of a push, so that the next one can tell its own from those of others."""
# Of pushes by versions before 0.2, which left no list: what only a push of a model writes, and would be taken for part
# of the next one. Code that travels has the names of this package's own files.
_EARLIER_FILES = re.compile(
    r"(?:adapter_)?model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_config\.json"
)
_TRAVELING = ("modeling", "processing", "pipelines")


def publish(
    model: Any,
    processor: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model, processor, pipelines and card",
    **options: Any,
) -> CommitInfo:
    """Pushes a model with everything that loading it needs, in one commit.

    Args:
        model: a [`CLOCModel`], a [`PixCLIPModel`], or one of them wrapped by PEFT (`add_lora`).
        processor: its processor.
        repo_id: `"organization/name"`; made if it does not exist.
        private: visibility of a repository that is made; the Hub's default for the owner when None.
        token: token of the Hub, as in transformers; the stored login when None.
        revision: branch to push to, made if it does not exist; `main` when None.
        commit_message: the message of the commit.
        options: the options of [`write_folder`]: `run_folder`, `evaluation_folder`, `base_model`, `merge`,
            `max_shard_size`, `handler`, `license`, `language`, `datasets`.

    Returns:
        The commit: `oid` is what `revision=` pins.

    Raises:
        ValueError: as [`write_folder`], or a secret, a path or the name of this machine in what would be pushed.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses. Until the commit, which comes last, readers see
            the earlier revision.
    """
    with TemporaryDirectory() as folder:
        write_folder(model, processor, folder, repo_id, **options)
        return _push(model_files(folder), repo_id, "model", private, token, revision, commit_message)


def publish_space(
    model: str,
    repo_id: str,
    *,
    model_revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload the demo of a model",
) -> CommitInfo:
    """Pushes a Space that shows a published model with `pixclip_hf.app`, in one commit.

    Args:
        model: Hub id of the model. A Space of a private one needs a token of its own, as its secret `HF_TOKEN`.
        repo_id: `"organization/name"` of the Space; made if it does not exist.
        model_revision: branch, tag or commit of the model; `main` when None.
        private, token, commit_message: as in [`publish`].

    Returns:
        The commit.

    Raises:
        ValueError: as [`space_files`], adapters in place of a whole model, or a secret, a path or the name of this
            machine in what would be pushed.
        huggingface_hub.errors.HfHubHTTPError: no such model, or what the Hub refuses.
    """
    files = _checked(space_files(model, repo_id, model_revision))
    if "adapter_config.json" in HfApi(token=token).list_repo_files(model, revision=model_revision):
        raise ValueError(f"A Space shows a whole model, got adapters in {model!r}: publish them with `merge=True`.")
    return _push(files, repo_id, "space", private, token, None, commit_message)


def publish_dataset(
    folder: str | PathLike,
    repo_id: str,
    kind: str = "records",
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload dataset and card",
    **options: Any,
) -> CommitInfo:
    """Pushes a folder of Parquet shards (records, or embeddings) in one commit, after writing its card into it.

    Args:
        folder: the shards, named `<split>-*.parquet` or below `data/`.
        repo_id, private, token, revision, commit_message: as in [`publish`].
        kind, options: as in [`write_dataset_card`]: by default any dataset in the record schema.

    Returns:
        The commit.

    Raises:
        ValueError: as [`write_dataset_card`]; links among the shards, a secret in what would be pushed, or shards in
            the repository that this package did not write and that would be loaded with it, or an embedding that is
            not finite.
        huggingface_hub.errors.HfHubHTTPError: as [`publish`].
    """
    files = dataset_files(folder, repo_id, kind, **options)
    return _push(files, repo_id, "dataset", private, token, revision, commit_message)


def dataset_files(
    folder: str | PathLike, repo_id: str, kind: str = "records", **options: Any
) -> dict[str, Path | bytes]:
    """What [`publish_dataset`] pushes, by the paths in the repository; writes the card into the folder.

    Args:
        folder, repo_id, kind, options: as there.

    Raises:
        ValueError: as there, before it asks the Hub.
    """
    folder = Path(folder)
    shards = dataset_shards(folder)
    check_no_links(folder, shards)
    for path in shards:
        check_outgoing_shard(path)
    card = write_dataset_card(folder, repo_id, kind, **options)
    pictures = [folder / SAMPLES] if f"]({SAMPLES})" in card.read_text(encoding="utf-8") else []
    files = _by_name(folder, [card, *pictures, *shards])
    if kind == "embeddings":
        for path in shards:
            check_shard(path)
        files[EMBEDDING_SETTINGS] = _json(public_settings(folder))
    return _checked(files)


def model_files(folder: str | PathLike) -> dict[str, Path | bytes]:
    """What [`publish`] pushes of a folder that [`write_folder`] wrote, by the paths in the repository.

    Raises:
        ValueError: a secret, a path or the name of this machine in one of the files.
    """
    return _checked(_by_name(Path(folder), Path(folder).rglob("*")))


def _by_name(folder: Path, paths: Iterable[Path]) -> dict[str, Path | bytes]:
    """Files of a folder by their paths in the repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}


def _checked(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The files of a push with the list of them, when nothing in them must stay here."""
    listed = {**files, PUSHED: _pushed(files)}
    check_outgoing(listed)
    return listed


def _push(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> CommitInfo:
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    present = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=revision))
    stale = (_own_files(api, repo_id, repo_type, revision, present) & present) - files.keys()
    if repo_type == "dataset":
        _refuse_strangers(repo_id, present - stale - files.keys(), files)
    # Not `upload_folder`: it may split a large folder into several commits, and readers would see a part of it.
    return api.create_commit(
        repo_id,
        [CommitOperationDelete(name) for name in sorted(stale)]
        + [CommitOperationAdd(name, path) for name, path in files.items()],
        commit_message=commit_message,
        repo_type=repo_type,
        revision=revision,
    )


def _pushed(files: Iterable[str]) -> bytes:
    """The content of [`PUSHED`] beside these files."""
    return _json({"files": sorted({*files, PUSHED})})


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode("utf-8")


def _own_files(api: HfApi, repo_id: str, repo_type: str, revision: str | None, present: set[str]) -> set[str]:
    """The files of a repository that this package wrote."""
    if PUSHED not in present:
        if repo_type != "model":
            return set()
        code = {path.name for part in _TRAVELING for path in Path(__file__).with_name(part).glob("*.py")}
        return {name for name in present if name in code or _EARLIER_FILES.fullmatch(name)}
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, PUSHED, repo_type=repo_type, revision=revision, local_dir=folder)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name for name in content["files"] if isinstance(name, str)}


def _refuse_strangers(repo_id: str, others: Iterable[str], files: Iterable[str]) -> None:
    """
    Raises:
        ValueError: shards that this package did not write would be loaded together with those of the push.
    """
    shards = {(Path(name).parent, Path(name).name.split("-")[0]) for name in files if name.endswith(".parquet")}
    for name in sorted(others):
        if name.endswith(".parquet") and (Path(name).parent, Path(name).name.split("-")[0]) in shards:
            raise ValueError(
                f"{repo_id!r} holds {name!r}, which this package did not write and which would be loaded with the "
                "shards that are pushed. Delete it there, or push to another repository or `revision`."
            )


def write_folder(
    model: Any,
    processor: Any,
    folder: str | PathLike,
    repo_id: str,
    *,
    run_folder: str | PathLike | None = None,
    evaluation_folder: str | PathLike | None = None,
    base_model: str | None = None,
    merge: bool = False,
    max_shard_size: int | str = "5GB",
    handler: bool = False,
    **card: Any,
) -> Path:
    """Writes what [`publish`] pushes: weights, configuration, processor, tokenizer, code and card.

    Args:
        model, processor: as in [`publish`].
        folder: where to; it must be empty or not exist yet.
        repo_id: the name that the card's snippets load.
        run_folder: output folder of the training; its records fill the card, and `metrics.json`, `report.md` and
            `regions.png` go along.
        evaluation_folder: output folder of an evaluation of the model; its measures join those of the run in the card,
            and `results.json`, `results.md` and the pictures go along.
        base_model: Hub id of the model that adapters belong to; what the adapters name when None. For a whole model
            the one that it was made from, for the card.
        merge: adds LoRA adapters into the weights, those of `model` too, and writes a whole model.
        max_shard_size: weights above it are split into several files.
        handler: adds what an Inference Endpoint serves the model with: `handler.py`, whose requests
            [`pixclip_hf.endpoint.EndpointHandler`] describes, `requirements.txt`, and the package itself.
        card: `license`, `language` and `datasets` of [`write_card`].

    Returns:
        `folder`.

    Raises:
        ValueError: a folder with files in it, adapters whose base is a local folder, `merge` without adapters,
            `handler` with adapters alone, an evaluation of another model, or pictures and records that are links or
            lie elsewhere.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`folder` must be empty or not exist, got {str(folder)!r}, which has files in it.")
    check_finite_weights(model)
    adapters = hasattr(model, "merge_and_unload")
    if getattr(model, "_hf_peft_config_loaded", False) and not adapters:
        raise ValueError(
            "`model` has adapters that transformers put in, which do not leave it again: load its base, and the "
            "adapters with `peft.PeftModel.from_pretrained`."
        )
    if merge and not adapters:
        raise ValueError(f"`merge` needs a model with LoRA adapters, got a {type(model).__name__}.")
    if handler and adapters and not merge:
        raise ValueError("`handler` serves a whole model, got adapters: pass `merge=True` too.")
    if adapters:
        recorded = model.peft_config[model.active_adapter].base_model_name_or_path
        base_model = base_model or (recorded if is_hub_id(recorded) else None)
    if adapters and not merge:
        _save_adapters(model, folder, base_model)
    else:
        model = model.merge_and_unload() if merge else model
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    if run_folder is not None:
        for copy, names in ((_copy_record, RUN_RECORDS), (copy_picture, RUN_PICTURES)):
            for name in names:
                if Path(run_folder, name).exists():
                    copy(run_folder, name, folder)
    write_card(
        folder,
        repo_id,
        run_folder=run_folder,
        evaluation_folder=evaluation_folder,
        model_type=model.config.model_type,
        base_model=base_model,
        handler=handler,
        **card,
    )
    if evaluation_folder is not None:
        pictures = json.loads(Path(evaluation_folder, "results.json").read_text(encoding="utf-8"))["pictures"]
        for name in ("results.json", "results.md"):
            _copy_record(evaluation_folder, name, folder)
        for name in pictures:
            copy_picture(evaluation_folder, name, folder)
    clean_folder(folder)
    if handler:
        _write_files(folder, handler_files())
    (folder / PUSHED).write_bytes(_pushed(_by_name(folder, folder.rglob("*"))))
    return folder


def _write_files(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def _copy_record(source: str | PathLike, name: str, target: Path) -> None:
    shutil.copyfile(own_file(source, name, "A record of a run"), target / name)


def _save_adapters(model: Any, folder: Path, base_model: str | None) -> None:
    """Saves the adapters, which name `base_model` as their base."""
    settings = model.peft_config[model.active_adapter]
    recorded = settings.base_model_name_or_path
    if not is_hub_id(base_model):
        raise ValueError(
            "`base_model` must be the Hub id of the model that the adapters belong to, got "
            f"{base_model or recorded!r}: publish that model first, or pass `merge=True`."
        )
    settings.base_model_name_or_path = base_model
    try:
        model.save_pretrained(folder)
    finally:
        settings.base_model_name_or_path = recorded


def load_model(folder: str | PathLike) -> tuple[Any, Any]:
    """Model and processor of a folder; adapters come wrapped around their base."""
    processor = AutoProcessor.from_pretrained(folder)
    adapters = Path(folder, "adapter_config.json")
    if not adapters.is_file():
        return AutoModel.from_pretrained(folder), processor
    from peft import PeftModel

    base = AutoModel.from_pretrained(json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder), processor


def main(argv: Sequence[str] | None = None) -> None:
    """`pixclip-hf publish`.

    Args:
        argv: arguments of the command line; those of the process when None.

    Raises:
        ValueError: as [`write_folder`].
    """
    parser = argparse.ArgumentParser(prog="pixclip-hf publish", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument(
        "--model",
        help="output folder of a training run, or a folder of save_pretrained; may be left out for a Space of a model "
        "that is on the Hub",
    )
    parser.add_argument("--repo_id", required=True, help="organization/name on the Hub")
    parser.add_argument("--space", help="organization/name of a Space to make with the demo of the model")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, list its files and push nothing")
    parser.add_argument("--output_dir", help="folder of a dry run; runs/publish/<repo_id> by default")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a private repository, if there is none yet"
    )
    parser.add_argument("--revision", help="branch to push to; main by default")
    parser.add_argument("--base_model", help="Hub id of the model that adapters belong to")
    parser.add_argument("--merge", action="store_true", help="add the adapters into the weights")
    parser.add_argument("--handler", action="store_true", help="add the handler that Inference Endpoints call")
    parser.add_argument("--license", help="license identifier of the Hub, for the card")
    parser.add_argument("--language", nargs="+", help="language codes, for the card")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the training data; what the run recorded by default")
    parser.add_argument("--evaluation_folder", help="output folder of an evaluation of this model, for the card")
    parser.add_argument("--max_shard_size", default="5GB", help="weights above this size are split into files")
    arguments = parser.parse_args(argv)

    if arguments.model is None and arguments.space is None:
        parser.error("`--model` is needed, or `--space` for a Space of a model that is on the Hub")
    if arguments.handler and arguments.model is None:
        parser.error("`--handler` goes along with a model: `--model` is needed")
    if arguments.model is not None:
        _publish_model(arguments)
    if arguments.space is None:
        return
    if arguments.dry_run:
        files = _checked(space_files(arguments.repo_id, arguments.space, arguments.revision))
        print(f"to be pushed to the Space, in bytes:\n{listing(files)}")
        return
    commit = publish_space(
        arguments.repo_id, arguments.space, model_revision=arguments.revision, private=arguments.private
    )
    print(f"published: {commit.commit_url}")


def _publish_model(arguments: argparse.Namespace) -> None:
    model, processor = load_model(arguments.model)
    names = (
        "base_model", "merge", "license", "language", "datasets", "evaluation_folder", "max_shard_size", "handler",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names} | {"run_folder": arguments.model}
    if arguments.dry_run:
        folder = arguments.output_dir or Path("runs/publish", arguments.repo_id)
        folder = write_folder(model, processor, folder, arguments.repo_id, **options)
        print(f"written: {folder}\nto be pushed, in bytes:\n{listing(model_files(folder))}")
    else:
        commit = publish(
            model,
            processor,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            **options,
        )
        print(f"published: {commit.commit_url}")


__all__ = ["publish", "publish_dataset", "publish_space", "write_card", "write_dataset_card", "write_folder"]
