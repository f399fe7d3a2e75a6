"""float8 quantisation with scales from the data: one per tensor or one per head.

``values * scale`` is the number meant. Scales put the largest finite magnitude at the top of the format, so
nothing overflows; given scales saturate. A plain cast would turn 449 into NaN (e4m3fn) or lose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.problem import FLOAT8_DTYPES

Per = Literal["tensor", "head"]


class Quantised(NamedTuple):
    """float8 values in the shape of the original, and float32 scales: (1,), or (heads,) per head."""

    values: Tensor
    scale: Tensor


def native_float8(device: torch.device) -> torch.dtype:
    """The e4m3 format that a device multiplies: fnuz (up to 240) on AMD's gfx942, else fn (up to 448)."""
    if device.type == "cuda" and torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        if arch.startswith("gfx94"):
            return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def amax_scale(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, per: Per = "tensor") -> Tensor:
    """The scale that puts the largest finite magnitude of ``x`` at the largest value of ``dtype``.

    Args:
        x: (..., heads, width), floating point.
        per: "tensor" gives shape (1,), "head" one scale for each entry of the second to last dimension.

    Returns:
        float32, positive; 1 where all is zero. No device synchronisation.
    """
    _check(x, dtype, per)
    largest = torch.zeros(x.shape[-2] if per == "head" else 1, dtype=torch.float32, device=x.device)
    _raise_to_amax(largest, x)
    return _scale_of(largest, dtype)


def amax_scales(
    tensors: Sequence[Tensor], dtype: torch.dtype = torch.float8_e4m3fn
) -> list[Tensor]:
    """:func:`amax_scale` per tensor of several on one device, in fewer launches."""
    if not tensors:
        return []
    largest = torch.zeros(len(tensors), dtype=torch.float32, device=tensors[0].device)
    for i, x in enumerate(tensors):
        _check(x, dtype, "tensor")
        _raise_to_amax(largest[i : i + 1], x)
    return list(_scale_of(largest, dtype).split(1))


def _scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    scale = largest / torch.finfo(dtype).max
    # Not below the smallest normal number: kernels multiply by the reciprocal, which must be finite.
    smallest = torch.finfo(torch.float32).smallest_normal
    return torch.where(largest > 0, scale.clamp(min=smallest), 1.0)


def quantise(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    per: Per = "tensor",
    scale: Tensor | None = None,
) -> Quantised:
    """Values of ``x`` divided by a scale, rounded to nearest even and saturated to ``dtype``.

    Args:
        x: (..., heads, width), floating point.
        scale: float32 (1,) or (heads,), to be used in place of the data's own. Infinities and values
            beyond the format become its largest value; NaN stays NaN, and only where it was.

    Raises:
        InvalidInputError: x has less than two dimensions or is float8, or scale has a wrong shape.
    """
    _check(x, dtype, per)
    if scale is None:
        scale = amax_scale(x, dtype, per)
    elif not isinstance(scale, Tensor):
        raise InvalidInputError("scale", type(scale).__name__, "a float32 tensor, or None")
    scale = scale.reshape(-1).float()
    if scale.numel() not in (1, x.shape[-2]):
        wanted = f"1 element, or one for each of the {x.shape[-2]} heads"
        raise InvalidInputError("scale", f"{scale.numel()} elements", wanted)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    if values.numel():
        _fill(x.reshape(-1, *x.shape[-2:]), scale, values.view(-1, *x.shape[-2:]))
    return Quantised(values, scale)


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values * scale`` of (..., heads, width) float8 values; scale (1,), or (heads,).

    Raises:
        InvalidInputError: scale is no tensor, or has another number of elements.
    """
    if not isinstance(scale, Tensor):
        wanted = "a float32 tensor, as quantise() returns it"
        raise InvalidInputError("scale", type(scale).__name__, wanted)
    if scale.numel() not in (1, values.shape[-2]):
        wanted = f"1 element, or one for each of the {values.shape[-2]} heads"
        raise InvalidInputError("scale", f"{scale.numel()} elements", wanted)
    return (values.float() * scale.reshape(-1, 1)).to(dtype)


def _check(x: Tensor, dtype: torch.dtype, per: str) -> None:
    if dtype not in FLOAT8_DTYPES:
        raise InvalidInputError("dtype", dtype, "a float8 dtype")
    if not isinstance(x, Tensor):
        raise InvalidInputError("x", type(x).__name__, "a tensor (..., heads, width)")
    if x.dim() < 2 or not x.is_floating_point() or x.dtype in FLOAT8_DTYPES:
        given = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise InvalidInputError("x", given, "(..., heads, width) in a wider floating-point dtype")
    if per not in ("tensor", "head"):
        raise InvalidInputError("per", per, '"tensor" or "head"')


def _raise_to_amax(largest: Tensor, x: Tensor) -> None:
    """Raise ``largest``, (1,) or (heads,), to the largest finite magnitudes of ``x``."""
    if x.numel() == 0:
        return
    rows = x.reshape(-1, *x.shape[-2:])
    if _on_kernels(rows):
        from headway.kernels.portable import quantise as kernels

        kernels.amax(rows, largest)
        return
    size = rows.abs().float()
    per_head = torch.where(size < float("inf"), size, 0.0).amax((0, 2))
    largest.copy_(torch.maximum(largest, per_head if largest.numel() > 1 else per_head.max()))


def _fill(rows: Tensor, scale: Tensor, values: Tensor) -> None:
    if _on_kernels(rows):
        from headway.kernels.portable import operands
        from headway.kernels.portable import quantise as kernels

        if operands.knows_float8(values.dtype, operands.device_of(rows.device)):
            kernels.quantise(rows, scale, values)
            return
    limit = torch.finfo(values.dtype).max
    values.copy_((rows.float() / scale[:, None]).clamp(-limit, limit).to(values.dtype))


def _on_kernels(rows: Tensor) -> bool:
    return rows.device.type in ("cuda", "meta") and rows.stride(-1) == 1
