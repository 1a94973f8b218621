"""Model and dataset cards, filled from what a run or a dataset recorded."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .card_facts import count_records, data_table, draw_samples, starting_sentence, training_table
from .data.whole_files import whole_file
from .evaluation.report import weights_digest, with_current_names
from .evaluation.tasks import TASKS
from .images import store_image
from .outgoing import (
    is_hub_id,
    last_part,
    markdown_code,
    own_file,
    plain_markdown,
    public_name,
    public_word,
    public_words,
    python_string,
)

# Built distributions carry the templates inside the package, a checkout (and an editable install of it) beside `src`.
_TEMPLATE_FOLDERS = (Path(__file__).with_name("hub_cards"), Path(__file__).parents[2] / "hub_cards")
MODEL_CARDS = ("cloc", "pixclip")
DATASET_CARDS = ("embeddings", "longgrit", "records", "vesl")
_PRETTY_NAMES = {"longgrit": "LongGRIT", "vesl": "VESL"}
# What `pixclip-hf embed` writes beside its shards.
EMBEDDING_SETTINGS = "embeddings.json"
_QUOTED_PATH = re.compile(r"'((?:/|~|\.|[A-Za-z]:)[^']*)'")
# What turns foreign text into Markdown that shows it, for the templates.
_SAFE: dict[str, Any] = {"plain": plain_markdown, "code": markdown_code, "string": python_string}
# Cards show names as they are.
_PICTURE_NAME = re.compile(r"[\w.-]+\.(?:png|jpe?g|webp)", re.ASCII | re.IGNORECASE)
# A page of scenes that the demo draws beside its front picture.
PAGE = "scenes.png"
# Entries of metrics.json that describe the run and not the model.
_RUN_ENTRIES = ("seed", "train_steps", "train_seconds")
# Measures of the towers that the model inherited: another model.
_OF_TOWERS = "towers_"
# Measures that are shares of right decisions.
_ACCURACIES = ("region_description_", "crop_", "same_box", "late_detail", "grounding_accuracy")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def write_card(
    folder: str | PathLike,
    repo_id: str,
    *,
    run_folder: str | PathLike | None = None,
    evaluation_folder: str | PathLike | None = None,
    model_type: str | None = None,
    base_model: str | list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    handler: bool = False,
) -> Path:
    """Writes `README.md`, the model card, from what a run recorded. It leaves out what was not recorded.

    Args:
        folder: a saved model.
        repo_id: the name that the snippets load: a Hub id, or the folder itself.
        run_folder: holds those of `metrics.json`, `all_results.json`, `trainer_state.json` and `run_arguments.json`
            that exist; `folder` when None.
        evaluation_folder: where an evaluation of the finished model wrote `results.json` and its pictures; none when
            None. The first picture of regions is copied into `folder` if the run drew none.
        model_type: `"cloc"` or `"pixclip"`; read from `config.json` when None.
        base_model: Hub ids of what the model was made from; when None, what adapters name as their base, or what
            `run_arguments.json` says.
        datasets: Hub ids of the training data; from `run_arguments.json` when None.
        license, language: for the metadata.
        handler: whether the repository has a handler for Inference Endpoints, see [`pixclip_hf.hub.publish`].

    Returns:
        The path of the card.

    Raises:
        ValueError: an unknown `model_type`, or `results.json` is of another model: its weights are neither those in
            `folder` nor those in `run_folder` or, where weights cannot be compared, its name is none of the three.
        FileNotFoundError: no `results.json` in `evaluation_folder`.
    """
    folder = Path(folder)
    records = Path(run_folder) if run_folder is not None else folder
    config = _read_json(folder / "config.json")
    adapter = _read_json(folder / "adapter_config.json")
    model_type = model_type or config.get("model_type")
    if model_type not in MODEL_CARDS:
        raise ValueError(f"`model_type` must be one of {', '.join(MODEL_CARDS)}, got {model_type!r}.")
    run = _read_json(records / "run_arguments.json")
    made_from, data = run.get("model", {}), run.get("data", {})
    names = [made_from.get(f"{part}model_name_or_path") for part in ("", "vision_", "text_")]
    # What the caller says goes first, unless it is a part of what was recorded.
    start = starting_sentence(made_from) if set(_listed(base_model)) <= set(names) else ""
    if base_model is None:
        if adapter:
            names = [adapter.get("base_model_name_or_path")]
        elif made_from.get("random_weights"):
            names = []
        base_model = list(dict.fromkeys(name for name in names if name is not None and is_hub_id(name))) or None
    if datasets is None and is_hub_id(data.get("dataset_name")):
        datasets = [data["dataset_name"]]
    evaluation: dict[str, Any] = {}
    if evaluation_folder is not None:
        evaluation = _read_evaluation(Path(evaluation_folder), repo_id, (folder, records))
    results = _evaluations(records, data, evaluation)
    name = repo_id.rstrip("/").split("/")[-1]
    fields: dict[str, Any] = {
        "language": language,
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": [model_type, "region-feature-extraction", "zero-shot-region-classification"]
        + (["lora", "peft"] if adapter else []),
        "base_model": base_model,
        "base_model_relation": "adapter" if adapter and base_model else None,
        "datasets": datasets,
    }
    if results:
        fields |= {"eval_results": results, "model_name": name}
    card_data = ModelCardData(**{key: value for key, value in fields.items() if value})
    state = _read_json(records / "trainer_state.json")
    card = ModelCard.from_template(
        card_data,
        template_str=_template(model_type),
        **_SAFE,
        model_name=name,
        repo_id=repo_id,
        base_model=_listed(base_model),
        start=start,
        adapter=adapter,
        has_text=config.get("text_config", True) is not None,
        text_model_name=public_name(config["text_model_name"]) if config.get("text_model_name") else None,
        picture=_picture(folder, evaluation_folder, evaluation.get("pictures", [])),
        page=PAGE if (folder / PAGE).is_file() else None,
        results=results,
        # The measures of the demo; those of a task on scenes have its name in front.
        scenes=any(result.dataset_type == "scenes" and ":" not in (result.metric_name or "") for result in results),
        recorded_by=_recorders(records, evaluation),
        training=training_table(run, state),
        data=data_table(data),
        license=license,
        handler=handler,
    )
    path = folder / "README.md"
    with whole_file(path) as unfinished:
        card.save(unfinished)
    return path


def write_dataset_card(
    folder: str | PathLike,
    repo_id: str,
    kind: str = "records",
    *,
    sources: list[str] | None = None,
    models: Mapping[str, str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    pictured: bool = True,
) -> Path:
    """Writes `README.md`, the dataset card, into a folder of Parquet shards; the counts are those of the shards.

    Args:
        folder: the shards, named `<split>-*.parquet`, there or below `data/`.
        repo_id: the name that the snippet loads.
        kind: `"records"` for any dataset in the record schema, `"longgrit"` or `"vesl"` for what these annotations
            made, or `"embeddings"`.
        sources: where the images come from: Hub ids of datasets, or names.
        models: step of the annotation -> the model that made it.
        license, language: for the metadata.
        pictured: draws samples.png, images with their regions and texts, into the folder; needs the extra `eval`.

    Returns:
        The path of the card.

    Raises:
        ValueError: an unknown `kind`, no Parquet shard, or one that does not hold its images or is not in the record
            schema.
    """
    folder = Path(folder)
    if kind not in DATASET_CARDS:
        raise ValueError(f"`kind` must be one of {', '.join(DATASET_CARDS)}, got {kind!r}.")
    shards = dataset_shards(folder)
    splits = _count_rows(folder, shards)
    rows = sum(split["rows"] for split in splits.values())
    facts: dict[str, Any] = {}
    if kind == "embeddings":
        facts, tags = _embedding_facts(folder), ["clip"]
    else:
        facts = count_records(shards)
        facts["picture"] = draw_samples(folder, shards, rows) if pictured else None
        held = {"masks": "regions with a mask", "long-captions": "regions with a long caption"}
        tags = [tag for tag, name in held.items() if facts["counts"].get(name)]
    fields: dict[str, Any] = {
        "language": language,
        "license": license,
        "pretty_name": _PRETTY_NAMES.get(kind),
        "size_categories": next((size for limit, size in _SIZES if rows < limit), "n>1T"),
        "source_datasets": [name for name in sources or () if is_hub_id(name)],
        # Who annotated a dataset of any other kind, whoever publishes it must say.
        "annotations_creators": None if kind == "records" else "machine-generated",
        "task_categories": ["zero-shot-image-classification", "image-feature-extraction"],
        "tags": [*([] if kind == "records" else [kind]), "regions", *tags],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": split["path"]} for name, split in splits.items()],
            }
        ],
    }
    card = DatasetCard.from_template(
        DatasetCardData(**{key: value for key, value in fields.items() if value}),
        template_str=_template(kind),
        **_SAFE,
        repo_id=repo_id,
        dataset_name=repo_id.rstrip("/").split("/")[-1],
        splits=splits,
        sources=sources,
        models={step: public_name(model) for step, model in (models or {}).items()},
        license=license,
        **facts,
    )
    path = folder / "README.md"
    with whole_file(path) as unfinished:
        card.save(unfinished)
    return path


def _embedding_facts(folder: Path) -> dict[str, Any]:
    """What the card of embeddings says of their model, from the settings of the run."""
    settings = public_settings(folder)
    model = settings.get("model")
    names = ("model", "revision", "weights", "preprocessing", "prompt", "view", "precision", "decoded_sides", "source",
             "items", "regions", "package_version", "format_version")  # fmt: skip
    return {
        "model": model,
        "model_on_hub": is_hub_id(model),
        "kinds": " and ".join(f"{kind}s" for kind in settings.get("kinds", ["region"])),
        "width": settings.get("width"),
        "dtype": settings.get("dtype"),
        "settings": {name: settings[name] for name in names if settings.get(name) is not None},
    }


def public_settings(folder: str | PathLike) -> dict[str, Any]:
    """The settings of a folder of embeddings without the paths of this machine: of each, its last part."""
    settings = _read_json(Path(folder, EMBEDDING_SETTINGS))
    if "model" in settings and not is_hub_id(settings["model"]):
        settings["model"] = last_part(settings["model"])
    if (source := settings.get("source")) is not None:
        words = [public_word(word) for word in ([source] if isinstance(source, str) else source)]
        settings["source"] = words[0] if isinstance(source, str) else words
    if settings.get("regions") is not None:  # the repr of what finds them, which may name a model
        settings["regions"] = _QUOTED_PATH.sub(lambda found: repr(last_part(found[1])), settings["regions"])
    return settings


def _template(name: str) -> str:
    for folder in _TEMPLATE_FOLDERS:
        if (path := folder / f"{name}.md").is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"No card template {name}.md in {' or '.join(map(str, _TEMPLATE_FOLDERS))}.")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _read_evaluation(place: Path, repo_id: str, folders: Iterable[Path]) -> dict[str, Any]:
    """`results.json`, of the model in one of the folders."""
    if not (content := _read_json(place / "results.json")):
        raise FileNotFoundError(f"`evaluation_folder` must hold results.json, got {str(place)!r}.")
    name, weights = content["model"], content.get("settings", {}).get("weights")
    places = {folder.resolve() for folder in folders}
    digests = {weights_digest(folder) for folder in places} - {None} if weights else set()
    if digests:
        same, compared = weights in digests, "by its weights"
    else:
        same = name == repo_id or Path(name).resolve() in places
        compared = "by its name, which is all that can be compared"
    if not same:
        raise ValueError(
            f"`evaluation_folder` must hold results of {repo_id}, got {str(place)!r} with those of {name!r}, another "
            f"model {compared}."
        )
    return content


def _recorders(records: Path, evaluation: Mapping[str, Any]) -> list[str]:
    run = any((records / name).is_file() for name in ("metrics.json", "all_results.json"))
    names = ["the run that made the model"] if run else []
    return names + (["an evaluation of the finished model (`results.json`)"] if evaluation else [])


def _picture(folder: Path, evaluation_folder: str | PathLike | None, drawn: Iterable[str]) -> str | None:
    """The picture of regions that a card shows: that of the run, else the first of the evaluation."""
    if (folder / "regions.png").is_file():
        return "regions.png"
    name = next((name for name in drawn if str(name).endswith("regions.png")), None)
    if evaluation_folder is not None and name is not None and not (folder / name).is_file():
        copy_picture(evaluation_folder, name, folder)
    return name


def copy_picture(source: str | PathLike, name: Any, target: Path) -> None:
    """Copies a picture of a report without what it holds beside its pixels.

    Raises:
        ValueError: its name leads out of the folder or is none of a picture, or it is a link. Weights and code of
            the target would otherwise be replaced by what a report calls a picture.
    """
    path = own_file(source, name, "A picture of `results.json`")
    if not _PICTURE_NAME.fullmatch(name):
        raise ValueError(
            "A picture of `results.json` must have a name of letters, digits, '.', '_' and '-' that ends in .png, "
            f".jpg, .jpeg or .webp, got {name!r}."
        )
    content = path.read_bytes()
    try:
        content, _ = store_image(content)
    except ValueError:
        pass  # no image that anybody can open: it is looked through as a text
    with whole_file(target / name) as unfinished:
        unfinished.write_bytes(content)


def _evaluations(records: Path, data: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The measures of `metrics.json` and `results.json` (evaluations by themselves) and of `all_results.json` (the
    trainer's own).

    A measure whose dataset was not recorded says nothing and is left out; what the evaluation measured again takes the
    place of what the run recorded.
    """
    results = []
    metrics = with_current_names(_read_json(records / "metrics.json"))
    if dataset := public_words(metrics.get("dataset") or ""):
        for key, value in metrics.items():
            hard = key.startswith("hard_")
            measure = key.removeprefix("hard_")
            if _is_measure(measure, value) and measure not in _RUN_ENTRIES and not measure.startswith(_OF_TOWERS):
                setting = "hard" if hard else metrics.get("setting")
                results.append(_evaluation(measure, value, dataset, setting, metrics.get("split")))
    for result in evaluation.get("results", []):
        for key, value in with_current_names(result["metrics"]).items():
            if _is_measure(key, value):
                measure, task = key.removeprefix("hard_"), result["task"]
                setting = "hard" if measure != key else None if task == "scenes" else result["protocol"]
                # The measures of the scenes are named by themselves.
                task = None if task == "scenes" else task
                dataset = public_words(result["dataset"])
                results.append(_evaluation(measure, value, dataset, setting, result["split"], task))
    evaluated = _read_json(records / "all_results.json")
    if trained_on := data.get("dataset_name"):
        name = public_name(trained_on)
        setting = data.get("scenes_setting") if trained_on == "scenes" else None
        split = data.get("eval_split") or ("test" if trained_on == "scenes" else None)
        for key, value in evaluated.items():
            if "_recall@" in key and key.startswith("eval_"):
                results.append(_evaluation(key.removeprefix("eval_"), value, name, setting, split))
    keyed = {(r.metric_name, r.dataset_type, r.dataset_config, r.dataset_split): r for r in results}
    return list(keyed.values())


