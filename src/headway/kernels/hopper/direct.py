"""Starting a compiled kernel with next to no work on the host.

Triton's own launch path binds, specialises and hashes every argument, and encodes every tensor descriptor,
on each call: tens of microseconds, more than a decode kernel takes. A :class:`DirectLaunch` hands the
arguments of an already compiled kernel to the C function underneath, where it knows that function: for a
Triton that is newer than those it was written against, it takes Triton's own path. Encoded descriptors are
values that depend on nothing but their numbers, so :class:`Boxes` keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.kernels._triton import INTERPRETED, descriptor, triton

#: A descriptor as launches take it: the encoded map, then its shape, then its strides; or, on Triton's own
#: path, one object.
TensorMap = tuple[Any, ...]

#: Versions of Triton from this one on are not known to have the C function that they had before.
_UNKNOWN_FROM = (3, 10)

#: Addresses whose encoded descriptors are kept for one kind of tensor.
_MOST_MAPS = 256

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
    _check_alignment(address, dtype, strides)
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


def _check_alignment(address: int, dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    if address % 16 or strides[-1] != 1 or any(n * dtype.itemsize % 16 for n in strides[:-1]):
        raise misaligned("k and v", address, strides, dtype.itemsize)


class DirectLaunch:
    """A compiled kernel. Called with its arguments in order: addresses, numbers, tensor maps' arguments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known = _c_function(kernel)
        self.is_direct = self._known is not None

    def tensor_map(
        self,
        address: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
    ) -> TensorMap:
        """The arguments that stand for a descriptor; see :func:`tensor_map`."""
        if self.is_direct:
            return tensor_map(address, dtype, shape, strides, box)
        _check_alignment(address, dtype, strides)
        base: Any = SimpleNamespace(data_ptr=lambda: address)
        return (descriptor(base, list(shape), list(strides), list(box), None),)

    def __call__(
        self, grid: tuple[int, int, int], device_index: int, args: tuple[Any, ...]
    ) -> None:
        if self._known is None:
            self._kernel[grid](*args)
            return
        launch, head, as_tuple = self._known
        stream = torch._C._cuda_getCurrentRawStream(device_index)
        if as_tuple:
            launch(*grid, stream, *head, args)
        else:
            launch(*grid, stream, *head, *args)


class Boxes:
    """Tensors of one dtype, shape and strides, as boxes of them are copied; see :func:`tensor_map`."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
        layout: Any,
    ) -> None:
        self._form = dtype, shape, strides, box
        self._layout = layout  # of a box in shared memory
        #: by address; only what is started directly leaves any
        self.maps: dict[int, TensorMap] = {}

    def __call__(self, launch: DirectLaunch, address: int) -> TensorMap:
        """The arguments that stand for the descriptor of the tensor that begins here."""
        if not launch.is_direct:
            return launch.tensor_map(address, *self._form)
        found = self.maps.get(address)
        if found is None:
            if len(self.maps) >= _MOST_MAPS:
                self.maps.clear()
            found = self.maps[address] = launch.tensor_map(address, *self._form)
        return found

    def described(self, t: Tensor) -> Any:
        """The descriptor of such a tensor as kernels are compiled for it."""
        _, shape, strides, box = self._form
        return descriptor(t, list(shape), list(strides), list(box), self._layout)


#: Kernels that :func:`launch` has started, by its keys.
_STARTED: dict[Hashable, DirectLaunch] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    key: Hashable,
    args: tuple[Any, ...],
    **options: Any,
) -> None:
    """Launch a jit kernel on ``args``, all its parameters in order, of which num_warps is the last.

    ``key`` stands for everything the compiled code depends on, the device, the alignment of pointers and
    the compiler's ``options`` included: equal keys skip Triton's own look at the arguments. The first of
    ``args`` is a tensor, on the device that is meant; none is a descriptor.
    """
    if INTERPRETED.value:
        kernel[grid](*args[:-1], num_warps=args[-1])
        return
    found = _STARTED.get(key)
    if found is None:
        compiled = kernel.warmup(*args[:-1], num_warps=args[-1], grid=grid, **options)
        found = _STARTED[key] = DirectLaunch(compiled)
    addresses = tuple([a.data_ptr() if isinstance(a, Tensor) else a for a in args])
    found(grid, args[0].device.index, addresses)


def _c_function(kernel: Any) -> tuple[Callable[..., None], tuple[Any, ...], bool] | None:
    """What starts a kernel, its arguments between the stream and the kernel's own, and whether those are
    given as one tuple. None where that is not known, or where Triton's path does more than start it."""
    run = kernel.run  # loads the module on first use
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    needs = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if version >= _UNKNOWN_FROM or any(getattr(run, name, 0) for name in needs):
        return None
    if not hasattr(run, "launch_pdl"):  # another vendor's
        return None
    head: tuple[Any, ...] = (kernel.function, run.launch_cooperative_grid, run.launch_pdl)
    if hasattr(run, "kernel_signature"):  # from 3.7: one C function, told what the arguments are
        told = (run.arg_annotations, run.kernel_signature)
        head = (*head, kernel.packed_metadata, None, None, None, None, None, *told)
        return triton.runtime.driver.active.utils.launch, head, True
    launch = run.launch
    if launch.__class__.__name__ == "function":  # wraps the C function to encode descriptors
        cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
        if "launcher" not in cells:
            return None
        launch = cells["launcher"].cell_contents
    return launch, (*head, None, None, kernel.packed_metadata, None, None, None), False
