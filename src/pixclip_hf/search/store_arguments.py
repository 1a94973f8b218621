"""The arguments that say where a collection's embeddings are stored and how they are indexed."""

import argparse
from dataclasses import fields
from pathlib import Path

from .store import STORES, StoreOptions


def add_store_arguments(parser: argparse.ArgumentParser, store: str | None, store_help: str) -> None:
    """Adds them to a parser.

    Args:
        parser: of a command.
        store: the default of `--store`.
        store_help: what the command does with the store.
    """
    parser.add_argument("--store", choices=STORES, default=store, help=store_help)
    parser.add_argument("--store_dir", type=Path, help="folder of the store; by default in that of the embeddings")
    parser.add_argument("--url", help="object storage of LanceDB, or server of Qdrant, in place of a local folder")
    parser.add_argument("--index", help="index type, or none for exact search; by default that which the store has")
    parser.add_argument("--partitions", type=int, help="partitions of LanceDB's index")
    parser.add_argument("--sub_vectors", type=int, help="bytes per vector of IVF_PQ")
    parser.add_argument(
        "--probes", type=int, help="partitions (LanceDB; a fifth of them by default) or candidates (Qdrant) of a query"
    )


def store_options(arguments: argparse.Namespace) -> StoreOptions:
    """
    Raises:
        ValueError: as [`StoreOptions`].
    """
    return StoreOptions(**{field.name: getattr(arguments, field.name) for field in fields(StoreOptions)})
