"""Attention in Triton for any GPU it compiles for: one op per file, the pieces they share beside them."""
