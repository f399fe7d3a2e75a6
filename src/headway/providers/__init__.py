"""Providers, by name. Each is one module, imported when it is first asked for."""

from __future__ import annotations

import functools
import importlib

from headway.providers.base import Capabilities, Feature, Provider

__all__ = ["NAMES", "PINNED_ONLY", "Capabilities", "Feature", "Provider", "forget", "get"]

#: Every provider. Which is tried first on what device is said in providers/order.py.
NAMES = (
    "hopper",
    "portable",
    "cpu",
    "fa3",
    "fa4",
    "fa2",
    "flashinfer",
    "aiter",
    "mate",
    "reference",
)

#: ``reference`` is the specification, not a contender: it runs only where it is asked for by name.
PINNED_ONLY = frozenset({"reference"})


@functools.cache
def get(name: str) -> Provider:
    """The provider of that name."""
    provider: Provider = importlib.import_module(f"headway.providers.{name}").PROVIDER
    return provider


def forget() -> None:
    """Look for packages anew. What was chosen stays chosen: see :func:`headway.dispatch.forget`."""
    from headway.providers import _packages

    _packages.forget()
    get.cache_clear()
