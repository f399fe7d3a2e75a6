"""The public functions as PyTorch operators, for ``torch.compile``: traced graphs hold one node per call.

Inside a compiled region the functions of :mod:`headway` go through these operators; otherwise they do not.
What a call writes in place is declared: ``out``, and the caches where new tokens are appended. The public
function itself is an operator's implementation, so every provider and feature is the same as without a
compiler, but for two arguments that no graph can hold: a Plan (a hint: the call makes its own schedule),
and score_mod and mask_mod (such calls break the graph, which is an error with ``fullgraph=True``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import headway
from headway import gradients
from headway.errors import UnsupportedError
from headway.problem import FLOAT8_DTYPES

#: Optional tensors of the operators, under the names that the public functions give them.
TENSORS = (
    "qv",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "cache_seqlens",
    "cache_leftpad",
    "cache_batch_idx",
    "page_table",
    "q_descale",
    "k_descale",
    "v_descale",
    "sinks",
)
#: Those that belong to new tokens, of the operator that appends.
NEW_TENSORS = ("rotary_cos", "rotary_sin", "rotary_seqlens", "cu_seqlens_k_new")
#: Plain arguments, with their types in operator schemas. ``lse``: whether it is wanted.
PLAIN = {
    "window_left": "SymInt",
    "window_right": "SymInt",
    "softmax_scale": "float?",
    "causal": "bool",
    "attention_chunk": "SymInt",
    "softcap": "float",
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "num_splits": "SymInt",
    "pack_gqa": "bool?",
    "sm_margin": "SymInt",
    "deterministic": "bool",
    "only_qv": "bool",
    "rotary_interleaved": "bool",
    "ver": "int?",
    "backend": "str?",
    "lse": "bool",
}

_KVCACHE = "flash_attn_with_kvcache"


#: What no operator takes. The functions themselves answer such calls, with an error or outside of graphs.
_UNTRACEABLE = (
    "score_mod",
    "mask_mod",
    "aux_tensors",
    "aux_scalars",
    "gather_kv_indices",
    "block_sparse_tensors",
)


#: Inputs that a training attention has gradients for.
_TRAINED = ("q", "k", "v", "k_cache", "v_cache", "qv", "sinks", "learnable_sink")


# --- from a traced call to an operator --------------------------------------------------------------


def call(function: str, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """One call of a public function, with all its arguments by name, as the compiler traces it."""
    new = ("k", "v") if function == _KVCACHE else ()
    incomplete = len({arguments[name] is None for name in new}) > 1
    twice = arguments["sinks"] is not None and arguments["learnable_sink"] is not None
    if incomplete or twice or any(arguments.get(name) is not None for name in _UNTRACEABLE):
        return _uncompiled(function, arguments)
    inputs = [arguments[name] for name in _TRAINED if arguments.get(name) is not None]
    trains = gradients.required(*inputs)
    if trains:  # the operator has no backward, and what it returns would want one
        arguments = {name: _detached(x) for name, x in arguments.items()}
    k, v, new_k, new_v = arguments["k"], arguments["v"], None, None
    if function == _KVCACHE:
        k, v, new_k, new_v = arguments["k_cache"], arguments["v_cache"], k, v
    q = arguments["q"]
    out = arguments["out"]
    if trains:
        gradients.check_out(out)
    if out is None:
        dtype = torch.bfloat16 if q.dtype in FLOAT8_DTYPES else q.dtype
        out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    tensors = [_tensor(name, arguments, q) for name in TENSORS]
    plain = [_plain(name, arguments) for name in PLAIN]
    if new_k is None:
        lse = torch.ops.headway.attention(function, q, k, v, out, *tensors, *plain)
    else:
        tensors += [arguments.get(name) for name in NEW_TENSORS]
        lse = torch.ops.headway.attention_append(q, k, v, out, new_k, new_v, *tensors, *plain)
    if trains:
        out = torch.ops.headway.without_backward(out, inputs)
    return (out, lse) if plain[-1] else out


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _tensor(name: str, arguments: dict[str, Any], q: Tensor) -> Tensor | None:
    value: Any = arguments.get(name)
    if name == "sinks" and value is None:
        value = arguments["learnable_sink"]
    if name == "cache_seqlens" and isinstance(value, int):
        cu_seqlens = arguments["cu_seqlens_q"]
        batch_size = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        value = torch.full((batch_size,), value, dtype=torch.int32, device=q.device)
    return value


def _plain(name: str, arguments: dict[str, Any]) -> Any:
    if name == "lse":
        flags = ("return_attn_probs", "return_lse", "return_softmax_lse")
        return any(arguments.get(flag, False) for flag in flags)
    if name in ("window_left", "window_right"):
        left, right = arguments["window_size"] or (None, None)
        side = left if name == "window_left" else right
        return -1 if side is None else side
    if name == "rotary_interleaved":
        return arguments.get(name, True)
    value = arguments.get(name)
    if name == "softcap":
        return float(value or 0.0)
    if PLAIN[name] in ("SymInt", "bool"):
        return value or (False if PLAIN[name] == "bool" else 0)
    return value


@torch.compiler.disable
def _uncompiled(function: str, arguments: dict[str, Any]) -> Any:
    return getattr(headway, function)(**arguments)


# --- operators --------------------------------------------------------------------------------------


def _attention(function: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any) -> Tensor:
    names = ("k_cache", "v_cache") if function == _KVCACHE else ("k", "v")
    given = dict(zip((*TENSORS, *PLAIN), rest, strict=True))
    return _run(function, given | {"q": q, names[0]: k, names[1]: v, "out": out})


def _attention_append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Tensor:
    given = dict(zip((*TENSORS, *NEW_TENSORS, *PLAIN), rest, strict=True))
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    return _run(_KVCACHE, given | caches | {"q": q, "out": out, "k": k, "v": v})


def _run(function: str, given: dict[str, Any]) -> Tensor:
    """The public function on an operator's arguments, those it has; its LSE, empty if not wanted."""
    known = _parameters(function)
    arguments = {n: x for n, x in given.items() if n in known and x is not None}
    arguments["window_size"] = (given["window_left"], given["window_right"])
    with torch.no_grad():
        result = getattr(headway, function)(**arguments, return_softmax_lse=given["lse"])
    return result[1] if given["lse"] else given["q"].new_empty(0, dtype=torch.float32)


