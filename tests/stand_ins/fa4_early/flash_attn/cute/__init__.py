"""Stand-in for the draft of FlashAttention 4 that flash-attn 2.8 ships."""

from .interface import flash_attn_varlen_func

__all__ = ["flash_attn_varlen_func"]
