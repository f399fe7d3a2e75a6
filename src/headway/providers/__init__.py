"""Providers, by name. Each is one module, imported when it is first asked for."""

from __future__ import annotations

import functools
import importlib

from headway.providers.base import Capabilities, Feature, Provider

__all__ = ["NAMES", "Capabilities", "Feature", "Provider", "get"]

#: Every provider, best first: where several would run a call, the first is chosen.
#: ``reference`` is the specification, not a contender: it runs only where it is asked for by name.
NAMES = ("portable", "cpu", "reference")


@functools.cache
def get(name: str) -> Provider:
    """The provider of that name."""
    provider: Provider = importlib.import_module(f"headway.providers.{name}").PROVIDER
    return provider
