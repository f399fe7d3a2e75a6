"""Stand-in for aiter, of the time when its reduction took num_kv_splits."""

from .ops.attention import mla_prefill_ps_asm_fwd, mla_reduce_v1
from .ops.mha import flash_attn_func, flash_attn_varlen_func

__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "mla_prefill_ps_asm_fwd",
    "mla_reduce_v1",
]
