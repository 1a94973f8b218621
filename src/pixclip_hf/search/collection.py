"""A folder of embeddings that answers queries."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..embedding.folder import EmbeddingFolder, embedding_matrix
from ..record import LeftOut
from .queries import Query, as_query, check_encoder, encode_queries, load_query_encoder
from .store import Filter, Store, StoreOptions
from .store_folder import open_store

# Boxes of one image that overlap so much (intersection over union) show the same thing.
SAME_BOX = 0.7


@dataclass
class Hit:
    """What a query found.

    Attributes:
        id, image_id, kind, box, mask_area, category, text, score, image_path, position, width, height: the columns of
            [`embedding_schema`].
        cosine: of the query and the embedding.
        duplicates: ids of hits that were folded into this one.
    """

    id: str
    image_id: str
    kind: str
    cosine: float
    box: list[float] | None
    mask_area: float | None
    category: str | None
    text: str | None
    score: float | None
    image_path: str | None
    position: int
    width: int
    height: int
    duplicates: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


_COLUMNS = [name for name in Hit.__dataclass_fields__ if name not in ("cosine", "duplicates")]


class Collection:
    """The embeddings of a folder, searched through a store.

    ```python
    from pixclip_hf.search import Collection, Filter, Query

    photos = Collection("runs/photos")
    for hit in photos.search("a red mug", top=5)[0]:
        print(hit.cosine, hit.image_id, hit.box)
    ```

    Args:
        folder: as `pixclip-hf embed` wrote it.
        store: `"lance"`, `"qdrant"` or `"exact"`.
        options, place: as in [`open_store`].
        model, revision: as in [`load_query_encoder`]; loaded for the first query that needs it.
        encoder: the model, where it is loaded already.
        source: where the images are now, for [`Collection.open_images`]: the words of [`load_records`], or one name.
            By default where they were embedded from.

    Raises:
        ValueError: as [`open_store`]; or an `encoder` of another model than the folder's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        store: str = "lance",
        options: StoreOptions | None = None,
        *,
        place: str | os.PathLike | None = None,
        model: str | os.PathLike | None = None,
        revision: str | None = None,
        encoder: Any = None,
        source: str | Sequence[str] | None = None,
    ):
        self.folder = EmbeddingFolder.open(folder)
        self._model, self._revision = model, revision
        source = self.folder.settings["source"] if source is None else source
        self.source = source if isinstance(source, str) else source[0] if len(source) == 1 else tuple(source)
        if encoder is not None:
            check_encoder(self.folder.settings, encoder)
            self.encoder = encoder
        self.store: Store = open_store(self.folder, store, options, place)

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def encoder(self) -> Any:
        """What embeds queries.

        Raises:
            ValueError: as [`load_query_encoder`].
        """
        return load_query_encoder(self.folder.settings, self._model, self._revision)

    def search(
        self,
        queries: Query | str | Sequence[Query | str],
        top: int = 10,
        where: Filter | None = None,
        fold: float | None = None,
    ) -> list[list[Hit]]:
        """The embeddings nearest to each query.

        Args:
            queries: one or several; a string is a text.
            top: hits per query; fewer where no more meet the filter.
            where: which rows may be hits; all regions when None.
            fold: a hit whose embedding has this cosine or more with that of a better hit, or whose box in the same
                image overlaps that of a better one by 0.7 (intersection over union), is folded into it. None keeps
                all.

        Returns:
            For each query its hits, best first.

        Raises:
            ValueError: no query, `top` below 1, `fold` beyond [-1, 1], an id that the collection does not hold, none
                of the kinds asked for, a box outside of its image, or another model than the collection's.
        """
        asked = [as_query(query) for query in ([queries] if isinstance(queries, Query | str) else queries)]
        where = where or Filter()
        if not asked:
            raise ValueError("`queries` must hold at least one query, got none.")
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        if fold is not None and not -1 <= fold <= 1:
            raise ValueError(f"`fold` must be a cosine, from -1 to 1, got {fold}.")
        if not set(where.kinds) & set(self.folder.settings["kinds"]):
            raise self._no_row(where)
        vectors = self.encode(asked)
        conditions = where.all_conditions()
        limit = (top if fold is None else 3 * top) + any(query.id is not None for query in asked)
        tables = self.store.search(vectors, limit, conditions)
        hits = []
        for query, vector, table in zip(asked, vectors, tables, strict=True):
            found = _hits(table, vector, query.id, fold)
            more = limit
            # Folding, and leaving out itself, may have left too few.
            while len(found) < top and len(table) == more:
                more *= 4
                (table,) = self.store.search(vector[None], more, conditions)
                found = _hits(table, vector, query.id, fold)
            hits.append(found[:top])
        if not any(hits):
            (rows,) = self.store.search(vectors[:1], 1, Filter(where.kinds).all_conditions())
            if not len(rows):
                raise self._no_row(where)
        return hits

    def _no_row(self, where: Filter) -> ValueError:
        kinds = " or ".join(where.kinds)
        return ValueError(f"A collection must hold at least one {kinds}, got none in {str(self.folder.path)!r}.")

    def encode(self, queries: Sequence[Query | str]) -> np.ndarray:
        """The vectors `(Q, D)` of some queries, float32 of unit length.

        Raises:
            ValueError: as [`Collection.search`].
        """
        asked = [as_query(query) for query in queries]
        parts = [part for query in asked for part in (query, *map(as_query, query.negative))]
        ids = list(dict.fromkeys(query.id for query in parts if query.id is not None))
        stored = {}
        if ids:
            rows = self.store.fetch(ids)
            stored = dict(zip(rows["id"].to_pylist(), embedding_matrix(rows), strict=True))
            if missing := [name for name in ids if name not in stored]:
                raise ValueError(f"`id` must be one of the collection's, got {missing[0]!r}.")
        needs_model = any(query.id is None for query in parts)
        return encode_queries(asked, self.encoder if needs_model else None, stored)

    def known_texts(self, number: int) -> list[str]:
        """The first texts that regions of the collection are known to show."""
        texts: dict[str, None] = {}
        for path in self.folder.shards():
            rows = pq.read_table(path, columns=["text"], filters=[("kind", "==", "region")])
            texts.update(dict.fromkeys(text for text in rows["text"].to_pylist() if text))
            if len(texts) >= number:
                break
        return list(texts)[:number]

    def open_images(self, hits: Iterable[Hit]) -> dict[str, Image.Image]:
        """The images of some hits by their `image_id`, RGB and upright.

        Raises:
            FileNotFoundError: an image is no longer where it was.
        """
        from ..data.sources import cached_source
        from ..data.sources.records import read_image

        opened = cached_source(self.source)
        images: dict[str, Image.Image] = {}
        for hit in hits:
            name = hit.image_id
            if name in images:
                continue
            try:
                item = opened.read(hit.position)
                images[name] = read_image(item)[1]
            except (LeftOut, IndexError) as error:
                raise FileNotFoundError(
                    f"The image {name!r} is no longer where it was: `source` may say where it is now."
                ) from error
            if item.name != name:
                raise FileNotFoundError(f"The image {name!r} is no longer where it was: {item.name!r} is there.")
        return images

    def close(self) -> None:
        """Closes the store."""
        self.store.close()


