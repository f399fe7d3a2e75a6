"""Flash attention for LLM serving: one interface, every feature, any device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway import mla, quant
    from headway.dispatch import Explanation, is_fa3_supported, supported_versions
    from headway.errors import HeadwayError, HeadwayWarning, InvalidInputError, UnsupportedError
    from headway.interface import (
        explain,
        flash_attn_combine,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
        merge_states,
    )
    from headway.plan import Plan
    from headway.problem import debug_checks

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "HeadwayError",
    "HeadwayWarning",
    "InvalidInputError",
    "Plan",
    "UnsupportedError",
    "debug_checks",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "is_fa3_supported",
    "merge_states",
    "mla",
    "quant",
    "supported_versions",
]

#: Where each public name that is not in ``interface`` lives. Names are imported when first asked for:
#: the command line and the load generator work without torch, and answer before it would be loaded.
_HOMES = {
    "Explanation": "dispatch",
    "HeadwayError": "errors",
    "HeadwayWarning": "errors",
    "InvalidInputError": "errors",
    "Plan": "plan",
    "UnsupportedError": "errors",
    "debug_checks": "problem",
    "is_fa3_supported": "dispatch",
    "supported_versions": "dispatch",
}


#: Modules that are public themselves.
_MODULES = frozenset({"mla", "quant"})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"headway.{name}")
    value = getattr(importlib.import_module(f"headway.{_HOMES.get(name, 'interface')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
