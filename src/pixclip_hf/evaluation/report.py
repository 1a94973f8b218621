"""Measures as markdown tables and as JSON."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..data.whole_files import write_json, write_utf8
from ..outgoing import markdown_code, plain_markdown
from ..tensor_digest import add_tensor


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent decisions."""
    return math.sqrt(share * (1 - share) / count) if count else float("nan")


def share(metrics: Mapping[str, float], name: str, count: str) -> str:
    """`82.1 ± 0.9 % of 1812`: the measure `name`, of as many decisions as `metrics[count]` says."""
    value, number = metrics[name], int(metrics[count])
    return f"{100 * value:.1f} ± {100 * standard_error(value, number):.1f} % of {number}"


def with_current_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Measures read from a file, under the names that they have today.

    Versions before 0.2 wrote `region_description_colour` (and `hard_…`, `towers_…` and `crop_…` alike) for what is now
    `region_description_color`. All other entries are returned as they are.
    """
    return {name.replace("_description_colour", "_description_color"): value for name, value in metrics.items()}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table; what its cells hold is shown as text."""
    header = list(header)
    lines = [list(map(plain_markdown, line)) for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Result:
    """What one task measured.

    Args:
        task: as on the command line.
        dataset: its name.
        protocol: name of the protocol.
        metrics: shares between 0 and 1, ranks from 1 on, and `*_count`, how many decisions they are of.
        intervals: 95 % bootstrap intervals of some of the metrics.
        split: the split of the dataset.
        left_out: why regions or images were left out, and how many.
        notes: what a reader of the figures must know.
        chance: what guessing gives, of some of the metrics.
    """

    task: str
    dataset: str
    protocol: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    split: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)


def weights_digest(folder: str | Path) -> str | None:
    """Hash of the weights of a saved model, however many files they are split into; None without safetensors files."""
    tensors = []
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():
                digest = hashlib.sha256()
                add_tensor(digest, name, weights.get_tensor(name))
                tensors.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:32] if tensors else None


def refuse_other_model(folder: str | Path, model: str) -> None:
    """
    Raises:
        ValueError: `folder` holds the `results.json` of another model, which would be lost.
    """
    path = Path(folder, "results.json")
    found = json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else model
    if found != model and Path(found).resolve() != Path(model).resolve():
        raise ValueError(f"{path} holds the results of {found!r}, not of {model!r}: choose another output folder.")


def write_results(
    folder: str | Path,
    model: str,
    results: Iterable[Result],
    pictures: Iterable[str] = (),
    settings: Mapping[str, object] | None = None,
) -> None:
    """`results.json`, which model cards are filled from, and `results.md`, with one table per task.

    Args:
        folder: made if it does not exist.
        model: name of the model.
        results: the results of the tasks.
        pictures: files in the folder that `results.md` shows.
        settings: what beside model and data decides the measures. The measures of a `scenes` result stand beside them
            in `results.json`, by the names that `metrics.json` of the demo has.
    """
    folder, results, pictures = Path(folder), list(results), list(pictures)
    folder.mkdir(parents=True, exist_ok=True)
    flat: dict[str, object] = {}
    for result in results:
        if result.task == "scenes":
            flat = {"dataset": result.dataset, "split": result.split, **result.metrics}
    content = {
        "model": model,
        "settings": dict(settings or {}),
        **flat,
        "results": [asdict(result) for result in results],
        "pictures": pictures,
    }
    write_json(folder / "results.json", _plain(content))
    sections = [f"# Evaluation of {plain_markdown(model)}\n"]
    if settings:
        named = [f"{name} {value}" for name, value in settings.items() if value is not None]
        sections.append(f"Settings: {plain_markdown(', '.join(named))}.\n")
    sections.append("Intervals: 95 %, over images. Chance: what guessing gives.\n")
    for result in results:
        title = plain_markdown(f"{result.task}: {result.dataset}" + (f", {result.split}" if result.split else ""))
        header = ["measure", "value", "95 % interval"] + ["chance"] * bool(result.chance)
        rows = [
            [name.replace("_", " "), _shown(name, value), _interval(name, result.intervals.get(name))]
            + [_shown(name, result.chance[name]) if name in result.chance else ""] * bool(result.chance)
            for name, value in result.metrics.items()
        ]
        sections += [
            f"## {title}\n",
            f"Protocol: `{markdown_code(result.protocol)}`.\n",
            markdown_table(header, rows) + "\n",
        ]
        if result.left_out:
            left_out = ", ".join(f"{n} {why}" for why, n in result.left_out.items())
            sections.append(f"Left out: {plain_markdown(left_out)}.\n")
        sections += [f"{plain_markdown(note)}\n" for note in result.notes]
    sections += [f"![{Path(name).stem}]({name})\n" for name in pictures]
    write_utf8(folder / "results.md", "\n".join(sections), errors="backslashreplace")


def _plain(value: object) -> object:
    """Not-a-number, which JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(name: str, value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "–"
    if name.endswith("_count") or isinstance(value, int):
        return str(int(value))
    return f"{value:.3f}" if name.endswith(("_cosine", "_iou", "_rank", "_ratio")) else f"{100 * value:.2f} %"


def _interval(name: str, ends: tuple[float, float] | None) -> str:
    if ends is None or not math.isfinite(ends[0]):
        return ""
    low, high = (_shown(name, end) for end in ends)
    return f"{low.removesuffix(' %')} – {high}"
