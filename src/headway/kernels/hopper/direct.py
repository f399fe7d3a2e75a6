"""Starting a compiled kernel with next to no work on the host.

Triton's own launch path binds, specialises and hashes every argument, and encodes every tensor descriptor,
on each call: tens of microseconds, more than a decode kernel takes. A :class:`DirectLaunch` hands the
arguments of an already compiled kernel to the C function underneath. Encoded descriptors are values that
depend on nothing but their numbers, so they are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from headway.errors import InvalidInputError
from headway.kernels._triton import triton

#: A descriptor as kernels take it: the encoded map, then its shape, then its strides.
TensorMap = tuple[Any, ...]

#: CUtensorMapDataType, CUtensorMapSwizzle
_MAP_DTYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}


def misaligned(
    name: str, address: int, strides: tuple[int, ...], itemsize: int
) -> InvalidInputError:
    """The refusal of a tensor whose rows do not start at multiples of 16 bytes."""
    return InvalidInputError(
        name,
        f"strides {strides} of {itemsize} bytes, {address % 16} bytes above a multiple of 16",
        "a last stride of 1, other strides and the address multiples of 16 bytes",
    )


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> TensorMap:
    """Encode a tiled tensor map whose boxes land in the default swizzle of their rows' bytes.

    Args:
        address: of the first element, a multiple of 16.
        strides: in elements, the last 1, others multiples of 16 bytes.
        box: rows and columns copied at once; wide rows are split into pieces of 128 bytes.

    Raises:
        InvalidInputError: address or strides are not as above.
    """
    if address % 16 or strides[-1] != 1 or any(n * dtype.itemsize % 16 for n in strides[:-1]):
        raise misaligned("k and v", address, strides, dtype.itemsize)
    row_bytes = min(box[-1] * dtype.itemsize, 128)
    utils = triton.runtime.driver.active.utils
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    encoded = encode(
        address,
        _SWIZZLES[row_bytes],
        dtype.itemsize,
        _MAP_DTYPES[dtype],
        [*box[:-1], row_bytes // dtype.itemsize],
        list(shape),
        list(strides),
        0,
    )
    return (encoded, *shape, *strides)


class DirectLaunch:
    """A compiled kernel. Called with its arguments in order: addresses, numbers, tensor maps expanded."""

    def __init__(self, kernel: Any) -> None:
        run = kernel.run  # loads the module on first use
        head = (kernel.function, run.launch_cooperative_grid, run.launch_pdl)
        no_hooks_or_scratch = (None, None, None, None, None)
        self._as_tuple = hasattr(run, "kernel_signature")
        if self._as_tuple:  # from 3.7: one C function, told what the arguments are
            self._launch = triton.runtime.driver.active.utils.launch
            told = (run.arg_annotations, run.kernel_signature)
            self._head: tuple[Any, ...] = (
                *head,
                kernel.packed_metadata,
                *no_hooks_or_scratch,
                *told,
            )
            return
        launch = run.launch
        if launch.__class__.__name__ == "function":  # wraps the C function to encode descriptors
            cells = dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))
            launch = cells["launcher"].cell_contents
        self._launch = launch
        self._head = (*head, None, None, kernel.packed_metadata, None, None, None)

    def __call__(self, programs: int, device_index: int, *args: Any) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device_index)
        if self._as_tuple:
            self._launch(programs, 1, 1, stream, *self._head, args)
        else:
            self._launch(programs, 1, 1, stream, *self._head, *args)
