"""Publishing to the Hugging Face Hub: a model or a dataset with its card, in one commit."""

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel, AutoProcessor

from .cards import EMBEDDING_SETTINGS, PAGE, dataset_shards, is_hub_id, public_settings, write_card, write_dataset_card
from .command_help import HelpFormatter
from .embedding.folder import check_shard
from .finite import check_finite_weights

DESCRIPTION = """\
Publishes a trained model: weights, configuration, processor, tokenizer, code, and a card filled from its run.

  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --dry_run
  pixclip-hf publish --model runs/demo/cloc --repo_id org/cloc --license apache-2.0 --private

The output of a LoRA run is published as adapters, whose base is on the Hub, or as a whole model:

  pixclip-hf publish --model runs/lora --repo_id org/cloc-lora --base_model org/cloc
  pixclip-hf publish --model runs/lora --repo_id org/cloc-tuned --merge

The token is that of `hf auth login`, or HF_TOKEN.
"""
# What of a run's folder goes along to the Hub.
RUN_FILES = ("metrics.json", "report.md", "regions.png", PAGE)
# Files of an earlier push that would be taken for part of this one, if it has no such file itself.
STALE_FILES = {
    "model": ["*.safetensors", "*.safetensors.index.json", "*.py", "config.json", "adapter_config.json"],
    "dataset": ["*.parquet"],
}


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
            `max_shard_size`, `license`, `language`, `datasets`.

    Returns:
        The commit: `oid` is what `revision=` pins.

    Raises:
        ValueError: as [`write_folder`].
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses. Until the commit, which comes last, readers see
            the earlier revision.
    """
    with TemporaryDirectory() as folder:
        write_folder(model, processor, folder, repo_id, **options)
        paths = Path(folder).rglob("*")
        return _push(Path(folder), paths, repo_id, "model", private, token, revision, commit_message)


def publish_dataset(
    folder: str | PathLike,
    repo_id: str,
    kind: str,
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
        kind, options: as in [`write_dataset_card`].

    Returns:
        The commit.

    Raises:
        ValueError: as [`write_dataset_card`]; or an embedding that is not finite.
        huggingface_hub.errors.HfHubHTTPError: as [`publish`].
    """
    folder = Path(folder)
    paths = [write_dataset_card(folder, repo_id, kind, **options), *dataset_shards(folder)]
    contents = {}
    if kind == "embeddings":
        for shard in dataset_shards(folder):
            check_shard(shard)
        paths.append(folder / EMBEDDING_SETTINGS)
        contents[EMBEDDING_SETTINGS] = (json.dumps(public_settings(folder), indent=1) + "\n").encode("utf-8")
    return _push(folder, paths, repo_id, "dataset", private, token, revision, commit_message, contents)


def _push(
    folder: Path,
    paths: Iterable[Path],
    repo_id: str,
    repo_type: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    contents: Mapping[str, bytes] | None = None,
) -> CommitInfo:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()
    }
    files |= contents or {}
    present = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
    stale = set(filter_repo_objects(present, allow_patterns=STALE_FILES[repo_type])) - files.keys()
    # Not `upload_folder`: it may split a large folder into several commits, and readers would see a part of it.
    return api.create_commit(
        repo_id,
        [CommitOperationDelete(name) for name in sorted(stale)]
        + [CommitOperationAdd(name, path) for name, path in files.items()],
        commit_message=commit_message,
        repo_type=repo_type,
        revision=revision,
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
        card: `license`, `language` and `datasets` of [`write_card`].

    Returns:
        `folder`.

    Raises:
        ValueError: a folder with files in it, a model whose weights are not finite, adapters whose base is a local
            folder, `merge` without adapters, or an evaluation of another model.
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
        for name in RUN_FILES:
            if (source := Path(run_folder, name)).is_file():
                shutil.copyfile(source, folder / name)
    write_card(
        folder,
        repo_id,
        run_folder=run_folder,
        evaluation_folder=evaluation_folder,
        model_type=model.config.model_type,
        base_model=base_model,
        **card,
    )
    if evaluation_folder is not None:
        pictures = json.loads(Path(evaluation_folder, "results.json").read_text(encoding="utf-8"))["pictures"]
        for name in ("results.json", "results.md", *pictures):
            shutil.copyfile(Path(evaluation_folder, name), folder / name)
    return folder


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
        "--model", required=True, help="output folder of a training run, or a folder of save_pretrained"
    )
    parser.add_argument("--repo_id", required=True, help="organization/name on the Hub")
    parser.add_argument("--dry_run", action="store_true", help="write the folder and push nothing")
    parser.add_argument("--output_dir", help="folder of a dry run; runs/publish/<repo_id> by default")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a private repository, if there is none yet"
    )
    parser.add_argument("--revision", help="branch to push to; main by default")
    parser.add_argument("--base_model", help="Hub id of the model that adapters belong to")
    parser.add_argument("--merge", action="store_true", help="add the adapters into the weights")
    parser.add_argument("--license", help="license identifier of the Hub, for the card")
    parser.add_argument("--language", nargs="+", help="language codes, for the card")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the training data; what the run recorded by default")
    parser.add_argument("--evaluation_folder", help="output folder of an evaluation of this model, for the card")
    parser.add_argument("--max_shard_size", default="5GB", help="weights above this size are split into files")
    arguments = parser.parse_args(argv)

    model, processor = load_model(arguments.model)
    names = ("base_model", "merge", "license", "language", "datasets", "evaluation_folder", "max_shard_size")
    options = {name: getattr(arguments, name) for name in names} | {"run_folder": arguments.model}
    if arguments.dry_run:
        folder = arguments.output_dir or Path("runs/publish", arguments.repo_id)
        print(f"written: {write_folder(model, processor, folder, arguments.repo_id, **options)}")
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


__all__ = ["publish", "publish_dataset", "write_card", "write_dataset_card", "write_folder"]
