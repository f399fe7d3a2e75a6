"""Triton kernels for any GPU: NVIDIA from SM80 on, AMD CDNA and RDNA. Every feature of the reference."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.plan import Plan, PlanKey
from headway.problem import Problem
from headway.providers.base import (
    ALL_FEATURES,
    Capabilities,
    HeadDims,
    Provider,
)

if TYPE_CHECKING:
    from headway.kernels.mods import ModArguments

_FLOAT8 = torch.float8_e4m3fn
_DTYPES = frozenset(
    {
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (_FLOAT8, _FLOAT8),
        (torch.bfloat16, _FLOAT8),
        (torch.float16, _FLOAT8),
    }
)

#: Sequences of one launch: a grid's third dimension ends at 65,535, and takes pieces of sequences too.
MOST_SEQUENCES = 1 << 15

#: head_dim / head_dim_v of absorbed MLA: rope beside latent (``qv``), both together, latent alone.
_LATENT_DIMS = frozenset({(64, 512), (576, 512), (512, 512)})

_CAPABILITIES = Capabilities(
    device_types=frozenset({"cuda"}),
    dtypes=_DTYPES,
    features=ALL_FEATURES,
    head_dims=HeadDims(maximum=256, multiple_of=8, pairs=_LATENT_DIMS),
)


class PortableProvider(Provider):
    name = "portable"

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type == "meta":  # stands for the target that HEADWAY_TARGET names
            return None if "HEADWAY_TARGET" in os.environ else "no target named for meta tensors"
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "runs on GPUs (on a CPU only under Triton's interpreter, TRITON_INTERPRET=1)"
        elif device.type != "cuda":
            return f"runs on CUDA and ROCm devices, not on {device.type}"
        elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or newer"
        return None

    def capabilities(self, device: torch.device) -> Capabilities:
        return dataclasses.replace(_CAPABILITIES, device_types=frozenset({device.type}))

    def documented(self) -> Mapping[str, Capabilities]:
        return {"any GPU": _CAPABILITIES}

    def reasons_against(self, problem: Problem) -> list[str]:
        reasons = super().reasons_against(problem)
        if reasons:
            return reasons
        from headway.kernels.portable.mla import is_latent

        if problem.head_dim_v > 256 and not is_latent(problem):
            given = f"head_dim={problem.head_dim}/{problem.head_dim_v}"
            return [f"{given}: only as absorbed MLA, with qv, or v the first columns of k"]
        if problem.head_dim > 256 and problem.qv is not None:
            return [f"head_dim={problem.head_dim} with qv: takes up to 256"]
        return []

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        out = problem.empty_out()
        lse = problem.empty_lse() if problem.return_lse else None
        if problem.batch_size <= MOST_SEQUENCES:
            _solve(problem, out, lse)
            return out, lse
        for first in range(0, problem.batch_size, MOST_SEQUENCES):
            some = slice(first, first + MOST_SEQUENCES)
            own = slice(None) if problem.ragged_q else some
            _solve(_part(problem, some), out[own], None if lse is None else lse[own])
        return out, lse

    def plan(
        self,
        key: PlanKey,
        seqlens_k: Tensor,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
        num_splits: int = 0,
        sm_margin: int = 0,
    ) -> Plan:
        from headway.kernels.portable.decode import plan

        schedule = plan(
            key, seqlens_k, kv_dtype=kv_dtype, num_splits=num_splits, sm_margin=sm_margin
        )
        return Plan(key, schedule.num_splits, schedule)


def _part(p: Problem, some: slice) -> Problem:
    """The problem of some of its sequences; a plan, which is of all of them, is left out."""
    score_mod = _counted_from(some.start, p.scores.score_mod, 1)
    mask_mod = _counted_from(some.start, p.mask.mask_mod, 0)
    return dataclasses.replace(
        p.of_sequences(some),
        scores=dataclasses.replace(p.scores, score_mod=score_mod),
        mask=dataclasses.replace(p.mask, mask_mod=mask_mod),
        plan=None,
    )


def _counted_from(first: int, mod: Callable[..., Any] | None, at: int) -> Callable[..., Any] | None:
    """A mod whose argument ``at``, the sequence, begins at ``first``."""
    if mod is None:
        return None
    return lambda *given: mod(*given[:at], given[at] + first, *given[at + 1 :])


def _solve(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Append, if there is something to, and fill ``out`` and ``lse``."""
    from headway.kernels.portable.append import append

    if problem.append is not None:
        q = append(problem, problem.append)
        if q is not problem.q:
            problem = dataclasses.replace(problem, q=q)
    _attend(problem, out, lse)


def _attend(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Route a problem, its append done, to the kernel for it."""
    from headway.kernels.portable.decode import decode, is_decode
    from headway.kernels.portable.forward import forward
    from headway.kernels.portable.mla import is_latent, mla

    schedule = problem.plan.schedule if problem.plan is not None else None
    mods = _mods(problem)
    if is_latent(problem):
        mla(problem, out, lse, schedule, mods=mods)
    elif is_decode(problem):
        decode(problem, out, lse, schedule, mods=mods)
    else:
        forward(problem, out, lse, mods=mods)


def _mods(problem: Problem) -> ModArguments | None:
    score_mod, mask_mod = problem.scores.score_mod, problem.mask.mask_mod
    if score_mod is None and mask_mod is None:
        return None
    from headway.kernels.mods import trace_mods

    return trace_mods(score_mod, mask_mod, problem.aux_tensors, problem.device)


PROVIDER = PortableProvider()
