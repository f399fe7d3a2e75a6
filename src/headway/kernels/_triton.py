"""The only file that imports Triton. Differences between its versions, and its interpreter, end here."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

__all__ = ["INTERPRETED", "GPUTarget", "cdiv", "jit", "next_power_of_2", "tl", "triton"]

jit = triton.jit
cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2

#: Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), in numpy on CPU tensors.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
