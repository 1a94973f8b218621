"""Qdrant: in local mode a folder, or a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import pyarrow as pa
from qdrant_client import QdrantClient, models

from .store import Condition, StoreOptions, store_schema

BATCH = 512
FILTERED = {
    "kind": models.PayloadSchemaType.KEYWORD,
    "category": models.PayloadSchemaType.KEYWORD,
    "score": models.PayloadSchemaType.FLOAT,
    "side": models.PayloadSchemaType.FLOAT,
    "share": models.PayloadSchemaType.FLOAT,
}


class QdrantStore:
    """A collection of Qdrant: embeddings as vectors, all other columns as payload.

    In local mode (no `url`) the client keeps everything in the memory of this process and compares every row; one
    process at a time may open it. A server indexes by HNSW.

    Args:
        place, name, width, dtype, options: as in [`Store`].

    Raises:
        ValueError: an unknown index, or a folder that another process has open.
    """

    INDEXES = ("auto", "none", "HNSW")

    def __init__(self, place: Path, name: str, width: int, dtype: str, options: StoreOptions):
        self.check(width, options)
        self.name, self.options, self.schema = name, options, store_schema(width, dtype)
        if options.url is None:
            try:
                self._client = QdrantClient(path=str(place))
            except RuntimeError as error:  # what the client raises where its folder is locked
                raise ValueError(f"The store {str(place)!r} is open in another process or another object.") from error
        else:
            self._client = QdrantClient(url=options.url)
        if not self._client.collection_exists(name):
            datatype = models.Datatype.FLOAT16 if dtype == "float16" else models.Datatype.FLOAT32
            vectors = models.VectorParams(
                size=width, distance=models.Distance.COSINE, datatype=datatype, on_disk=options.url is not None
            )
            self._client.create_collection(name, vectors_config=vectors)

    @classmethod
    def check(cls, width: int, options: StoreOptions) -> None:
        if options.index not in cls.INDEXES:
            raise ValueError(f"`index` of the store 'qdrant' must be one of {cls.INDEXES}, got {options.index!r}.")

    def __len__(self) -> int:
        return self._client.count(self.name, exact=True).count

    def add(self, shard: int, rows: pa.Table, again: bool) -> None:
        # A point's id follows from the row's: what an interrupted run has added is written over.
        for batch in rows.cast(self.schema).to_batches(max_chunksize=BATCH):
            points = [
                models.PointStruct(id=str(uuid5(NAMESPACE_URL, row["id"])), vector=row.pop("embedding"), payload=row)
                for row in batch.to_pylist()
            ]
            self._client.upsert(self.name, points=points, wait=True)

    def build(self) -> None:
        """On a server, indexes the columns that filters use; vectors are indexed as they come."""
        if self.options.url is not None:
            for column, kind in FILTERED.items():
                self._client.create_payload_index(self.name, column, field_schema=kind)

    def search(self, vectors: np.ndarray, limit: int, where: Sequence[Condition] = ()) -> list[pa.Table]:
        parameters = models.SearchParams(hnsw_ef=self.options.probes, exact=self.options.index == "none")
        requests = [
            models.QueryRequest(
                query=vector.tolist(),
                limit=limit,
                filter=models.Filter(must=[_condition(*condition) for condition in where]) if where else None,
                params=parameters,
                with_payload=True,
                with_vector=True,
            )
            for vector in np.asarray(vectors, dtype=np.float32)
        ]
        return [self._table(found.points) for found in self._client.query_batch_points(self.name, requests)]

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        keys = [str(uuid5(NAMESPACE_URL, name)) for name in ids]
        return self._table(self._client.retrieve(self.name, keys, with_payload=True, with_vectors=True))

    def close(self) -> None:
        self._client.close()

    def _table(self, points: Sequence[Any]) -> pa.Table:
        rows = [{**point.payload, "embedding": point.vector} for point in points]
        return pa.Table.from_pylist(rows, schema=self.schema)


def _condition(column: str, operator: str, value: Any) -> models.FieldCondition:
    if operator == "in":
        return models.FieldCondition(key=column, match=models.MatchAny(any=list(value)))
    limits = models.Range(gte=value) if operator == ">=" else models.Range(lte=value)
    return models.FieldCondition(key=column, range=limits)