def _hits(rows: pa.Table, vector: np.ndarray, itself: str | None, fold: float | None) -> list[Hit]:
    """Rows as hits by their exact cosines, best first."""
    if not len(rows):
        return []
    embeds = embedding_matrix(rows).astype(np.float32)
    embeds /= np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosines = embeds @ vector
    values = rows.select(_COLUMNS).to_pylist()
    order = [i for i in np.argsort(-cosines, kind="stable") if values[i]["id"] != itself]
    kept: list[int] = []
    hits: list[Hit] = []
    for i in order:
        hit = Hit(**values[i], cosine=float(cosines[i]))
        better = enumerate(kept if fold is not None else ())
        first = next((j for j, row in better if _is_same(hit, hits[j], embeds[i] @ embeds[row], fold)), None)
        if first is not None:
            hits[first].duplicates.append(hit.id)
        else:
            kept.append(i)
            hits.append(hit)
    return hits


def _is_same(hit: Hit, better: Hit, cosine: float, fold: float | None) -> bool:
    if fold is not None and cosine >= fold:
        return True
    if hit.image_id != better.image_id or hit.box is None or better.box is None:
        return False
    return same_box(hit.box, better.box)


def same_box(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two boxes of an image show the same thing: their intersection over union is at least `SAME_BOX`."""
    left, top, right, bottom = np.array([first, second]).T
    common = max(0.0, right.min() - left.max()) * max(0.0, bottom.min() - top.max())
    return bool(common >= SAME_BOX * (((right - left) * (bottom - top)).sum() - common))
