"""The public formats of region annotations, each opened as a list of items and a function that reads one of them."""

import json
import pickle
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..data.readers import xywh_to_xyxy
from .stages import IDS_PER_IMAGE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class AnnotatedImage:
    """An image and what its source says about it, not yet checked.

    Attributes:
        name: of the record, unique in the source.
        image: encoded, or where it lies.
        regions: dicts with `id` and any of `box` (xyxy), `mask` (RLE or polygons), `category`, `caption`,
            `long_caption`, `score`, `source`.
        captions: of the image; alt_text: what a web page says about it.
        size: (width, height) that the annotations speak of, None where the source does not say.
        normalized: boxes are shares of width and height, not pixels.
        left_out: what the source has and the schema can't take, by reason.
    """

    name: str
    image: bytes | Path
    regions: Sequence[dict[str, Any]] = ()
    captions: Sequence[str] = ()
    alt_text: str | None = None
    size: tuple[int, int] | None = None
    normalized: bool = False
    left_out: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """Items in a fixed order, and what makes an [`AnnotatedImage`] of one.

    Attributes:
        kind: of the source; the `source` of its regions.
        items: what the index holds of an image, light.
        build: reads one item.
        left_out: annotations that belong to no item, by reason.
    """

    kind: str
    items: Sequence[Any]
    build: Callable[[Any], AnnotatedImage]
    left_out: Counter = field(default_factory=Counter)


def regions_folder(folder: str) -> Source:
    """`regions.jsonl` in a folder: a line an image, with `image` (path), `width`, `height`, `captions` and `regions`
    of `id`, `category`, `box` (xyxy pixels), `segmentation` and `expressions`."""
    lines = Path(folder, "regions.jsonl").read_text().splitlines()

    def build(line: str) -> AnnotatedImage:
        entry = json.loads(line)
        regions, left_out = [], Counter()
        for region in entry["regions"]:
            expressions = region.get("expressions") or [None]
            left_out["expression left out: beyond the first of its region"] += len(expressions) - 1
            regions.append(
                {
                    "id": region["id"],
                    "box": region["box"],
                    "mask": region.get("segmentation"),
                    "category": region["category"],
                    "caption": expressions[0],
                }
            )
        size = entry["width"], entry["height"]
        path = Path(folder, entry["image"])
        return AnnotatedImage(entry["image"], path, regions, entry["captions"], size=size, left_out=left_out)

    return Source("regions", [line for line in lines if line.strip()], build)