@functools.cache
def _parameters(function: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(headway, function)).parameters)


def _fake_lse(q: Tensor, wanted: bool) -> Tensor:
    """(B, Hq, Sq), or (Hq, total_q) of ragged queries."""
    if not wanted:
        return q.new_empty(0, dtype=torch.float32)
    *batch, rows, heads, _ = q.shape
    return q.new_empty((*batch, heads, rows), dtype=torch.float32)


def _combine(out_partial: Tensor, lse_partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from headway.kernels.portable.combine import combine

    return combine(out_partial, lse_partial, dtype)


def _merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from headway.kernels.portable.combine import merge_states

    return merge_states(outs, lses)


def _schema(first: str, tensors: tuple[str, ...]) -> str:
    optional = ", ".join(f"Tensor? {name}" for name in tensors)
    plain = ", ".join(f"{kind} {name}" for name, kind in PLAIN.items())
    return f"({first}, {optional}, {plain}) -> Tensor"


attention = torch.library.custom_op(
    "headway::attention",
    _attention,
    mutates_args=("out",),
    schema=_schema("str function, Tensor q, Tensor k, Tensor v, Tensor(a!) out", TENSORS),
)
attention.register_fake(lambda function, q, *rest: _fake_lse(q, rest[-1]))

attention_append = torch.library.custom_op(
    "headway::attention_append",
    _attention_append,
    mutates_args=("k_cache", "v_cache", "out"),
    schema=_schema(
        "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out, Tensor k, Tensor v",
        (*TENSORS, *NEW_TENSORS),
    ),
)
attention_append.register_fake(lambda q, *rest: _fake_lse(q, rest[-1]))

without_backward = torch.library.custom_op(
    "headway::without_backward",
    lambda out, inputs: out.clone(),
    mutates_args=(),
    schema="(Tensor out, Tensor[] inputs) -> Tensor",
)
without_backward.register_fake(lambda out, inputs: torch.empty_like(out))


def _no_gradient(gradient: Tensor, like: Tensor) -> Tensor:
    raise UnsupportedError("Headway computes no gradients: train with torch's own attention")


#: An operator, so that whoever compiles a backward pass does not run it.
no_gradient = torch.library.custom_op(
    "headway::no_gradient",
    _no_gradient,
    mutates_args=(),
    schema="(Tensor gradient, Tensor like) -> Tensor",
)
no_gradient.register_fake(lambda gradient, like: torch.empty_like(like))


def _refuse_backward(ctx: Any, gradient: Tensor) -> tuple[None, list[Tensor]]:
    return None, [torch.ops.headway.no_gradient(gradient, x) for x in ctx.saved_tensors]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


without_backward.register_autograd(_refuse_backward, setup_context=_keep_inputs)

combine = torch.library.custom_op(
    "headway::combine",
    _combine,
    mutates_args=(),
    schema="(Tensor out_partial, Tensor lse_partial, ScalarType dtype) -> (Tensor, Tensor)",
)
combine.register_fake(
    lambda out_partial, lse_partial, dtype: (
        out_partial.new_empty(out_partial.shape[1:], dtype=dtype),
        lse_partial.new_empty(lse_partial.shape[1:], dtype=torch.float32),
    )
)

merge_states = torch.library.custom_op(
    "headway::merge_states",
    _merge_states,
    mutates_args=(),
    schema="(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
)
merge_states.register_fake(
    lambda outs, lses: (
        outs[0].new_empty(outs[0].shape),
        lses[0].new_empty(lses[0].shape, dtype=torch.float32),
    )
)