def _is_measure(key: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and not key.endswith("_count")


def _evaluation(
    measure: str, value: float, dataset: str, setting: str | None, split: str | None, task: str | None = None
) -> EvalResult:
    name, at, rank = measure.partition("_recall@")
    metric_name = f"{name.replace('_', ' ')} recall@{rank}" if at else measure.replace("_", " ")
    own_type = "image-feature-extraction" if at else "zero-shot-image-classification"
    return EvalResult(
        task_type=TASKS[task].hub_task if task else own_type,
        dataset_type=dataset,
        dataset_name=f"{dataset} ({setting})" if setting else dataset,
        dataset_config=setting,
        dataset_split=split,
        metric_type=f"recall@{rank}" if at else "accuracy" if measure.startswith(_ACCURACIES) else measure,
        metric_name=f"{task}: {metric_name}" if task else metric_name,
        metric_value=round(float(value), 4),
    )


def dataset_shards(folder: str | PathLike) -> list[Path]:
    """The Parquet files there and below `data/`; other folders may hold tables of other kinds."""
    return sorted([*Path(folder).glob("*.parquet"), *Path(folder, "data").rglob("*.parquet")])


def _count_rows(folder: Path, shards: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Split -> `{"rows", "shards", "path"}`, from the footers of the Parquet files."""
    # Comes with the `data` extra; cards of models do without.
    from pyarrow.parquet import read_metadata

    from .data.parquet_shards import check_images

    splits: dict[str, dict[str, Any]] = {}
    for path in shards:
        check_images(path)
        name = path.stem.split("-")[0]
        place = path.parent.relative_to(folder)
        split = splits.setdefault(name, {"rows": 0, "shards": 0, "path": (place / f"{name}-*.parquet").as_posix()})
        split["rows"] += read_metadata(path).num_rows
        split["shards"] += 1
    if not splits:
        raise ValueError(f"`folder` must hold Parquet shards named <split>-*.parquet, got none in {str(folder)!r}.")
    return splits


__all__ = ["is_hub_id", "write_card", "write_dataset_card"]
