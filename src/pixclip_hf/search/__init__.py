"""Search over a collection that was embedded: a store of its embeddings, and queries by text, region and image."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collection import Collection, Hit
    from .queries import Query
    from .store import Filter, StoreOptions

__all__ = ["Collection", "Filter", "Hit", "Query", "StoreOptions"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    modules = {"Collection": "collection", "Hit": "collection", "Query": "queries"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{modules.get(name, 'store')}", __name__), name)
