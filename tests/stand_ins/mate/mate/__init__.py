"""Stand-in for MATE 0.2.2."""

from .mha_interface import flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"]
