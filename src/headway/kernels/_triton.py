"""The only file that imports Triton. Differences between its versions, and its interpreter, end here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "GPUTarget",
    "TensorDescriptor",
    "aggregate",
    "async_copy",
    "cdiv",
    "cta_barrier",
    "descriptor",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "jit",
    "launch",
    "mbarrier",
    "next_power_of_2",
    "rows_load",
    "tl",
    "tma",
    "tma_load",
    "tma_store",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

jit = triton.jit
cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2

#: Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), in numpy on CPU tensors.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Hopper's names moved between 3.6 and 3.9; kernels use these.
#: Bulk tensor copies: in (descriptor, coordinates, barrier, smem, pred=True), out (descriptor,
#: coordinates, smem).
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
#: Copies to shared memory by threads: (smem, pointers, mask=None).
rows_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
#: A barrier over the threads of the calling partition.
cta_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# Views of shared memory lost their underscore in 3.9; kernels use the older name.
if not hasattr(gl.shared_memory_descriptor, "_reinterpret"):
    gl.shared_memory_descriptor._reinterpret = gl.shared_memory_descriptor.reinterpret
#: A struct of Gluon values.
aggregate = getattr(gluon, "aggregate", None) or triton.language.core._aggregate


def _let_scalars_index() -> None:
    """Let the interpreter's scalars, arrays of one element, be loop bounds: numpy 2.4 refuses them."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


if INTERPRETED.value:
    _let_scalars_index()


def descriptor(
    base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: list[int], layout: Any
) -> Any:
    """A TMA descriptor of ``base``'s memory, without TensorDescriptor's checks, which take longer than a
    launch: the caller answers for 16-byte alignment, positive sizes and a contiguous last dimension."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = base, shape, strides
    made.block_shape, made.layout, made.padding = block_shape, layout, "zero"
    if hasattr(TensorDescriptor, "round_f32_to_tf32"):
        made.round_f32_to_tf32 = False
    return made


_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    key: Hashable,
    args: tuple[Any, ...],
    **options: Any,
) -> None:
    """Launch a jit kernel on ``args``, all its parameters in order, of which num_warps is the last.

    ``key`` stands for everything the compiled code depends on, the device, the alignment of pointers and
    the compiler's ``options`` included: equal keys skip Triton's own look at the arguments.
    """
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args[:-1], num_warps=args[-1], **options)
    else:
        compiled[grid](*args)
