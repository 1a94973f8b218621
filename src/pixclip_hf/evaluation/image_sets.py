"""What is evaluated on: sources of records, found in the folders that public datasets come in."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.sources import IMAGE_SUFFIXES, AnnotatedImage, Source, load_records, open_source, parse_source
from ..data.sources.base import in_pixels
from ..data.sources.docci import DESCRIPTIONS as DOCCI_FILE
from ..data.sources.records import clean_text, clean_texts
from ..images import StoredImage, check_image, encoded_images, upright_size
from ..processing.processing_numbers import read_numbers
from ..processing.processing_regions import mask_box, read_mask
from ..processing.processing_runs import polygon_runs, read_rle
from ..record import LeftOut, foreign
from ..scenes.dataset import make_scene

logger = logging.get_logger(__name__)

Record = Mapping[str, Any]

LAYOUTS = {
    "region-classification": """\
one of
  scenes:N:SEED                                     drawn scenes, nothing to download
  DATA_DIR/regions.jsonl                            one line per image: image, width, height, regions (box xyxy,
                                                    category, segmentation), images by their path below DATA_DIR
  DATA_DIR/annotations/instances_val2017.json       COCO, with DATA_DIR/val2017/*.jpg
  DATA_DIR/annotations/lvis_v1_val.json             LVIS, with DATA_DIR/train2017 and DATA_DIR/val2017
  DATA_DIR                                          a dataset in the record schema (save_to_disk or Parquet)""",
    "image-text-retrieval": """\
one of
  scenes:N:SEED                                     drawn scenes, nothing to download
  DATA_DIR/annotations/captions_val2017.json        COCO, with DATA_DIR/val2017/*.jpg
  DATA_DIR/dataset_coco.json, dataset_flickr30k.json  Karpathy's splits, images below DATA_DIR, DATA_DIR/images or
                                                    DATA_DIR/flickr30k-images
  DATA_DIR/test_caption.json                        Flickr30k: [{"filename", "captions"}], with flickr30k-images/
  DATA_DIR                                          a dataset in the record schema (save_to_disk or Parquet)""",
    "long-text-retrieval": """\
one of
  DATA_DIR/image/*.jpg and DATA_DIR/caption/*.txt   Urban1k, one text per image of the same name (the dataset has the
                                                    name of DATA_DIR)
  DATA_DIR/docci_descriptions.jsonlines             DOCCI, with DATA_DIR/images
  DATA_DIR/annotations/*.json and DATA_DIR/photos   DCI, with splits.json
  DATA_DIR/*.json                                   as ShareGPT4V: [{"image", "conversations": [{"from", "value"}]}],
                                                    images by their path below DATA_DIR (--split NAME for NAME.json
                                                    where there are several)
  DATA_DIR                                          a dataset in the record schema (save_to_disk or Parquet)""",
    "referring": """\
  DATA_DIR/*.jsonl                                  ReCLIP's expressions, such as refcoco_val.jsonl (--split
                                                    refcoco_val where there are several), with
                                                    DATA_DIR/train2014/*.jpg
  DATA_DIR/detections.json                          candidates of a detector (--candidates detections):
                                                    {image_id: [[x, y, width, height], …]}""",
    "zero-shot-classification": """\
  DATA_DIR/CLASS/*.jpg                              one folder per class
  DATA_DIR/classes.json                             optional: {"CLASS": "name to put into the templates"}""",
}
LAYOUTS["region-retrieval"] = LAYOUTS["region-classification"]
LAYOUTS["open-vocabulary-detection"] = LAYOUTS["region-classification"]
LAYOUTS["phrase-grounding"] = """\
one of
  scenes:N:SEED                                     drawn scenes, nothing to download
  DATA_DIR/Sentences/*.txt, DATA_DIR/Annotations/*.xml  Flickr30k Entities, with DATA_DIR/flickr30k-images/*.jpg
  DATA_DIR/regions.jsonl                            one line per image, as for region-classification, with captions
  DATA_DIR                                          a dataset in the record schema (save_to_disk or Parquet)"""
"""How the data of each task must be laid out; part of every message about missing data."""


@dataclass
class Images:
    """Images with everything that is known about them.

    Args:
        name: the name of the dataset.
        records: in the record schema, with the fields that a task needs; `image` is a PIL image, a path or a
            [`StoredImage`].
        categories: classes to choose from; a name that occurs twice is two classes, where `label` says which one.
        split: the split of the dataset.
        left_out: why regions or images were left out, and how many.
    """

    name: str
    records: Sequence[Record]
    categories: list[str] = field(default_factory=list)
    split: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass
class Found:
    """A source in a folder.

    Args:
        kind, arguments: what [`open_source`] takes.
        name, split: the name and split of the dataset, as results name them.
    """

    kind: str
    arguments: dict[str, Any]
    name: str
    split: str | None = None


def read_images(
    task: str, source: str | Sequence[str], split: str | None = None, candidates: str = "objects"
) -> Images:
    """The data of a task.

    Args:
        task: a key of [`LAYOUTS`].
        source: a folder that holds one of the task's [`LAYOUTS`], `scenes:N:SEED`, or the words of any source
            (`["coco", "annotations=instances.json", "images=val2017"]`, see [`load_records`]).
        split: a split of a dataset that has several; an error where it has none. None is the split that is usually
            reported, and `all` stands for every split where captions are read.
        candidates: for `referring`, `"objects"` (of the annotations) or `"detections"`.

    Raises:
        FileNotFoundError: nothing there that the task can read; the message shows the layouts.
        ValueError: an unknown task, a `split` that is not there, or an image that the annotations name and that is
            missing.
    """
    if task not in LAYOUTS:
        raise ValueError(f"`task` must be one of {', '.join(LAYOUTS)}, got {task!r}.")
    words = [os.fspath(source)] if isinstance(source, str | os.PathLike) else list(source)
    if len(words) > 1:
        return _checked(_records_of(task, _named(words, split)), task)
    (data_dir,) = words
    if data_dir.startswith("scenes:") and task not in ("referring", "zero-shot-classification", "long-text-retrieval"):
        return _scenes(data_dir, split)
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"`data_dir` must be a folder for {task}, got {data_dir!r}. Expected\n{LAYOUTS[task]}")
    finders: dict[str, Callable[[Path, str | None, str], Found | None]] = {
        "region-classification": _find_regions,
        "region-retrieval": _find_regions,
        "open-vocabulary-detection": _find_regions,
        "phrase-grounding": _find_phrases,
        "image-text-retrieval": _find_captions,
        "long-text-retrieval": _find_long_texts,
        "referring": _find_expressions,
        "zero-shot-classification": _find_class_folders,
    }
    found = finders[task](folder, split, candidates)
    if found is not None:
        try:
            return _checked(_records_of(task, found), task)
        except FileNotFoundError as error:
            raise ValueError(f"{error} Expected {LAYOUTS[task]}") from error
    if task not in ("referring", "zero-shot-classification") and _is_record_dataset(folder):
        return _checked(_stored(str(folder), split or "test", folder.name), task)
    raise FileNotFoundError(f"{data_dir!r} holds nothing that {task} can read. Expected {LAYOUTS[task]}")


def _named(words: Sequence[str], split: str | None) -> Found:
    kind, arguments = parse_source(words, **({} if split is None else {"split": split}))
    names = (arguments.get(name) for name in ("annotations", "expressions", "path", "folder"))
    named = next((value[0] if isinstance(value, list) else value for value in names if value), kind)
    return Found(kind, arguments, Path(named).stem, arguments.get("split"))


def _records_of(task: str, found: Found) -> Images:
    """The records of a source, as far as the task needs them."""
    if found.kind == "dataset":
        return _stored(found.arguments["path"], found.arguments.get("split", "test"), found.name)
    source = open_source(found.kind, **found.arguments)
    stored = None
    records, left_out = [], Counter(source.left_out)
    for position in range(len(source)):
        try:
            item = source.read(position)
        except LeftOut as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise  # the data are not all there: said before the first image is encoded
            logger.warning(f"Left out {source.item_name(position)!r} of {found.name}: {error}")
            left_out["images whose annotations cannot be read"] += 1
            continue
        if isinstance(item.image, bytes):
            stored = stored or encoded_images(source.dataset())
        image = StoredImage(stored, position) if isinstance(item.image, bytes) else str(item.image)
        try:
            record = _READERS[task](source, item, left_out)
        except LeftOut as error:
            logger.warning(f"Left out {source.item_name(position)!r} of {found.name}: {error}")
            left_out[str(error)] += 1
            continue
        if record is not None:
            records.append({"image": image, **record})
    categories = source.categories or sorted(
        {region["category"] for record in records for region in record["regions"] if region.get("category")}
    )
    return Images(found.name, records, categories, found.split, dict(+left_out))


def _with_regions(source: Source, item: AnnotatedImage, left_out: Counter) -> dict[str, Any] | None:
    """Without regions that have no area or no pixel on their image, and counting them."""
    if not item.regions and not item.captions:
        return None
    width, height = item.size or _upright_size(item)
    left_out.update({reason: n for reason, n in item.left_out.items() if reason.startswith("region left out")})
    kept = []
    for given in item.regions:
        region = dict.fromkeys(("box", "mask", "category", "caption", "long_caption")) | given
        label = region.pop("label", None)
        if label is not None:
            region["category"] = source.categories[label]  # as the file has it, underscores included
        try:
            with foreign("regions that cannot be read"):
                for name in ("category", "caption", "long_caption"):
                    if clean_text(region[name]) is None:
                        region[name] = None
                if item.normalized:
                    region = in_pixels(region, (width, height))
                reason = _clean(region, width, height)
        except LeftOut as error:
            reason = str(error)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(region)
    return {"width": width, "height": height, "captions": clean_texts(item.captions, left_out), "regions": kept}


def _upright_size(item: AnnotatedImage) -> tuple[int, int]:
    data = item.image if isinstance(item.image, bytes) else item.image.read_bytes()
    with foreign("images that cannot be read"):
        return upright_size(data)


def _clean(region: dict[str, Any], width: int, height: int) -> str | None:
    """Clips the box and drops rings that are no polygon; why the region cannot be used, if it cannot."""
    if region["box"] is None and region["mask"] is not None:
        try:
            region["box"] = mask_box(np.asarray(read_mask(region["mask"], (height, width), "mask"))).tolist()
        except (KeyError, TypeError, ValueError):
            return "masks without a pixel on their image"
    x0, y0, x1, y1 = read_numbers(region["box"] or (0, 0, 0, 0), "`box`").tolist()
    region["box"] = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if region["box"][2] <= region["box"][0] or region["box"][3] <= region["box"][1]:
        return "boxes without area on their image"
    mask = region["mask"]
    if isinstance(mask, list):
        region["mask"] = mask = [ring for ring in mask if len(ring) >= 6] or None
        if mask is not None:
            x, y = np.concatenate([read_numbers(ring, "a ring").reshape(-1, 2) for ring in mask]).mean(axis=0)
            # A polygon whose corners lie around a point of the image always covers a pixel of it.
            if (0 <= x < width and 0 <= y < height) or polygon_runs(mask, (height, width)).edges.size:
                return None
            return "masks without a pixel on their image"
    elif mask is not None:
        runs = read_rle(mask)
        if runs.size != (height, width):
            raise ValueError(f"the mask has (height, width) {runs.size}, its image {(height, width)}")
        if not runs.edges.size:
            return "masks without a pixel on their image"
    return None


def _with_captions(source: Source, item: AnnotatedImage, left_out: Counter) -> dict[str, Any]:
    # Five per image, as everywhere; some images of COCO have six or seven.
    return {"captions": clean_texts(item.captions, left_out)[:5], "regions": []}


def _with_long_texts(source: Source, item: AnnotatedImage, left_out: Counter) -> dict[str, Any]:
    return {"captions": clean_texts(item.captions, left_out), "regions": []}


def _with_expressions(source: Source, item: AnnotatedImage, left_out: Counter) -> dict[str, Any]:
    if not item.expressions:
        raise ValueError(f"`referring` needs expressions and their candidates (a source reclip), got {source}.")
    regions = []
    for box in item.candidates:
        try:
            regions.append({"box": read_numbers(box, "`box`").tolist(), "mask": None})
        except ValueError:
            left_out["candidates that cannot be read"] += 1
    return {"regions": regions, "expressions": item.expressions}


def _with_label(source: Source, item: AnnotatedImage, left_out: Counter) -> dict[str, Any]:
    if item.label is None:
        raise ValueError(f"`zero-shot-classification` needs classes of images (a source class_folders), got {source}.")
    return {"label": item.label, "regions": [], "captions": []}


_READERS: dict[str, Callable[[Source, AnnotatedImage, Counter], dict[str, Any] | None]] = {
    "region-classification": _with_regions,
    "region-retrieval": _with_regions,
    "open-vocabulary-detection": _with_regions,
    "phrase-grounding": _with_regions,
    "image-text-retrieval": _with_captions,
    "long-text-retrieval": _with_long_texts,
    "referring": _with_expressions,
    "zero-shot-classification": _with_label,
}


def _checked(data: Images, task: str) -> Images:
    """Refuses a missing image before the first is encoded."""
    paths = [record["image"] for record in data.records if isinstance(record["image"], str)]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images of {data.name} are missing, the first is {missing[0]}. "
            f"Expected {LAYOUTS[task]}"
        )
    data = _without_unreadable(data)
    if not data.records:
        raise ValueError(f"{data.name} has no image for {task} in split {data.split!r}.")
    return data


def _without_unreadable(data: Images) -> Images:
    """Without the images that no decoder can read: they are counted, and do not end the evaluation when their turn
    comes."""

    def fault(record: Record) -> str | None:
        try:
            if isinstance(record["image"], str | StoredImage):
                check_image(record["image"])
        except LeftOut as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(fault, data.records))
    for record, reason in zip(data.records, faults, strict=True):
        if reason:
            logger.warning(f"Left out an image of {data.name}: {record['image']}: {reason}")
    if not any(faults):
        return data
    kept = [record for record, reason in zip(data.records, faults, strict=True) if reason is None]
    left_out = {**data.left_out, "images that cannot be read": len(faults) - len(kept)}
    return replace(data, records=kept, left_out=left_out)


def parse_scenes(data_dir: str | Sequence[str]) -> tuple[int, int]:
    """Number and seed of `scenes:N:SEED`.

    Raises:
        ValueError: another form.
    """
    parts = data_dir.split(":") if isinstance(data_dir, str) else []
    if len(parts) != 3 or parts[0] != "scenes" or not all(part.isdigit() for part in parts[1:]) or parts[1] == "0":
        raise ValueError(f"`data_dir` must be scenes:N:SEED with N above 0, such as scenes:1000:0, got {data_dir!r}.")
    return int(parts[1]), int(parts[2])


def refuse_split(split: str | None, what: str, own: str | None = None) -> None:
    """
    Raises:
        ValueError: a split of data that has none, or none but its `own`.
    """
    if split not in (None, own):
        has = f"no split but {own!r}" if own else "no splits"
        raise ValueError(f"`split` must not be given for {what}: it has {has}, got {split!r}.")


def _scenes(data_dir: str, split: str | None) -> Images:
    refuse_split(split, data_dir, own="test")
    number, seed = parse_scenes(data_dir)
    records = [make_scene(index, "test", seed) for index in range(number)]
    categories = sorted({region["category"] for record in records for region in record["regions"]})
    return Images("scenes", records, categories, "test")


def _find_regions(folder: Path, split: str | None, candidates: str) -> Found | None:
    if (path := folder / "regions.jsonl").is_file():
        refuse_split(split, str(path))
        return Found("regions", {"folder": str(folder)}, folder.name)
    for pattern, name, images in (
        ("instances_*.json", "COCO", "{split}"),
        ("lvis_v1_*.json", "LVIS", "."),
    ):
        if files := _by_last_word(folder, pattern):
            chosen = _choose(files, split, ("val2017", "val", "minival"), folder)
            return _coco(files[chosen], folder / images.format(split=chosen), name, chosen)
    return None


def _find_phrases(folder: Path, split: str | None, candidates: str) -> Found | None:
    if (folder / "Sentences").is_dir() and (folder / "Annotations").is_dir():
        refuse_split(split, f"phrases in {folder / 'Sentences'}")
        return Found("flickr30k", {"folder": str(folder), "images": str(_image_root(folder))}, "Flickr30k Entities")
    if (path := folder / "regions.jsonl").is_file():
        refuse_split(split, str(path))
        return Found("regions", {"folder": str(folder)}, folder.name)
    return None


def _by_last_word(folder: Path, pattern: str) -> dict[str, Path]:
    return {path.stem.split("_")[-1]: path for path in sorted((folder / "annotations").glob(pattern))}


def _coco(annotations: Path, images: Path, name: str, split: str) -> Found:
    return Found("coco", {"annotations": str(annotations), "images": str(images)}, name, split)


def _choose(files: Mapping[str, Any], split: str | None, defaults: Sequence[str], folder: Path) -> str:
    if split is None:
        split = next((name for name in defaults if name in files), next(iter(files)) if len(files) == 1 else None)
    if split is None or split not in files:
        raise ValueError(f"`split` must be one of {', '.join(files)} of {folder}, got {split!r}.")
    return split


def _find_captions(folder: Path, split: str | None, candidates: str) -> Found | None:
    if files := _by_last_word(folder, "captions_*.json"):
        chosen = _choose(files, split, ("val2017",), folder)
        return _coco(files[chosen], folder / chosen, "COCO captions", chosen)
    for name in ("dataset_coco.json", "dataset_flickr30k.json"):
        if (path := folder / name).is_file():
            chosen = split or "test"
            arguments = {"annotations": str(path), "images": str(_image_root(folder)), "split": _unless_all(chosen)}
            return Found("karpathy", arguments, "COCO captions" if "coco" in name else "Flickr30k", chosen)
    if (path := folder / "test_caption.json").is_file():
        refuse_split(split, str(path), own="test")
        return Found("karpathy", {"annotations": str(path), "images": str(_image_root(folder))}, "Flickr30k", "test")
    return None


def _image_root(folder: Path) -> Path:
    return next((folder / name for name in ("flickr30k-images", "images") if (folder / name).is_dir()), folder)


def _unless_all(split: str) -> str | None:
    return None if split == "all" else split


def _find_long_texts(folder: Path, split: str | None, candidates: str) -> Found | None:
    if (folder / "image").is_dir() and (folder / "caption").is_dir():
        refuse_split(split, f"texts in {folder / 'caption'}")
        return Found("urban1k", {"folder": str(folder)}, folder.name)
    if (folder / DOCCI_FILE).is_file():
        chosen = split or "test"
        return Found("docci", {"folder": str(folder), "split": _unless_all(chosen)}, "DOCCI", chosen)
    if (folder / "photos").is_dir() and (folder / "annotations").is_dir():
        chosen = "all"
        if not (splits := folder / "splits.json").is_file():
            refuse_split(split, f"annotations without {splits}", own="all")
        elif split != "all":
            chosen = _choose(json.loads(splits.read_text(encoding="utf-8-sig")), split, ("test",), folder)
        return Found("dci", {"folder": str(folder), "split": _unless_all(chosen)}, "DCI", chosen)
    answers = {path.stem: path for path in sorted(folder.glob("*.json")) if _holds_conversations(path)}
    if not answers:
        return None
    chosen = _choose(answers, split, (), folder)
    return Found("sharegpt4v", {"annotations": str(answers[chosen]), "images": str(folder)}, chosen)


def _holds_conversations(path: Path) -> bool:
    """By the start of the file: some have a million entries."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(2**16).lstrip()
    return start.startswith("[") and '"conversations"' in start


def _find_expressions(folder: Path, split: str | None, candidates: str) -> Found:
    if candidates not in ("objects", "detections"):
        raise ValueError(f"`candidates` must be objects or detections, got {candidates!r}.")
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no expressions. Expected\n{LAYOUTS['referring']}")
    chosen = _choose(files, split, ("refcoco_val",), folder)
    images = folder / "train2014"
    arguments = {"expressions": str(files[chosen]), "images": str(images if images.is_dir() else folder)}
    if candidates == "detections":
        arguments["detections"] = str(folder / "detections.json")
        if not (folder / "detections.json").is_file():
            raise FileNotFoundError(f"{arguments['detections']} is missing. Expected\n{LAYOUTS['referring']}")
    return Found("reclip", arguments, chosen.rsplit("_", 1)[0], f"{chosen.rsplit('_', 1)[-1]}, {candidates}")


def _find_class_folders(folder: Path, split: str | None, candidates: str) -> Found:
    refuse_split(split, f"class folders in {folder}")
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.glob("*/*")):
        layout = LAYOUTS["zero-shot-classification"]
        raise FileNotFoundError(f"{str(folder)!r} holds no images of classes. Expected\n{layout}")
    return Found("class_folders", {"folder": str(folder)}, folder.name)


def _is_record_dataset(folder: Path) -> bool:
    marks = ("dataset_info.json", "dataset_dict.json")
    return any((folder / mark).is_file() for mark in marks) or any(folder.rglob("*.parquet"))


def _stored(path: str, split: str, name: str) -> Images:
    loaded = load_records(path, split)
    images, annotations = encoded_images(loaded), loaded.remove_columns("image")
    records = [{**record, "image": StoredImage(images, index)} for index, record in enumerate(annotations)]
    categories = sorted({r["category"] for record in records for r in record["regions"] if r["category"]})
    return Images(name, records, categories, split)
