"""What is evaluated on: the folders that datasets come in, read into one form."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.readers import load_records, read_expressions, read_instances
from ..data.scenes import make_scene
from ..images import StoredImage
from ..processing.processing_regions import decode_rle, polygon_mask

Record = Mapping[str, Any]
DOCCI_FILE = "docci_descriptions.jsonlines"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

LAYOUTS = {
    "region-classification": """\
one of
  scenes:N:SEED                                     drawn scenes, nothing to download
  DATA_DIR/regions.jsonl                            a line an image: image, width, height, regions (box xyxy, category,
                                                    segmentation), images by their path below DATA_DIR
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
  DATA_DIR/image/*.jpg and DATA_DIR/caption/*.txt   Urban1k, a text an image of the same name (the dataset is called
                                                    as DATA_DIR is)
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
  DATA_DIR/CLASS/*.jpg                              a folder a class
  DATA_DIR/classes.json                             optional: {"CLASS": "name to put into the templates"}""",
}
LAYOUTS["region-retrieval"] = LAYOUTS["region-classification"]
"""How each task's data must lie; part of every message about data that is missing."""


@dataclass
class Images:
    """Images with what is known of them.

    Args:
        name: of the dataset.
        records: as in the record schema, as far as a task needs them; `image` is a PIL image, a path or a
            [`StoredImage`].
        categories: classes to choose from; a name that occurs twice is two classes, where `label` says which one.
        split: of the dataset.
        left_out: why regions or images were left out, and how many.
    """

    name: str
    records: Sequence[Record]
    categories: list[str] = field(default_factory=list)
    split: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def read_images(task: str, data_dir: str, split: str | None = None, candidates: str = "objects") -> Images:
    """The data of a task.

    Args:
        task: a key of [`LAYOUTS`].
        data_dir: see [`LAYOUTS`].
        split: where a dataset has several, and an error where it has none; the one that is usually reported when
            None, `all` for every one where captions are read.
        candidates: for `referring`, `"objects"` (of the annotations) or `"detections"`.

    Raises:
        FileNotFoundError: nothing there that the task can read; the message shows the layouts.
        ValueError: an unknown task, a `split` that is not there, or an image that the annotations name and that is
            missing.
    """
    if task not in LAYOUTS:
        raise ValueError(f"`task` must be one of {', '.join(LAYOUTS)}, got {task!r}.")
    if data_dir.startswith("scenes:") and task not in ("referring", "zero-shot-classification", "long-text-retrieval"):
        return _scenes(data_dir, split)
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"`data_dir` must be a folder for {task}, got {data_dir!r}. Expected\n{LAYOUTS[task]}")
    if task == "referring":
        return _checked(_referring(folder, split, candidates), task)
    if task == "zero-shot-classification":
        refuse_split(split, f"class folders in {folder}")
        return _class_folders(folder)
    readers: dict[str, Callable[[Path, str | None], Images | None]] = {
        "region-classification": _regions,
        "region-retrieval": _regions,
        "image-text-retrieval": _captions,
        "long-text-retrieval": _long_texts,
    }
    found = readers[task](folder, split)
    if found is None and _is_record_dataset(folder):
        found = _records(folder, split)
    if found is None:
        raise FileNotFoundError(f"{data_dir!r} holds nothing that {task} can read. Expected {LAYOUTS[task]}")
    return _checked(found, task)


def _checked(data: Images, task: str) -> Images:
    """Refuses a missing image before the first is encoded."""
    paths = [record["image"] for record in data.records if isinstance(record["image"], str)]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images of {data.name} are missing, the first is {missing[0]}. "
            f"Expected {LAYOUTS[task]}"
        )
    if not data.records:
        raise ValueError(f"{data.name} has no image for {task} in split {data.split!r}.")
    return data


def parse_scenes(data_dir: str) -> tuple[int, int]:
    """Number and seed of `scenes:N:SEED`.

    Raises:
        ValueError: another form.
    """
    parts = data_dir.split(":")
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


def _regions(folder: Path, split: str | None) -> Images | None:
    if (path := folder / "regions.jsonl").is_file():
        refuse_split(split, str(path))
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for record in records:
            record["image"] = str(folder / record["image"])
            for region in record["regions"]:
                region["mask"] = region.pop("segmentation", None)
        return _usable(
            folder.name,
            records,
            sorted({r["category"] for rec in records for r in rec["regions"] if r["category"]}),
            None,
        )
    for pattern, name, images in (
        ("instances_*.json", "COCO", "{split}"),
        ("lvis_v1_*.json", "LVIS", "."),
    ):
        files = {path.stem.split("_")[-1]: path for path in sorted((folder / "annotations").glob(pattern))}
        if files:
            chosen = _choose(files, split, ("val2017", "val", "minival"), folder)
            records, categories = read_instances(files[chosen], folder / images.format(split=chosen))
            return _usable(name, records, categories, chosen)
    return None


def _usable(name: str, records: list[dict[str, Any]], categories: list[str], split: str | None) -> Images:
    """Without regions that have no area or no pixel on their image, and counting them."""
    left_out: dict[str, int] = {}
    for record in records:
        size, kept = (record["width"], record["height"]), []
        for region in record["regions"]:
            if reason := _clean(region, *size):
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                kept.append(region)
        record["regions"] = kept
    return Images(name, records, categories, split, left_out)


def _clean(region: dict[str, Any], width: int, height: int) -> str | None:
    """Clips the box and drops rings that are no polygon; why the region cannot be used, if it cannot."""
    x0, y0, x1, y1 = region["box"]
    region["box"] = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if region["box"][2] <= region["box"][0] or region["box"][3] <= region["box"][1]:
        return "boxes without area on their image"
    mask = region["mask"]
    if isinstance(mask, list):
        rings = [ring for ring in mask if len(ring) >= 6]
        region["mask"] = rings or None
        if rings:
            points = [point for ring in rings for point in zip(ring[::2], ring[1::2], strict=True)]
            x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
            # A polygon whose corners lie around a point of the image always covers a pixel of it.
            if not (0 <= x < width and 0 <= y < height) and not polygon_mask(rings, (height, width)).any():
                return "masks without a pixel on their image"
    elif mask is not None and not decode_rle(mask).any():
        return "masks without a pixel on their image"
    return None


def _choose(files: Mapping[str, Any], split: str | None, defaults: Sequence[str], folder: Path) -> str:
    if split is None:
        split = next((name for name in defaults if name in files), next(iter(files)) if len(files) == 1 else None)
    if split not in files:
        raise ValueError(f"`split` must be one of {', '.join(files)} of {folder}, got {split!r}.")
    return split


def _captions(folder: Path, split: str | None) -> Images | None:
    files = {path.stem.split("_")[-1]: path for path in sorted((folder / "annotations").glob("captions_*.json"))}
    if files:
        chosen = _choose(files, split, ("val2017",), folder)
        content = json.loads(files[chosen].read_text())
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"].strip())
        records = [
            # Five an image, as everywhere; some images have six or seven.
            _captioned(folder / chosen / image["file_name"], captions[image["id"]][:5])
            for image in content["images"]
        ]
        return Images("COCO captions", records, split=chosen)
    for name in ("dataset_coco.json", "dataset_flickr30k.json"):
        if (path := folder / name).is_file():
            chosen, root = split or "test", _image_root(folder)
            records = [
                _captioned(
                    root / entry.get("filepath", "") / entry["filename"],
                    [sentence["raw"].strip() for sentence in entry["sentences"]][:5],
                )
                for entry in json.loads(path.read_text())["images"]
                if chosen in (entry["split"], "all")
            ]
            return Images("COCO captions" if "coco" in name else "Flickr30k", records, split=chosen)
    if (path := folder / "test_caption.json").is_file():
        refuse_split(split, str(path), own="test")
        entries = json.loads(path.read_text())
        root = _image_root(folder)
        records = [_captioned(root / entry["filename"], entry["captions"]) for entry in entries]
        return Images("Flickr30k", records, split="test")
    return None


def _image_root(folder: Path) -> Path:
    return next((folder / name for name in ("flickr30k-images", "images") if (folder / name).is_dir()), folder)


def _captioned(path: Path, captions: Sequence[str]) -> dict[str, Any]:
    return {"image": str(path), "captions": [caption for caption in captions if caption.strip()], "regions": []}


def _long_texts(folder: Path, split: str | None) -> Images | None:
    if (folder / "image").is_dir() and (folder / "caption").is_dir():
        refuse_split(split, f"texts in {folder / 'caption'}")
        images = sorted(path for path in (folder / "image").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        records = [_captioned(path, [_text_of(folder / "caption" / f"{path.stem}.txt")]) for path in images]
        return Images(folder.name, records)
    if (path := folder / DOCCI_FILE).is_file():
        entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        chosen = split or "test"
        records = [
            _captioned(folder / "images" / entry["image_file"], [entry["description"]])
            for entry in entries
            if chosen in (entry["split"], "all")
        ]
        return Images("DOCCI", records, split=chosen)
    if (folder / "photos").is_dir() and (folder / "annotations").is_dir():
        files, chosen = sorted((folder / "annotations").glob("*.json")), "all"
        if not (splits := folder / "splits.json").is_file():
            refuse_split(split, f"annotations without {splits}", own="all")
        elif split != "all":
            named = json.loads(splits.read_text())
            chosen = _choose(named, split, ("test",), folder)
            files = [path for path in files if path.name in named[chosen]]
        records = []
        for path in files:
            entry = json.loads(path.read_text())
            text = f"{entry['short_caption'].strip()}\n{entry['extra_caption'].strip()}"
            records.append(_captioned(folder / "photos" / entry["image"], [text]))
        return Images("DCI", records, split=chosen)
    answers = {path.stem: path for path in sorted(folder.glob("*.json")) if _holds_conversations(path)}
    if not answers:
        return None
    chosen = _choose(answers, split, (), folder)
    records = []
    for entry in json.loads(answers[chosen].read_text()):
        answer = next(turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt")
        records.append(_captioned(folder / entry["image"], [answer]))
    return Images(chosen, records)


def _holds_conversations(path: Path) -> bool:
    """By the start of the file: some have a million entries."""
    with path.open() as file:
        start = file.read(2**16).lstrip()
    return start.startswith("[") and '"conversations"' in start


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"The text of an image is missing: {path}.")
    return path.read_text().strip()


def _referring(folder: Path, split: str | None, candidates: str) -> Images:
    if candidates not in ("objects", "detections"):
        raise ValueError(f"`candidates` must be objects or detections, got {candidates!r}.")
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no expressions. Expected\n{LAYOUTS['referring']}")
    chosen = _choose(files, split, ("refcoco_val",), folder)
    detections = None
    if candidates == "detections":
        detections = folder / "detections.json"
        if not detections.is_file():
            raise FileNotFoundError(f"{detections} is missing. Expected\n{LAYOUTS['referring']}")
    images = folder / "train2014"
    records = read_expressions(files[chosen], images if images.is_dir() else folder, detections)
    return Images(chosen.rsplit("_", 1)[0], records, split=f"{chosen.rsplit('_', 1)[-1]}, {candidates}")


def _class_folders(folder: Path) -> Images:
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    names = {path.name: path.name.replace("_", " ") for path in folders}
    if (path := folder / "classes.json").is_file():
        given = json.loads(path.read_text())
        if missing := sorted(set(names) - set(given)):
            raise ValueError(f"{path} must name every class folder; it lacks {', '.join(missing[:5])}.")
        names = {name: given[name] for name in names}
    records = [
        {"image": str(path), "label": label, "regions": [], "captions": []}
        for label, parent in enumerate(folders)
        for path in sorted(parent.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not records:
        layout = LAYOUTS["zero-shot-classification"]
        raise FileNotFoundError(f"{str(folder)!r} holds no images of classes. Expected\n{layout}")
    return Images(folder.name, records, list(names.values()))


def _is_record_dataset(folder: Path) -> bool:
    marks = ("dataset_info.json", "dataset_dict.json")
    return any((folder / mark).is_file() for mark in marks) or any(folder.rglob("*.parquet"))


def _records(folder: Path, split: str | None) -> Images:
    loaded = load_records(str(folder), split or "test")
    images, annotations = loaded.select_columns("image"), loaded.remove_columns("image")
    records = [{**record, "image": StoredImage(images, index)} for index, record in enumerate(annotations)]
    categories = sorted({r["category"] for record in records for r in record["regions"] if r["category"]})
    return Images(folder.name, records, categories, split or "test")
