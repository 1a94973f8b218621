"""Streams: whatever a shard holds, what comes out are records that train, and the others are counted."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import torch
from cases import fuzz, json_values, one_replaced, plain_numbers
from hypothesis import strategies as st
from PIL import Image
from shared_tokenizer import build_tokenizer

from pixclip_hf import CLOCProcessor, PixCLIPProcessor, RegionImageProcessor
from pixclip_hf.data.collator import RegionCollator
from pixclip_hf.data.stream_shards import tar_rows
from pixclip_hf.data.streaming import RecordStream, StreamLoader

COLLATORS = {
    processor.__name__: RegionCollator(
        processor(RegionImageProcessor(size={"height": 12, "width": 16}), build_tokenizer()), allow_nothing=True
    )
    for processor in (CLOCProcessor, PixCLIPProcessor)
}


def png(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="TIFF" if mode in ("I", "F") else "PNG")
    return buffer.getvalue()


PICTURES = {
    (mode, size): png(mode, size) for mode in ("RGB", "L", "1", "I", "F", "RGBA") for size in ((1, 1), (20, 14))
}
boxes = st.one_of(
    st.sampled_from([[0, 0, 1, 1], [0, 0, 1e-4, 1], [-5e-4, 0, 1.0005, 1], [0, 0, 20.0005, 14], [19, 13, 20, 14]]),
    one_replaced(st.lists(st.integers(0, 20), min_size=4, max_size=4), plain_numbers),
    json_values,
)
texts = st.one_of(st.sampled_from(["a cup", "", " ", None, "\u2028"]), json_values)
masks = st.one_of(
    st.none(), st.sampled_from([{"size": [1, 1], "counts": "01"}, {"size": [14, 20], "counts": "15V8"}]), json_values
)
regions = st.one_of(
    st.fixed_dictionaries(
        {"id": st.one_of(st.integers(0, 3), plain_numbers), "box": boxes, "caption": texts},
        optional={"mask": masks, "category": texts, "long_caption": texts, "score": plain_numbers, "source": texts},
    ),
    json_values,
)
rows = st.fixed_dictionaries(
    {
        "image": st.sampled_from([*PICTURES.values(), b"", b"x"]),
        "fields": st.fixed_dictionaries(
            {
                "captions": st.one_of(st.lists(texts, max_size=2), texts),
                "regions": st.one_of(st.lists(regions, max_size=3), json_values),
            },
            optional={
                "width": st.sampled_from([1, 20, 0]),
                "height": st.sampled_from([1, 14, 10**400]),
                "alt_text": texts,
            },
        ),
        "sized": st.booleans(),
    }
)
GOOD = {
    "captions": ["a cup"],
    "alt_text": None,
    "regions": [
        {
            "id": 9,
            "box": [0, 0, 1, 1],
            "mask": None,
            "category": "cup",
            "caption": "a cup",
            "long_caption": None,
            "score": 1.0,
            "source": None,
        }
    ],
}


def write(path, found):
    """A tar of records, the last of which trains."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate([*found, {"image": PICTURES["RGB", (1, 1)], "fields": GOOD, "sized": True}]):
            fields = {"alt_text": None, **row["fields"]}
            if row["sized"]:
                try:
                    fields["width"], fields["height"] = Image.open(io.BytesIO(row["image"])).size
                except Exception:  # no image: any size will do
                    fields["width"] = fields["height"] = 1
            for suffix, content in (("png", row["image"]), ("json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@fuzz(
    1200, found=st.lists(rows, min_size=1, max_size=5), name=st.sampled_from(sorted(COLLATORS)), size=st.integers(1, 3)
)
def test_what_a_stream_gives_trains(found, name, size):
    from datasets import IterableDataset

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.tar")
        write(path, found)
        shards = IterableDataset.from_generator(tar_rows, gen_kwargs={"files": [str(path)]})
        stream = RecordStream(shards, shuffle_buffer=4, max_corrupt_share=0.5)
        loader = StreamLoader(stream, COLLATORS[name], size)
        batches = iter(loader)
        for _ in range(2):
            batch = next(batches)
            assert len(batch["pixel_values"]) == size
            for key, value in batch.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    assert torch.isfinite(value).all(), key
            if "region_boxes" in batch:
                shares, real = batch["region_boxes"], batch["region_attention_mask"].bool()
                assert (shares[real][:, 2:] > shares[real][:, :2]).all()
        assert loader.corrupt + loader.left_out >= 0
