"""Annotation readers of training, annotation and evaluation: a record of the schema, or a named error for one item."""

import json
import shutil
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from cases import NAMED, fuzz, json_values, named_errors, one_replaced, plain_numbers
from hypothesis import strategies as st
from PIL import Image

from pixclip_hf.data.sources import open_source
from pixclip_hf.data.sources.records import RecordRows
from pixclip_hf.evaluation.image_sets import read_images
from pixclip_hf.images import open_image
from pixclip_hf.processing.processing_regions import read_boxes, read_runs_or_mask
from pixclip_hf.record import validate_record

SIZE = (20, 14)
boxes = one_replaced(st.lists(st.integers(0, 14), min_size=4, max_size=4), json_values)
rings = one_replaced(st.lists(st.integers(0, 14), min_size=6, max_size=6), plain_numbers)
masks = st.one_of(
    st.lists(rings, max_size=2),
    st.fixed_dictionaries(
        {
            "size": st.one_of(st.just([14, 20]), json_values),
            "counts": st.one_of(st.just([5, 5, 270]), st.just("55~7"), json_values),
        }
    ),
    json_values,
)
names = st.sampled_from(["a", "a b", "", None, 7, "\u2028", "\ud800"])
ids = st.one_of(st.integers(0, 5), plain_numbers)
texts = st.one_of(st.sampled_from(["a cup", "", "  ", "\u2028x"]), json_values)


def entries(**fields):
    """Objects with most of these fields, some of them of another type."""
    return st.fixed_dictionaries(
        {}, optional={name: st.one_of(value, value, json_values) for name, value in fields.items()}
    )


@st.composite
def coco_files(draw):
    annotations = entries(
        id=ids,
        image_id=st.just(1),
        bbox=boxes,
        segmentation=masks,
        category_id=st.integers(1, 2),
        iscrowd=st.integers(0, 1),
        caption=texts,
        score=plain_numbers,
    )
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 20, "height": 14},
            *draw(st.lists(entries(id=ids, file_name=names, width=plain_numbers, height=plain_numbers), max_size=2)),
        ],
        "categories": [{"id": 1, "name": "cup"}, *draw(st.lists(entries(id=ids, name=names), max_size=2))],
        "annotations": draw(st.lists(annotations, max_size=4)),
    }
    return (
        "coco",
        {"annotations/instances_val2017.json": json.dumps(content)},
        {"annotations": "annotations/instances_val2017.json", "images": "val2017"},
    )


@st.composite
def region_lines(draw):
    regions = st.lists(
        entries(id=ids, box=boxes, segmentation=masks, category=names, caption=texts, expressions=texts), max_size=3
    )
    lines = draw(
        st.lists(
            entries(
                image=st.just("val2017/a.png"), width=st.just(20), height=st.just(14), captions=texts, regions=regions
            ),
            min_size=1,
            max_size=3,
        )
    )
    return "regions", {"regions.jsonl": "\n".join(map(json.dumps, lines)) + "\n"}, {"folder": "."}


@st.composite
def yolo_files(draw):
    values = st.one_of(plain_numbers, st.sampled_from(["x", "1e999", "nan", "9" * 5000]))
    lines = draw(st.lists(st.lists(values, max_size=9).map(lambda line: " ".join(map(str, line))), max_size=3))
    return (
        "yolo",
        {"images/a.png": None, "labels/a.txt": "\n".join(lines), "data.yaml": "names: [cup, mug]\ntrain: images\n"},
        {"data": "data.yaml", "split": "train"},
    )


@st.composite
def voc_files(draw):
    edges = st.one_of(st.integers(1, 20), plain_numbers, st.sampled_from(["x", ""]))
    found = ""
    for _ in range(draw(st.integers(0, 2))):
        corners = "".join(f"<{name}>{str(draw(edges))}</{name}>" for name in ("xmin", "ymin", "xmax", "ymax"))
        name = escape(draw(st.sampled_from(["cup", "", "<b>"])))
        found += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    size = "".join(
        f"<{side}>{str(draw(st.one_of(st.just(value), plain_numbers)))}</{side}>"
        for side, value in (("width", 20), ("height", 14))
    )
    return (
        "voc",
        {"JPEGImages/a.jpg": None, "Annotations/a.xml": f"<annotation><size>{size}</size>{found}</annotation>"},
        {"folder": "."},
    )


@st.composite
def csv_files(draw):
    cells = st.one_of(plain_numbers.map(str), st.sampled_from(["", "x", '"a, b"']))
    rows = draw(
        st.lists(st.lists(cells, min_size=6, max_size=6).map(lambda row: ",".join(["a.png", *row])), max_size=3)
    )
    return (
        "csv",
        {"t.csv": "\n".join(["image,x0,y0,x1,y1,id,score", "a.png,1,2,9,9,1,1", *rows])},
        {"table": "t.csv", "images": "val2017"},
    )


@st.composite
def vg_files(draw):
    regions = st.lists(
        entries(
            region_id=ids, x=plain_numbers, y=plain_numbers, width=plain_numbers, height=plain_numbers, phrase=texts
        ),
        max_size=3,
    )
    content = draw(st.lists(entries(id=st.just(1), regions=regions), min_size=1, max_size=2))
    sizes = draw(st.lists(entries(image_id=st.just(1), width=st.just(20), height=st.just(14)), max_size=2))
    return (
        "vg",
        {"r.json": json.dumps(content), "image_data.json": json.dumps(sizes), "val2017/1.jpg": None},
        {"annotations": "r.json", "images": "val2017"},
    )


class Folders:
    """A folder for each case, with its files and a picture where a file has no content."""

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp())
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, files):
        for name, content in {"val2017/a.png": None, **files}.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 99, dtype=np.uint8)).save(path)
            else:
                path.write_bytes(content.encode("utf-8", "surrogatepass"))


def opened(folder, case):
    kind, files, arguments = case
    folder.write(files)
    paths = {name: value if name == "split" else str(folder.path / value) for name, value in arguments.items()}
    return open_source(kind, **paths)


@fuzz(1500, case=st.one_of(coco_files(), region_lines(), yolo_files(), voc_files(), csv_files(), vg_files()))
def test_a_record_or_a_named_error(case):
    with Folders() as folder:
        try:
            source = opened(folder, case)
        except NAMED as error:
            assert "source" in str(error) or str(folder.path) in str(error), error
            return
        rows = RecordRows(source)
        for position in range(len(source)):
            with named_errors("cannot be read"):
                (record,) = rows.make(
                    [position], ["image", "width", "height", "captions", "alt_text", "regions"]
                ).to_pylist()
                record["image"] = open_image(record["image"])
                validate_record(record)


@fuzz(400, case=st.one_of(coco_files(), region_lines()))
def test_evaluation_reads_what_can_be_embedded(case):
    with Folders() as folder:
        folder.write(case[1])
        with named_errors("has no image", "cannot be read", "missing", "must", "holds"):
            found = read_images("region-classification", str(folder.path))
            for record in found.records:
                size = record["height"], record["width"]
                for region in record["regions"]:
                    read_boxes([region["box"]], size, "boxes", normalized=False)
                    if region["mask"] is not None:
                        read_runs_or_mask(region["mask"], size, "masks")
                    assert region["category"] is None or region["category"] in found.categories