def image_folder(folder: str) -> Source:
    """Images below a folder, in the order of their names; `x.txt` beside `x.jpg` is its alt text."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)

    def build(path: Path) -> AnnotatedImage:
        text = path.with_suffix(".txt")
        alt_text = text.read_text(errors="replace") if text.is_file() else None
        return AnnotatedImage(path.relative_to(folder).as_posix(), path, alt_text=alt_text)

    return Source("images", paths, build)


def coco(annotations: str, images: str) -> Source:
    """COCO or LVIS: files of `images`, `annotations` (boxes xywh, with a category, or captions) and `categories`."""
    entries, categories = {}, {}
    regions, captions = defaultdict(list), defaultdict(list)
    for path in annotations.split(","):
        content = json.loads(Path(path).read_text())
        categories |= {category["id"]: category["name"] for category in content.get("categories", ())}
        entries |= {entry["id"]: entry for entry in content["images"]}
        for annotation in content["annotations"]:
            (regions if "bbox" in annotation else captions)[annotation["image_id"]].append(annotation)

    def build(image_id: int) -> AnnotatedImage:
        entry = entries[image_id]
        found = [
            {
                "id": annotation["id"],
                "box": xywh_to_xyxy(annotation["bbox"]),
                "mask": annotation.get("segmentation") or None,
                "category": categories[annotation["category_id"]].replace("_", " "),
            }
            for annotation in regions[image_id]
        ]
        # LVIS names its images by their COCO address alone.
        name = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
        path = _first_file(images, name, Path(name).name)
        texts = [annotation["caption"] for annotation in captions[image_id]]
        return AnnotatedImage(name, path, found, texts, size=(entry["width"], entry["height"]))

    left_out = Counter()
    for kind, rows in (("annotation", regions), ("caption", captions)):
        left_out[f"{kind} left out: of an unknown image"] = sum(len(rows[key]) for key in rows if key not in entries)
    return Source("coco", list(entries), build, left_out)


def refcoco(refs: str, instances: str, images: str) -> Source:
    """RefCOCO, RefCOCO+ or RefCOCOg: `refs(….).p` with the `instances.json` beside it; a region a sentence."""
    content = json.loads(Path(instances).read_text())
    categories = {category["id"]: category["name"] for category in content["categories"]}
    annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
    entries = {entry["id"]: entry for entry in content["images"]}
    found, left_out = defaultdict(list), Counter()
    with open(refs, "rb") as file:
        rows = _PlainUnpickler(file, encoding="latin1").load()
    for ref in rows:
        if ref["ann_id"] not in annotations or ref["image_id"] not in entries:
            left_out["expression left out: of an unknown annotation"] += len(ref["sentences"])
        else:
            found[ref["image_id"]].append(ref)

    def build(image_id: int) -> AnnotatedImage:
        entry, regions = entries[image_id], []
        for ref in found[image_id]:
            annotation = annotations[ref["ann_id"]]
            for sentence in ref["sentences"]:
                regions.append(
                    {
                        "id": sentence["sent_id"],
                        "box": xywh_to_xyxy(annotation["bbox"]),
                        "mask": annotation.get("segmentation") or None,
                        "category": categories[annotation["category_id"]],
                        "caption": sentence["sent"],
                    }
                )
        name = entry["file_name"]
        size = entry["width"], entry["height"]
        return AnnotatedImage(name, _first_file(images, name), regions, size=size)

    return Source("refcoco", list(found), build, left_out)


def visual_genome(annotations: str, images: str) -> Source:
    """Visual Genome: `region_descriptions.json` (captions) or `objects.json` (categories), `image_data.json` beside
    it, images below `IMAGES`, `IMAGES/VG_100K` or `IMAGES/VG_100K_2`."""
    sizes = {
        entry.get("image_id", entry.get("id")): (entry["width"], entry["height"])
        for entry in json.loads(Path(annotations).with_name("image_data.json").read_text())
    }
    found, left_out = {}, Counter()
    for entry in json.loads(Path(annotations).read_text()):
        key, rows = entry.get("image_id", entry.get("id")), entry.get("regions", entry.get("objects"))
        if key in sizes:
            found[key] = rows
        else:
            left_out["region left out: of an unknown image"] += len(rows)

    def build(image_id: int) -> AnnotatedImage:
        regions = []
        for row in found[image_id]:
            width, height = row.get("width", row.get("w")), row.get("height", row.get("h"))
            regions.append(
                {
                    "id": row.get("region_id", row.get("object_id")),
                    "box": xywh_to_xyxy((row["x"], row["y"], width, height)),
                    "category": (row.get("names") or [None])[0],
                    "caption": row.get("phrase"),
                }
            )
        name = f"{image_id}.jpg"
        path = _first_file(images, name, f"VG_100K/{name}", f"VG_100K_2/{name}")
        return AnnotatedImage(name, path, regions, size=sizes[image_id])

    return Source("vg", list(found), build, left_out)


_PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")


def flickr30k_entities(folder: str, images: str) -> Source:
    """Flickr30k Entities: `Sentences/ID.txt` with marked phrases, `Annotations/ID.xml` with boxes by entity; a region
    for every box and every wording of its entity."""
    names = sorted(path.stem for path in Path(folder, "Annotations").glob("*.xml"))

    def build(item: tuple[int, str]) -> AnnotatedImage:
        position, name = item
        lines = Path(folder, "Sentences", f"{name}.txt").read_text().splitlines()
        phrases, left_out = defaultdict(list), Counter()
        for entity, phrase in (match for line in lines for match in _PHRASE.findall(line)):
            if phrase not in phrases[entity]:
                phrases[entity].append(phrase)
        root = ElementTree.parse(Path(folder, "Annotations", f"{name}.xml")).getroot()
        regions, boxed = [], set()
        for item in root.iter("object"):
            corners = item.find("bndbox")
            for entity in (node.text for node in item.iter("name")):
                if corners is None:
                    continue
                boxed.add(entity)
                # Pixels are counted from one there, and the last one belongs to the box.
                x0, y0, x1, y1 = (int(corners.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax"))
                for phrase in phrases[entity]:
                    number = position * IDS_PER_IMAGE + len(regions)
                    regions.append({"id": number, "box": (x0 - 1, y0 - 1, x1, y1), "caption": phrase})
        left_out["phrase left out: without a box"] = sum(len(phrases[key]) for key in phrases if key not in boxed)
        captions = [_PHRASE.sub(r"\2", line) for line in lines]
        size = int(root.findtext("size/width")), int(root.findtext("size/height"))
        path = Path(images, f"{name}.jpg")
        return AnnotatedImage(name, path, regions, captions, size=size, left_out=left_out)

    return Source("flickr30k", list(enumerate(names)), build)


def grit(folder: str) -> Source:
    """GRIT as img2dataset leaves it, tars or folders with `KEY.json` beside `KEY.jpg`: `caption`, and `noun_chunks`
    and `ref_exps` as [start, end, x0, y0, x1, y1, score], characters of the caption and shares of the image's sides.

    A noun chunk whose box a referring expression has is left out: the expression holds it.
    """
    items = [item for path in sorted(Path(folder).rglob("*.tar")) for item in _tar_pairs(path)]
    for path in sorted(Path(folder).rglob("*.json")):
        image = next((p for s in IMAGE_SUFFIXES if (p := path.with_suffix(s)).is_file()), None)
        if image is not None:
            items.append((None, path, image))

    def build(item: tuple) -> AnnotatedImage:
        position, (tar, metadata, image) = item
        if tar is None:
            name, text, image = metadata.relative_to(folder).with_suffix("").as_posix(), metadata.read_text(), image
        else:
            name = f"{tar.relative_to(folder).with_suffix('').as_posix()}/{metadata[0]}"
            with open(tar, "rb") as file:
                text, image = (_read_at(file, *place) for place in (metadata[1:], image))
        entry = json.loads(text)
        caption, left_out = entry["caption"], Counter()
        rows = _listed(entry.get("ref_exps"))
        taken = {tuple(row[2:6]) for row in rows}
        for row in _listed(entry.get("noun_chunks")):
            if tuple(row[2:6]) in taken:
                left_out["noun chunk left out: part of a referring expression"] += 1
            else:
                rows.append(row)
        regions = [
            {"id": number, "box": row[2:6], "caption": caption[int(row[0]) : int(row[1])], "score": row[6]}
            for number, row in enumerate(rows, start=position * IDS_PER_IMAGE)
        ]
        return AnnotatedImage(name, image, regions, alt_text=caption, normalized=True, left_out=left_out)

    return Source("grit", list(enumerate(items)), build)


def _tar_pairs(path: Path) -> Iterator[tuple]:
    """(tar, (key, offset, size) of the JSON, (offset, size) of the image) for each pair in a tar."""
    with tarfile.open(path) as tar:
        pairs = defaultdict(dict)
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            pairs[key][f".{suffix.lower()}"] = member.offset_data, member.size
    for key, files in pairs.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is not None and ".json" in files:
            yield path, (key, *files[".json"]), image


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _listed(value: Any) -> list:
    """A list, which img2dataset may have written as JSON text."""
    return json.loads(value) if isinstance(value, str) else list(value or ())


def _first_file(folder: str, *names: str) -> Path:
    """The first of the names that is a file below the folder, or the first name."""
    paths = [Path(folder, name) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers and texts; a pickle that asks for anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a refs file holds plain values, not {module}.{name}")
