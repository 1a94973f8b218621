"""A registry of adapters: what is special about a family of towers, by the `model_type` of its configuration."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Adapter = TypeVar("Adapter")


class AdapterRegistry(Generic[Adapter]):
    """The adapter of each family of towers.

    Args:
        others: speaks for the families that are not registered.
    """

    def __init__(self, others: Adapter):
        self.others = others
        self.adapters: dict[str, Adapter] = {}

    def register(self, *model_types: str) -> Callable[[type[Adapter]], type[Adapter]]:
        """Class decorator: the adapter of the towers whose configuration has one of these `model_type`s."""

        def keep(adapter_class: type[Adapter]) -> type[Adapter]:
            self.adapters.update(dict.fromkeys(model_types, adapter_class()))
            return adapter_class

        return keep

    def of(self, config: Any) -> Adapter:
        """The adapter of a tower's configuration."""
        return self.adapters.get(config.model_type, self.others)
