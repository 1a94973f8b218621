"""The pass that embeds: shards of a source in, tables of embeddings out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.whole_files import whole_file
from ..finite import check_finite
from ..jobs import Shard
from ..jobs.folder import SIZES, file_sizes
from .encoder_choice import EncoderChoice, cached_encoder
from .folder import embedding_features, shard_path
from .reading import Part, Reader, ReadItem, ReadPart, parts_of


class _Reads(Dataset):
    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, part: Part) -> ReadPart:
        return self.reader(part)


class _Once:
    """A sampler that hands out what an iterator gives: shards are asked for while others are embedded."""

    def __init__(self, parts: Iterator[Part]):
        self.parts = parts

    def __iter__(self) -> Iterator[Part]:
        return self.parts


@dataclass
class EmbedPass:
    """Reads the images of a shard, embeds them, and writes the rows.

    Args:
        source: the words of the source.
        output: folder of the run.
        choice: the encoder.
        regions: where regions come from: [`Annotations`], [`Grid`] or [`Proposals`].
        kinds: what is embedded, of [`KINDS`].
        width, dtype: of the column of embeddings.
        batch_size: images per pass of the model.
        readers: processes that read and process images ahead of the model; 0 for none.
        at_least: sides of JPEGs that are decoded at a reduced scale; None decodes all pixels.
    """

    source: str | tuple[str, ...]
    output: Path
    choice: EncoderChoice
    regions: Any
    kinds: tuple[str, ...]
    width: int
    dtype: str = "float16"
    batch_size: int = 32
    readers: int = 0
    at_least: int | None = None
    num_gpus: float = 1

    def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        encoder = cached_encoder(self.choice)
        rows: list[pa.Table] = []
        counts: Counter = Counter()
        for read, embeds in self._embedded(encoder, shards):
            rows.append(self._table(read, embeds))
            counts += read.left_out
            counts["images"] += len(read.items)
            counts["images without regions"] += sum(not item.regions for item in read.items)
            if read.part.last:
                table = pa.concat_tables(rows)
                shard, rows = read.part.shard, []
                path = shard_path(self.output, shard.number)
                with whole_file(path) as unfinished:
                    pq.write_table(table, unfinished, write_page_checksum=True)
                yield shard, {**self._manifest(shard, table, counts), SIZES: file_sizes(self.output, [path])}
                counts = Counter()

    def _embedded(self, encoder: Any, shards: Iterator[Shard]) -> Iterator[tuple[ReadPart, dict[str, np.ndarray]]]:
        """What was read, and its embeddings by kind.

        The model is called for a part before the embeddings of the part in front of it are fetched: a GPU has its next
        work while this process writes.
        """
        shown, whole = "region" in self.kinds, "image" in self.kinds
        reader = Reader(
            self.source,
            self.regions if shown else None,
            encoder.preparation(regions=shown, images=whole) if shown or whole else None,
            "text" in self.kinds,
            self.at_least,
        )
        parts = _Once(parts_of(shards, self.batch_size))
        on_gpu = encoder.model.device.type == "cuda"
        loader = DataLoader(
            _Reads(reader),
            batch_size=None,
            sampler=parts,
            num_workers=self.readers,
            prefetch_factor=4 if self.readers else None,
            pin_memory=on_gpu,
            collate_fn=_as_it_is,
            # A generator of its own: the loader would draw from the global one, which the caller may be using.
            generator=torch.Generator(),
        )
        before: tuple[ReadPart, dict[str, torch.Tensor]] | None = None
        for read in loader:
            embeds = self._encode(encoder, read)
            if before is not None:
                yield before[0], _fetched(before[1])
            before = read, embeds
        if before is not None:
            yield before[0], _fetched(before[1])

    def _encode(self, encoder: Any, read: ReadPart) -> dict[str, torch.Tensor]:
        embeds: dict[str, torch.Tensor] = {}
        if read.inputs is not None:
            regions, images = encoder.encode_prepared(read.inputs, self.batch_size)
            embeds = {"region": regions} if "region" in self.kinds else {}
            if images is not None:
                embeds["image"] = images
            read.inputs = None  # as large as the images
        if texts := [text for item in read.items for text in item.captions]:
            embeds["text"] = encoder.encode_texts(
                texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
            )
        return embeds

    def _table(self, read: ReadPart, embeds: dict[str, np.ndarray]) -> pa.Table:
        """The rows of a part: of each kind those of all its images, in the order of the source."""
        features = embedding_features(self.width, self.dtype)
        schema = features.arrow_schema
        tables = [schema.empty_table()]
        for kind in self.kinds:
            if (values := embeds.get(kind)) is None or not len(values):
                continue
            described = [row for item in read.items for row in _described(kind, item)]
            check_finite(values, f"The embedding of the {kind}", [row["id"] for row in described])
            columns = {name: [row.get(name) for row in described] for name in features if name != "embedding"}
            flat = pa.array(np.ascontiguousarray(values, dtype=self.dtype).reshape(-1))
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, self.width)
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            tables.append(pa.table(arrays, schema=schema))
        return pa.concat_tables(tables)

    def _manifest(self, shard: Shard, table: pa.Table, counts: Counter) -> dict[str, Any]:
        found = Counter(table["kind"].to_pylist())
        left_out = {name: count for name, count in sorted(counts.items()) if name != "images"}
        return {
            "positions": [shard.start, shard.stop],
            "images": counts["images"],
            **{f"{kind}s": found[kind] for kind in self.kinds},
            "counts": {name: count for name, count in left_out.items() if count},
        }


def _described(kind: str, item: ReadItem) -> Sequence[dict[str, Any]]:
    """The rows of an image of one kind, without their embeddings."""
    row = {
        "image_id": item.image_id,
        "kind": kind,
        "image_path": item.path,
        "position": item.position,
        "width": item.size[0],
        "height": item.size[1],
    }
    if kind == "image":
        return [{**row, "id": item.image_id}]
    if kind == "text":
        return [{**row, "id": f"{item.image_id}#text-{n}", "text": text} for n, text in enumerate(item.captions)]
    return [
        {
            **row,
            "id": f"{item.image_id}#{region['id']}",
            "box": region["box"],
            "mask_area": area,
            "category": region["category"],
            "text": region["caption"] or region["long_caption"] or region["category"],
            "score": region["score"],
        }
        for region, area in zip(item.regions, item.areas, strict=True)
    ]


def _fetched(embeds: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {kind: values.float().cpu().numpy() for kind, values in embeds.items()}


def _as_it_is(read: Any) -> Any:
    return read
