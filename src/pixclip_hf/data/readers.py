"""Datasets in the record schema, from a folder or the Hub, and the annotation files of COCO, LVIS and RefCOCO."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schema import record_features

if TYPE_CHECKING:
    import datasets


def load_records(name_or_path: str, split: str) -> "datasets.Dataset":
    """A split of a dataset in the record schema.

    Args:
        name_or_path: a folder written by `save_to_disk` of a `DatasetDict` or a `Dataset` (a split without a name
            counts as `"train"`, as in `load_dataset`), a folder that `load_dataset` reads (Parquet shards),
            or a Hub id. Other columns are left out; fields that its regions lack become None.
        split: name of the split.

    Raises:
        ValueError: no such split, or a column of the schema is missing or has another type.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(name_or_path)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        loaded = load_from_disk(name_or_path)
        if not isinstance(loaded, DatasetDict):
            loaded = {str(loaded.split or "train"): loaded}
        if split not in loaded:
            raise ValueError(f"`split` must be one of {sorted(loaded)} of {name_or_path!r}, got {split!r}.")
        loaded = loaded[split]
    else:
        loaded = load_dataset(name_or_path, split=split)
    return in_schema(loaded, name_or_path)


def in_schema(
    loaded: "datasets.Dataset | datasets.IterableDataset", name: str
) -> "datasets.Dataset | datasets.IterableDataset":
    """The columns of the record schema, cast where their types differ.

    Args:
        loaded: a dataset whose features are known.
        name: of the dataset, for messages.

    Raises:
        ValueError: a column is missing or has another type.
    """
    features = record_features()
    if missing := sorted(set(features) - set(loaded.features or {})):
        raise ValueError(f"{name!r} is not in the record schema: it lacks the columns {', '.join(missing)}.")
    columns = loaded.select_columns(list(features))
    if columns.features == features:
        return columns
    try:
        return columns.cast(features)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name!r} is not in the record schema: {error}") from error


def read_instances(annotation_file: str | Path, image_folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The instances of a COCO or LVIS annotation file, images as paths.

    Args:
        annotation_file: `instances_*.json` of COCO or `lvis_v1_*.json`.
        image_folder: of COCO's images by `file_name`; for LVIS, whose images name none, the folder above `train2017`
            and `val2017`.

    Returns:
        A record an image that has annotations, in the file's order: `image` (path), `width`, `height`, `captions`
        (none) and `regions` with `id`, `box` (xyxy), `mask` (polygons or RLE as in the file, None without), `category`
        and `iscrowd`; and the categories in the file's order.
    """
    content = json.loads(Path(annotation_file).read_text())
    categories = {category["id"]: category["name"] for category in content["categories"]}
    regions = defaultdict(list)
    for annotation in content["annotations"]:
        regions[annotation["image_id"]].append(
            {
                "id": annotation["id"],
                "box": xywh_to_xyxy(annotation["bbox"]),
                "mask": annotation.get("segmentation") or None,
                "category": categories[annotation["category_id"]],
                "iscrowd": bool(annotation.get("iscrowd")),
            }
        )
    records = []
    for image in content["images"]:
        if image["id"] in regions:
            # http://images.cocodataset.org/val2017/000000000139.jpg
            name = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])
            size = {"width": image["width"], "height": image["height"]}
            path = str(Path(image_folder, name))
            records.append({"image": path, **size, "captions": [], "regions": regions[image["id"]]})
    return records, list(categories.values())


def read_expressions(
    expression_file: str | Path, image_folder: str | Path, detection_file: str | Path | None = None
) -> list[dict[str, Any]]:
    """Referring expressions in ReCLIP's JSON lines (`refcoco_val.jsonl`), images as paths.

    Args:
        expression_file: a line a referred object: `file_name`, `image_id`, `anns` (all objects of the image with `id`
            and `bbox`), `ann_id` (the one meant) and `sentences` (`raw`).
        image_folder: of the images (COCO's train2014).
        detection_file: detector boxes, `{image_id: [[x, y, width, height], …]}` or a list of `{"image_id", "box"}`;
            the objects of the file are the candidates when None.

    Returns:
        A record an image: `image` (path), `regions`, the candidates (`box`, xyxy), and `expressions`: `text` and
        `boxes`, the right ones.
    """
    detections: dict[str, list[Sequence[float]]] | None = None
    if detection_file is not None:
        loaded = json.loads(Path(detection_file).read_text())
        if isinstance(loaded, list):
            detections = defaultdict(list)
            for entry in loaded:
                detections[str(entry["image_id"])].append(entry["box"])
        else:
            detections = {str(image): boxes for image, boxes in loaded.items()}
    records: dict[str, dict[str, Any]] = {}
    for line in Path(expression_file).read_text().splitlines():
        entry = json.loads(line)
        meant = entry["ann_id"] if isinstance(entry["ann_id"], list) else [entry["ann_id"]]
        objects = [(annotation["id"], xywh_to_xyxy(annotation["bbox"])) for annotation in entry["anns"]]
        boxes = [box for _, box in objects]
        if detections is not None:
            boxes = [xywh_to_xyxy(box) for box in detections.get(str(entry["image_id"]), [])]
        name = entry["file_name"]
        if "coco" in name.lower():
            # COCO_train2014_000000581857_16.jpg: the image's name and the number of the object.
            stem = name.rsplit(".", 1)[0].split("_")
            name = "_".join(stem[:3]) + ".jpg"
        path = str(Path(image_folder, name))
        regions = [{"box": box, "mask": None} for box in boxes]
        record = records.setdefault(path, {"image": path, "regions": regions, "expressions": []})
        right = [box for number, box in objects if number in meant]
        record["expressions"] += [{"text": sentence["raw"], "boxes": right} for sentence in entry["sentences"]]
    return list(records.values())


def xywh_to_xyxy(box: Sequence[float]) -> list[float]:
    """COCO's corner and size to two corners."""
    x, y, width, height = box
    return [x, y, x + width, y + height]
