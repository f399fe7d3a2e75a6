"""Flash attention for LLM serving: one interface, every feature, any device."""

from headway.dispatch import Explanation
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
    "merge_states",
]
